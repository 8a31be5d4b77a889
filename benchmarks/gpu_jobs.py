"""The project's full-size jobs for one card, in order of worth: what `python -m benchmarks.gpu` runs.

A new job is an entry of `all_jobs`: a command of the project that continues where it was stopped, an estimate of its
minutes with its source, and its share of the card. A student of the CIFAR-10 search is an entry of `STUDENTS`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_card import Job
from benchmarks.record_run import record
from compress.pipeline.config import resolve
from compress.training.flags import resolve_training
from metadata.formats import read_csv

# Images/s of a ResNet18 of full width on 32x32 images, forward and backward, batch 512, bfloat16, on an H100: 60 epochs of
# 45,000 images in 85.18 s, beside two other trainings.
RATE, RATE_SOURCE = 31_700, "benchmarks/results/slim_resnet18_cifar10_large.json, stage teacher: 31,700 images/s"
START = 0.3  # minutes to start Python and CUDA and to decode 60,000 images: assumed
TEACHER = "cifar10_resnet18_w64_fp16.pth"  # weights of a teacher that saves the training of one
ZOO_WEIGHTS = "resnet50-11ad3fa6.pth"  # torchvision's file name for ResNet50, IMAGENET1K_V2
# Each optimizer of `train`, with a learning rate for digits; SAM with each base.
OPTIMIZERS = {"sgd": (0.1, ""), "adam": (0.003, ""), "adamw": (0.003, ""), "muon": (0.02, ""), "sam": (0.1, "sgd"),
              "sam_adam": (0.003, "adam"), "sam_adamw": (0.003, "adamw"), "sam_muon": (0.02, "muon")}


@dataclass(frozen=True, kw_only=True)
class Student:
    """A recipe of the pipeline that trains a student on CIFAR-10, with its changes and its estimate.

    Args:
        recipe: its name.
        changes: `key=value` for all runs.
        minutes: on an H100, with the teacher to train.
        teacher_minutes: the part of them that a teacher's checkpoint saves.
        source: where the minutes come from.
        share: of the card.
        goal: test accuracy, a fraction.
        published: whose figure it is.
    """

    recipe: str
    changes: Sequence[str]
    minutes: float
    teacher_minutes: float
    source: str
    share: float
    goal: float
    published: str


STUDENTS = [
    Student(recipe="slim_resnet18_cifar10_large",
            changes=["teacher.train.epochs=60", "distill.train.epochs=60", "finetune.train.epochs=24"],
            minutes=5.9 + START, teacher_minutes=1.4, share=0.2, goal=0.9359,
            source="benchmarks/results/slim_resnet18_cifar10_large.json: 352 s, of which the teacher 85",
            published="its own record"),
]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the jobs run, and what they find there.

    Args:
        out: folder of the records.
        sets: the folders of the data sets that are there.
        missing: why a set or a file is not there, by name.
        files: checkpoints that are there, by name.
        device: cpu or cuda.
        cores: of the CPU.
        scale: share of the epochs; 1 is the full size.
    """

    out: Path
    sets: dict[str, Path]
    missing: dict[str, str]
    files: dict[str, Path]
    device: str
    cores: int
    scale: float

    def folder(self, name: str) -> Path:
        """Return the folder that a job writes."""
        return self.out / "runs" / name

    def threads(self, share: float) -> int:
        """Return the CPU threads of a job with a share of the card."""
        return max(1, int(self.cores * share))

    def epochs(self, full: int) -> int:
        """Return the epochs at this scale, at least one."""
        return max(1, round(full * self.scale))

    def minutes(self, full: float) -> float:
        """Return the estimate at this scale; the start takes as long at every scale."""
        return START + max(0.0, full - START) * self.scale


def all_jobs(place: Place) -> list[Job]:
    """Return all jobs, in order of worth; those that cannot run here say why."""
    zoo = place.files.get(ZOO_WEIGHTS)
    return [
        *(smoke(place, optimizer, precision) for precision in ("float16", "bfloat16") for optimizer in OPTIMIZERS),
        *(smoke(place, optimizer, "bfloat16", graph=True) for optimizer in ("sgd", "adamw", "muon", "sam")),
        against_the_clock(place, "cifar10_fast", seconds=13.76, goal=0.94,
                          source="benchmarks/results/cifar10_fast_h100.json: 13.76 s a training; its start is assumed",
                          published="the project's goal: 94 %, a mean over each image and its mirror image"),
        against_the_clock(place, "cifar10_airbench", seconds=8.0, goal=0.94,
                          source="no measurement: the goal, 8 s a training",
                          published="the project's goal: 94 %, a mean over each image and its mirror image"),
        training(place, "cifar100_resnet18_sam", "cifar100", minutes=START + 100 * 49_000 * 2 / RATE / 60, least=2.5,
                 share=0.4, source=f"{RATE_SOURCE}; SAM passes twice", goal=0.79,
                 published="the project's bar; with SAM in 200 epochs others report about 80 %"),
        *(student(place, entry) for entry in STUDENTS),
        training(place, "cifar100_resnest26d_sam", "cifar100", minutes=START + 4.7, least=2.5, share=0.4,
                 source="no measurement: 30 epochs of 96 steps, each two passes of 50 ms", goal=0.6602,
                 published="66.02 %, this network with SAM"),
        training(place, "cifar100_transfer", "cifar100", minutes=2 * START + 10 * 49_000 / 2_500 / 60, least=2.0,
                 share=0.5, source="no measurement: 10 epochs at 2,500 images/s, a usual speed of ResNet50 at 224 pixels",
                 goal=0.7976, published="79.76 %, in 10 epochs of a pretrained network", needs=ZOO_WEIGHTS,
                 environment={"TORCH_HOME": str(zoo.parents[2])} if zoo else {}),
    ]


def training(place: Place, name: str, dataset: str, flags: Sequence[str] = (), *, minutes: float, share: float, source: str,
             goal: float, published: str, least: float = math.inf, needs: str = "",
             environment: dict[str, str] | None = None) -> Job:
    """Return one run of `python -m compress train`, of the recipe `name` unless flags are given.

    Without what `needs` names, a file or a 16-bit type, the job is left out.
    """
    flags = flags or ["--config", name, "--precision", "auto"]
    epochs = [] if place.scale == 1 else ["--epochs", str(place.epochs(resolve_training(flags).epochs))]
    root = ["--data_root", str(place.sets[dataset])] if dataset in place.sets else []
    missing = place.missing.get(dataset, "") or place.missing.get(needs, "")
    threads = place.threads(share)
    return Job(
        name=name, command=[sys.executable, "-m", "compress", "train", *flags, *epochs],
        placed=[*root, "--device", place.device, "--threads", str(threads), "--num_workers", str(max(2, min(8, threads))),
                "--log_dir", str(place.folder(name))],
        minutes=place.minutes(minutes), least=place.minutes(least), share=share, source=source, missing=missing, goal=goal,
        published=published, environment=environment or {}, result=partial(training_result, place.folder(name)))


def smoke(place: Place, optimizer: str, precision: str, graph: bool = False) -> Job:
    """Return a short training on digits with one optimizer in one 16-bit type: it must learn, not diverge."""
    lr, base = OPTIMIZERS[optimizer]
    flags = ["--config", "digits", "--optimizer", "sam" if base else optimizer, "--lr", str(lr), "--precision", precision]
    flags += [*(["--sam_base", base] if base else []), *(["--cuda_graph", "true"] if graph else [])]
    return training(place, f"smoke_{optimizer}_{precision}{'_graph' if graph else ''}", "digits", flags,
                    minutes=START + 0.15, share=1 / 16, goal=0.9, published="it learned, and did not diverge",
                    source="no measurement: 240 short steps and the start of a process",
                    needs="cuda_graph" if graph else precision)


def against_the_clock(place: Place, recipe: str, *, seconds: float, goal: float, source: str, published: str,
                      seeds: Sequence[int] = (0, 1, 2)) -> Job:
    """Return a training of CIFAR-10 whose time is a result: one seed after the other, alone on the card.

    Args:
        place: where it runs.
        recipe: of `train`.
        seconds: of one training, without its start.
        goal: test accuracy with mirror images, the mean over the seeds.
        source: where the seconds come from.
        published: whose figure the goal is.
        seeds: of the trainings.
    """
    folder = place.folder(recipe)
    full = resolve_training(["--config", recipe]).epochs
    epochs = [] if place.scale == 1 else ["--epochs", str(place.epochs(full))]
    root = ["--data_root", str(place.sets["cifar10"])] if "cifar10" in place.sets else []
    return Job(
        name=recipe, command=[sys.executable, "-m", "benchmarks.cifar10_time", "--config", recipe, "--seeds",
                              ",".join(map(str, seeds)), "--precision", "auto", *epochs],
        placed=[*root, "--output", str(folder / "result"), "--device", place.device],
        minutes=len(seeds) * place.minutes(START + seconds / 60), share=1.0, source=source,
        missing=place.missing.get("cifar10", ""),
        goal=goal, published=published, result=partial(seeds_result, folder))


def student(place: Place, entry: Student) -> Job:
    """Return one run of the pipeline on CIFAR-10; a teacher's checkpoint, where there is one, saves its training."""
    name, changes = entry.recipe, list(entry.changes)
    weights = place.files.get(TEACHER)
    if place.scale < 1:
        stages = {stage: settings["train"] for item in resolve(entry.recipe, entry.changes).stages
                  for stage, settings in item.items() if "train" in settings}
        changes = [f"{stage}.train.epochs={place.epochs(train['epochs'])}" for stage, train in stages.items()]
        changes += ["prune.allow_slower=true", "quantize_dynamic.allow_slower=true"]
    if weights:
        changes = [change for change in changes if not change.startswith("teacher.")] + ["teacher.train.epochs=0"]
    root = [f"data.root={place.sets['cifar10']}"] if "cifar10" in place.sets else []
    minutes = place.minutes(entry.minutes - (entry.teacher_minutes if weights else 0))
    return Job(
        name=name, command=[sys.executable, "-m", "compress", "run", entry.recipe, *changes],
        placed=[*root, *([f"teacher.checkpoint={weights}"] if weights else []), f"run_dir={place.folder(name)}",
                f"name={name}", f"device={place.device}", f"threads={place.threads(entry.share)}"],
        minutes=minutes, least=minutes / 2, share=entry.share, source=entry.source,
        missing=place.missing.get("cifar10", ""), goal=entry.goal, published=entry.published,
        result=partial(run_result, place.folder(name) / name))


# ------------------------------------------------------------------------------------------------------------ records


def training_result(folder: Path) -> dict[str, Any]:
    """Return what a record says of a run of `train`: its result, or how far it came."""
    curve = [{key: float(row[key]) for key in ("epoch", "seconds", "train_loss", "validation_accuracy") if row.get(key)}
             for row in read_csv(folder / "metrics.csv")]
    found: dict[str, Any] = {"n": 1, "curve": curve}
    if (config := _json(folder / "config.json")) is not None:
        found["config"] = {**config["config"], "data_root": None, "log_dir": None}  # this machine's paths
    if (summary := _json(folder / "summary.json")) is not None:
        found |= {"test_accuracy": summary["test"]["accuracy"], "machine": summary["machine"],
                  "versions": summary["versions"],
                  "result": {key: value for key, value in summary.items() if key not in ("machine", "versions", "schema")}}
    return found


def seeds_result(folder: Path) -> dict[str, Any]:
    """Return what a record says of a run of `benchmarks.cifar10_time`: all seeds so far."""
    if (found := _json(folder / "result.json")) is None:
        return {"n": 0}
    mirrored = [run["test_accuracy_mirrored"] for run in found["runs"]]
    return {"n": found["n"], "test_accuracy": found["test_accuracy"]["mean"],
            "test_accuracy_mirrored": sum(mirrored) / len(mirrored), "config": found["config"], "machine": found["machine"],
            "versions": found["versions"], "result": found}


def run_result(folder: Path) -> dict[str, Any]:
    """Return what a record says of a run of the pipeline: `record_run`'s record, or the stages that are done."""
    if not (folder / "results.json").is_file():
        return {"n": 1, "stages": sorted(path.parent.name for path in folder.glob("[0-9][0-9]-*/stage.json"))}
    found = record(folder, [])
    return {"n": 1, "test_accuracy": found["results"]["accuracy"] / 100, "config": found["config"],
            "machine": found["machine"], "versions": found["versions"], "result": found}


def _json(path: Path) -> Any:
    """Return the content of a JSON file, or None where there is no file."""
    return json.loads(path.read_text()) if path.is_file() else None


