"""The speed of sweeps: two workers against one, and the time of a point against the time of its training loop alone.

    python -m benchmarks.scaling_speed --cifar10 DIR --output benchmarks/results/scaling_speed.json

The sides of a comparison are interleaved, so that a slow moment of the machine affects both. Ratios are ratios of medians.
The throughput of a sweep counts from the moment when all its processes have finished a first small point, and so have
imported torch. One worker uses all cores through threads; it is measured twice, with both cores and restricted to one. The
memory bandwidth is measured too, because the training of small networks is limited by memory, which the processes share.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.spread import spread
from compress.studies.scaling import experiment, images as study_images
from compress.studies.scaling.images import StudyImages
from compress.studies.scaling.plans import Point
from compress.studies.scaling.results import Results, ResultRow
from compress.studies.scaling.sweep import PointTask, work
from compress.training.workers import TaskOutcome, run_local
from compress.training.distillation import cross_entropy
from compress.training.loop import train
from compress.training.malloc import keep_freed_memory
from compress.training.trackers import Tracker
from metadata.errors import UserError
from metadata.files import write_json
from metadata.machine import machine, versions

CPU = torch.device("cpu")


def throughput(workers: int, points: Sequence[Point], base_dir: Path, images_folder: Path) -> float:
    """Return the training images a second of a sweep over equal points, by worker processes that share the cores."""
    first = [points[0].model_copy(update={"seed": 1000 + number, "dataset_size": 256, "num_epochs": 1})
             for number in range(workers)]
    ends: list[float] = []

    def ended(outcome: TaskOutcome[PointTask, ResultRow]) -> None:
        if outcome.result is None:
            raise UserError(f"{outcome.task.point.id}: {outcome.failure}")
        ends.append(time.perf_counter())

    tasks = [PointTask(point=point, base_dir=base_dir, images_folder=images_folder, device="cpu")
             for point in (*first, *points)]
    run_local(work, tasks, workers, ended)
    images = sum(point.dataset_size * point.num_epochs for point in points)
    return images / (ends[-1] - ends[workers - 1])


COPYING = """
import time, torch
torch.set_num_threads(1)
source, target = torch.ones(2**24), torch.ones(2**24)
target.copy_(source)
input()
start, count = time.perf_counter(), 0
while time.perf_counter() - start < 2:
    target.copy_(source)
    count += 1
print(count * 2 * source.nbytes / (time.perf_counter() - start) / 1e9)
"""


def copied_gigabytes(processes: int) -> float:
    """Return the gigabytes a second, read and written, that single-threaded processes copy together."""
    team = [subprocess.Popen([sys.executable, "-c", COPYING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(processes)]
    time.sleep(8)  # time for all processes to import torch
    for process in team:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in team)


def by_point(point: Point, base_dir: Path, images_folder: Path) -> float:
    """Return the images a second of a whole point: opening images, subset, training, measuring, files."""
    started = time.perf_counter()
    experiment.run_point(point, Results(base_dir), images_folder, CPU, Tracker(Console(quiet=True)))
    return point.dataset_size * point.num_epochs / (time.perf_counter() - started)


def by_engine(point: Point, images: StudyImages) -> float:
    """Return the images a second of the training loop alone, with the same settings, network, data and measurements."""
    data, model = experiment.data_of(point, images, CPU), experiment.network(point, images)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        train(model, data, cross_entropy(0.0), point.training, label="engine", seed=point.seed,
              device=CPU, checkpoint=Path(folder) / "checkpoint.pth", tracker=Tracker(Console(quiet=True)))
        return point.dataset_size * point.num_epochs / (time.perf_counter() - started)


def summary(sides: dict[str, list[float]]) -> dict[str, Any]:
    """Return medians and ranges in images/s, and the ratios of the first side to the others."""
    first, *others = (statistics.median(values) for values in sides.values())
    ratios = {name: round(first / other, 3) for name, other in zip(list(sides)[1:], others, strict=True)}
    return {**{name: spread(values) for name, values in sides.items()}, "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, help="CIFAR-10; default: the digits")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--dataset_size", type=int, default=5000)
    parser.add_argument("--num_epochs", type=int, default=4)
    parser.add_argument("--points", type=int, default=4, help="points of a sweep; a multiple of two")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    keep_freed_memory()
    dataset = "cifar10" if arguments.cifar10 else "digits"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        results = Results(Path(folder))
        results.create()
        images_folder = study_images.prepare_images(results, dataset, arguments.cifar10, False, Tracker(Console()))
        images = study_images.read(images_folder)
        for width in arguments.widths:
            point = Point(dataset=dataset, batch_size=128, width=width, depth=1, dataset_size=arguments.dataset_size,
                          num_epochs=arguments.num_epochs, test_freq=arguments.num_epochs)
            images.check_size(point.dataset_size)
            points = [point.model_copy(update={"seed": seed}) for seed in range(arguments.points)]
            sweeps: dict[str, list[float]] = {"two workers": [], "one worker on both cores": [],
                                              "one worker on one core": []}
            alone: dict[str, list[float]] = {"point": [], "engine": []}
            for turn in range(arguments.rounds + 1):  # the first round is a warm-up and does not count
                for side, (workers, held, values) in enumerate(zip((2, 1, 1), (cores, cores, cores[:1]), sweeps.values(),
                                                                   strict=True)):
                    base = Path(folder) / f"{width}-{turn}-{side}"
                    Results(base).create()
                    os.sched_setaffinity(0, held)
                    values.append(throughput(workers, points[:len(held) * len(points) // 2], base, images_folder))
                    os.sched_setaffinity(0, cores)
                base = Path(folder) / f"{width}-{turn}"
                Results(base).create()
                seeded = point.model_copy(update={"seed": turn})
                pair = (by_point(seeded, base, images_folder), by_engine(seeded, images))
                for values, value in zip(alone.values(), pair, strict=True):
                    values.append(value)
            for values in (*sweeps.values(), *alone.values()):
                del values[0]
            found[f"width {width}"] = {"sweep": summary(sweeps), "one point": summary(alone)}
            print(f"width {width}: two workers to {found[f'width {width}']['sweep']['ratio']}; a point to "
                  f"{found[f'width {width}']['one point']['ratio']}", flush=True)
    copied = {processes: [copied_gigabytes(processes) for _ in range(3)] for processes in (1, 2)}
    write_json(arguments.output, {
        "schema": 1, "unit": "training images/s", "dataset": dataset, "dataset_size": arguments.dataset_size,
        "num_epochs": arguments.num_epochs, "points": arguments.points, "cores": len(cores), "results": found,
        "memory_gigabytes_per_second": {f"{count} processes": spread(values) for count, values in copied.items()},
        "machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main()
