"""Train the recipes of the front on CIFAR-10, several seeds at once, on one GPU or on a CPU.

    python -m benchmarks.front_training --data_root DIR --checkpoint FILE --out OUT [--recipes NAME ...] [--seeds 0 1 ...]

Run the stages of each recipe that train (`distill`, `finetune`), with their settings unchanged, on the teacher in FILE
(slim_resnet18, width 64, stem small). A seed decides the student's first weights, the order and the augmentation; the
validation images are those of seed 0 for all, because the teacher has not seen them. The teacher's outputs are computed
once for a seed and serve all recipes. `python -m benchmarks.front` makes packages of what is in OUT, and scores them.

Trainings continue where they were stopped: give the same command again.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from architectures.checkpoints import open_checkpoint
from architectures.zoo import make
from compress.pipeline.config import resolve
from compress.pipeline.stage import Artifact, Context, Stage, TeacherModel, TorchModel, stage_class
from compress.pipeline.stages.distill import Distill
from compress.training.assessment import accuracy_of
from compress.training.data import training_data
from compress.training.precision import autocast_dtype
from compress.training.targets import cached_targets
from compress.training.trackers import Tracker
from loaders.catalog import load
from loaders.request import Request
from loaders.splits import Splits
from metadata.files import write_json
from metadata.machine import machine, usable_cores, versions
from metadata.records import ModelReference

RECIPES = ["cifar10_96kb", "cifar10_96kb_fast", "cifar10_64kb", "cifar10_512kb"]
TRAINING_STAGES = ("distill", "finetune")
TEACHER: dict[str, Any] = {"width": 64, "stem": "small"}
DONE, ERROR, LOGITS = "trained.json", "error.txt", "teacher_logits.pth"


def training_stages(recipe: str) -> list[tuple[str, Stage]]:
    """Return the names and settings of the stages of a recipe that train a student."""
    named = [next(iter(entry.items())) for entry in resolve(recipe).stages]
    return [(name, stage_class(name).model_validate(settings)) for name, settings in named
            if name in TRAINING_STAGES]


def open_teacher(checkpoint: Path, classes: int, device: torch.device) -> TeacherModel:
    """Return the teacher of all recipes with the weights of a checkpoint, float16 or float32."""
    module = make("slim_resnet18", num_classes=classes, **TEACHER)
    opened = open_checkpoint(checkpoint, module, num_classes=classes)
    module.load_state_dict({name: tensor.float() for name, tensor in opened.weights.items()})
    return TeacherModel(module.to(device).eval(), ModelReference(name="slim_resnet18", num_classes=classes,
                                                                 options=TEACHER))


def shared_logits(stage: Distill, context: Context, teacher: TeacherModel, folder: Path) -> None:
    """Give a stage the teacher's outputs that another recipe with this seed has computed, or compute them for all."""
    train = context.usable(stage.train)
    temperature = stage.cache_temperature(train)
    kept = folder / f"{context.seed}-{stage.cache_views}-{'-'.join(train.augment or [])}-{temperature}.pth"
    own = context.folder / LOGITS
    if not stage.cache_views or own.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another training of this seed may be computing them
        if not kept.exists():
            data = training_data(context.splits.train, context.splits.validation, context.splits.card, train,
                                 seed=context.seed, device=context.device)
            cached_targets([teacher.module], data, stage.cache_views, kept,
                           autocast_dtype(train.precision, context.device), context.device, context.tracker, temperature)
    os.link(kept, own)


def train_recipe(recipe: str, seed: int, splits: Splits, checkpoint: Path, out: Path, device_name: str,
                 threads: int) -> None:
    """Run the training stages of a recipe, and leave the student and `trained.json` in `out/<recipe>-<seed>`."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    run = out / f"{Path(recipe).stem}-{seed}"
    run.mkdir(parents=True, exist_ok=True)
    with (run / "log.txt").open("a") as log:
        console = Console(file=log, width=120)
        teacher = open_teacher(checkpoint, splits.card.num_classes, device)
        model: Artifact = teacher
        outputs: list[Artifact] = [teacher]
        found: dict[str, Any] = {"recipe": Path(recipe).stem, "seed": seed, "stages": {}, "machine": machine(),
                                 "versions": versions(), "device": device_name if device.type == "cpu" else
                                 torch.cuda.get_device_name(device)}
        for name, stage in training_stages(recipe):
            folder = run / name
            folder.mkdir(exist_ok=True)
            tracker = Tracker(console, folder)
            context = Context(splits=splits, device=device, seed=seed, folder=folder, run_folder=run, tracker=tracker,
                              outputs=outputs, measurements={})
            if isinstance(stage, Distill):
                shared_logits(stage, context, teacher, out / "logits")
            started = time.perf_counter()
            model = stage.run(model, context)
            seconds = time.perf_counter() - started
            assert isinstance(model, TorchModel)
            outputs.append(model)
            model.save(folder)
            data = context.data(stage.train)  # type: ignore[attr-defined]
            correct = round(accuracy_of(model.module, data.validation, data.preprocessing) * len(data.validation))
            found["stages"][name] = {"seconds": round(seconds, 1), "training_seconds": round(context.training_seconds, 1),
                                     "validation_correct": correct, "validation_images": len(data.validation),
                                     "notes": context.notes, "warnings": context.warnings}
        write_json(run / DONE, found)
        (run / ERROR).unlink(missing_ok=True)


def in_process(*job: Any) -> None:
    """Run `train_recipe`, and leave a traceback in the log where it fails."""
    try:
        train_recipe(*job)
    except Exception:
        (job[4] / f"{Path(job[0]).stem}-{job[1]}" / ERROR).write_text(traceback.format_exc())
        raise SystemExit(1) from None


def main() -> int:
    """Train what OUT lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the teacher's weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", nargs="+", metavar="RECIPE:SEED", help="instead of all recipes with all seeds, in order")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--parallel", type=int, default=1, help="trainings at once")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which trainings are stopped")
    arguments = parser.parse_args()
    ends = time.monotonic() + 60 * arguments.minutes
    torch.set_num_threads(1)  # GNU's OpenMP waits for ever in a child whose parent has computed on several threads
    splits = load(Request(name="cifar10", root=arguments.data_root, seed=0, validation_fraction=0.1,
                          workers=usable_cores()))
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"{len(splits.train):,} images to train on, {len(splits.validation):,} of validation", flush=True)
    jobs = [(recipe, int(seed)) for recipe, _, seed in (text.rpartition(":") for text in arguments.jobs or ())] or [
        (recipe, seed) for recipe in arguments.recipes for seed in arguments.seeds]
    waiting = [(recipe, seed) for recipe, seed in jobs
               if not (arguments.out / f"{Path(recipe).stem}-{seed}" / DONE).exists()]
    fork = multiprocessing.get_context("fork")  # the images are decoded once; CUDA begins in the children alone
    threads = max(1, usable_cores() // arguments.parallel)
    running: dict[tuple[str, int], Any] = {}
    failed = 0
    began: dict[tuple[str, int], float] = {}
    while (waiting or running) and time.monotonic() < ends:
        while waiting and len(running) < arguments.parallel:
            job = waiting.pop(0)
            running[job] = fork.Process(target=in_process, args=(*job, splits, arguments.checkpoint, arguments.out,
                                                                 arguments.device, threads))
            running[job].start()
            began[job] = time.monotonic()
        time.sleep(0.2)
        for job, process in list(running.items()):
            if process.exitcode is None:
                continue
            del running[job]
            failed += process.exitcode != 0
            folder = arguments.out / f"{Path(job[0]).stem}-{job[1]}"
            text = "failed"
            if (folder / DONE).exists():
                stages = json.loads((folder / DONE).read_text())["stages"]
                text = ", ".join(f"{name} {row['validation_correct'] / row['validation_images']:.2%} "
                                 f"({row['training_seconds']:.0f} s)" for name, row in stages.items())
            print(f"{folder.name}: {text}; {time.monotonic() - began[job]:.0f} s", flush=True)
    for name in {f"{Path(recipe).stem}-{seed}" for recipe, seed in waiting}:
        print(f"{name}: not begun", flush=True)
    for job, process in running.items():
        process.terminate()
        process.join(10)
        print(f"{Path(job[0]).stem}-{job[1]}: stopped", flush=True)
    return 1 if failed or running or waiting else 0


if __name__ == "__main__":
    sys.exit(main())
