"""Methods of distillation side by side: one small student of CIFAR-10, equal epochs, several seeds, the control first.

    python -m benchmarks.distillation --data_root DIR --checkpoint FILE [--images 10000] [--epochs 20] [--methods kd dist]

The teacher's logits are computed once, over `--views` augmentations of each image, and serve all methods and seeds; methods
by features need the teacher on every batch, which costs its time at each step: name them in `--methods` where a GPU is at
hand. A seed decides the student's first weights and the order of its batches. Test accuracy is measured once, at the end of
each training; nothing is chosen by it. Trainings that the record has are left alone, so the command can be interrupted.
Write benchmarks/results/distillation.json and .md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from architectures.checkpoints import open_checkpoint
from architectures.counting import count_macs, count_parameters
from architectures.describe import lower
from architectures.zoo import make
from compress.training.assessment import assess
from compress.training.data import Data, seeded, training_data
from compress.training.distillation import MethodName, TeacherLoss, cross_entropy, distill
from compress.training.features import FEATURE_ALPHA, FEATURE_METHODS, learner_by_features
from compress.training.loop import train
from compress.training.mixup import Loss
from compress.training.settings import TrainingSettings
from compress.training.targets import cached_targets
from compress.training.trackers import Tracker
from loaders.arrays import ArrayImages
from loaders.catalog import load
from loaders.request import Request
from loaders.splits import Split, Splits
from metadata.files import write_atomically, write_json
from metadata.machine import machine, versions

RESULTS = Path(__file__).parent / "results" / "distillation.json"
CONTROL = "control"
BY_LOGITS = ["kd", "standardized", "dkd", "dist"]
STUDENT: dict[str, Any] = {"width": 8, "stem": "small"}


def some_of(split: Split, count: int) -> Split:
    """Return evenly spread images of a split that is in memory."""
    ids = torch.linspace(0, len(split) - 1, min(count, len(split))).round().long()
    assert isinstance(split.images, ArrayImages)
    return replace(split, images=ArrayImages(split.images.pixels[ids]), labels=split.labels[ids])


class Bench:
    """What all trainings share: data, teacher, and its logits.

    Args:
        splits: CIFAR-10.
        arguments: of the command line.
    """

    def __init__(self, splits: Splits, arguments: argparse.Namespace) -> None:
        self.splits, self.arguments = splits, arguments
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.settings = TrainingSettings(
            epochs=arguments.epochs, views=arguments.views, lr=0.1, batch_size=128, schedule="one_cycle",
            checkpoint_seconds=1e9, measure_every=arguments.epochs, monitor="train", keep="last")
        self.data: Data = training_data(some_of(splits.train, arguments.images), splits.validation, splits.card,
                                        self.settings, seed=0, device=self.device)
        self.teacher = make("slim_resnet18", num_classes=splits.card.num_classes, width=64, stem="small")
        opened = open_checkpoint(arguments.checkpoint, self.teacher, num_classes=splits.card.num_classes)
        self.teacher.load_state_dict({key: value.float() for key, value in opened.weights.items()})
        self.teacher.to(self.device).eval()
        self.tracker = Tracker(Console())
        self.test = splits.open_test()

    def targets(self, path: Path) -> Any:
        """Return the teacher's logits for all views, cached in a file."""
        return cached_targets([self.teacher], self.data, self.arguments.views, path, None, self.device, self.tracker)

    def trained(self, method: str, seed: int) -> dict[str, Any]:
        """Train the student by a method, and return what became of it."""
        shape = self.splits.card.input_shape
        with seeded(seed, "student"):
            lowered = lower(make("slim_resnet18", num_classes=self.splits.card.num_classes, **STUDENT).eval(), shape)
            student = lowered.build()
        learner: torch.nn.Module = student
        loss: Loss = cross_entropy(0.0)
        if method in FEATURE_METHODS:
            learner, loss, _ = learner_by_features(method, student, lowered.architecture, self.teacher, alpha=FEATURE_ALPHA,
                                                   label_smoothing=0.0, seed=seed, device=self.device)
        elif method != CONTROL:
            loss = distill(self.targets(self.arguments.cache), TeacherLoss.model_validate({"method": method}).chosen(), 0.0)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            train(learner, self.data, loss, self.settings, label=f"{method}, seed {seed}", seed=seed, device=self.device,
                  checkpoint=Path(folder) / "c.pth", tracker=self.tracker)
        seconds = time.perf_counter() - started
        found = {name: assess(student, split, self.splits.card.preprocessing) for name, split in (
            ("validation", self.splits.validation), ("test", self.test))}
        return {"seconds": round(seconds, 1), **{f"{name}_correct": each.correct for name, each in found.items()}}


def table(record: dict[str, Any]) -> str:
    """Return the record as Markdown: a row for each method, the control's first, with the gain over it seed by seed."""
    setup, rows, found = record["setup"], record["rows"], record["machine"]
    lines = ["# Methods of distillation on CIFAR-10", "",
             f"One student of {setup['student_parameters']:,} parameters and {setup['student_macs'] / 1e6:.1f} M MACs; "
             f"{setup['images']:,} training images, {setup['epochs']} epochs over {setup['views']} views; the teacher has "
             f"{setup['teacher_test_correct'] / setup['test_images']:.2%} of the test images right. Mean and deviation of "
             "the seeds. A seed's gain is over the control of the same seed.", "",
             "| method | seeds | validation | test | gain, test (points) | seconds |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]

    def spread(values: list[float]) -> str:
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{deviation}"

    for method in [CONTROL, *get_args(MethodName)]:
        seeds = rows.get(method, {})
        if not seeds:
            continue
        percent = {part: [100 * row[f"{part}_correct"] / setup[f"{part}_images"] for row in seeds.values()]
                   for part in ("validation", "test")}
        gains = [100 * (row["test_correct"] - rows[CONTROL][seed]["test_correct"]) / setup["test_images"]
                 for seed, row in seeds.items()]
        gain = "" if method == CONTROL else spread(gains)
        lines.append(f"| {method} | {len(seeds)} | {spread(percent['validation'])} % | {spread(percent['test'])} % | "
                     f"{gain} | {statistics.median(row['seconds'] for row in seeds.values()):.0f} |")
    lines += ["", f"Machine: {found['cpu']} ({' '.join(found['flags'])}), {setup['device']}, {setup['threads']} threads."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what the record lacks, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights of slim_resnet18, width 64, stem small")
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=get_args(MethodName), default=BY_LOGITS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("distillation_teacher_logits.pth"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    splits = load(Request(name="cifar10", root=arguments.data_root, seed=0, validation_fraction=0.1))
    bench = Bench(splits, arguments)
    student = make("slim_resnet18", num_classes=splits.card.num_classes, **STUDENT)
    setup = {"student": STUDENT, "student_parameters": count_parameters(student),
             "student_macs": count_macs(student.eval(), splits.card.input_shape), "images": len(bench.data.train),
             "epochs": arguments.epochs, "views": arguments.views, "validation_images": len(splits.validation),
             "test_images": len(bench.test), "device": str(bench.device), "threads": arguments.threads}
    if arguments.results.exists():
        record = json.loads(arguments.results.read_text())
        if {key: record["setup"][key] for key in setup} != setup:
            raise SystemExit(f"{arguments.results} was made with other settings; give another --results")
    else:
        right = assess(bench.teacher, bench.test, splits.card.preprocessing).correct
        record = {"schema": 1, "setup": {**setup, "teacher_test_correct": right}, "machine": machine(),
                  "versions": versions(), "rows": {}}
    for seed in arguments.seeds:
        for method in [CONTROL, *arguments.methods]:
            if str(seed) not in record["rows"].setdefault(method, {}):
                record["rows"][method][str(seed)] = bench.trained(method, seed)
                write_json(arguments.results, record)
                write_atomically(arguments.results.with_suffix(".md"), table(record).encode())
    print(table(record))


if __name__ == "__main__":
    main()
