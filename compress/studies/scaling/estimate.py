"""Estimate a plan before it runs: print its points, their states, and the time that the unfinished points will take."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from compress.studies.scaling import experiment, images as study_images
from compress.studies.scaling.images import StudyImages
from compress.studies.scaling.plans import SweepPlan, Point
from compress.studies.scaling.results import OVER
from compress.studies.scaling.sweep import Study, PointTask, check_workers, duration, open_study
from compress.training.workers import Report, TaskOutcome, run_local
from compress.training.assessment import assess
from compress.training.distillation import cross_entropy
from compress.training.loop import train
from compress.training.malloc import keep_freed_memory
from compress.training.trackers import Tracker
from metadata.errors import UserError

TRIAL_IMAGES, TRIAL_SECONDS = 2048, 0.5  # of a calibration; a shorter one is repeated with more epochs


@dataclass(frozen=True)
class Speed:
    """Images a second of one worker, in training and in measuring the test split."""

    training: float
    measuring: float


TrialShape = tuple[int, int, int]  # width, depth, batch_size


def estimate(plan: SweepPlan, console: Console, workers: int | None = None) -> tuple[Study, dict[str, float]]:
    """Print the points of a plan with their states and times, and return the times.

    The times come from training each network for a few steps, in as many processes at once as the sweep will have. The
    folders of the study are created, and the decoded images stay there for the sweep. No run is started.

    Returns:
        The study, and the seconds of one worker by the ids of the unfinished points.

    Raises:
        UserError: see `open_study`; fewer than one worker.
    """
    study = open_study(plan, console)
    workers = check_workers(workers, plan.device)
    states = study.states()
    left = [point for point in study.points if states[point.id] not in OVER]
    kinds = {_trial_shape(point): point for point in left}
    speeds: dict[TrialShape, Speed] = {}
    failures = []

    def take(outcome: TaskOutcome[PointTask, Speed]) -> None:
        if outcome.result is None:
            failures.append(f"{outcome.task.point.shape}: {outcome.failure}")
        else:
            speeds[_trial_shape(outcome.task.point)] = outcome.result

    if kinds:
        run_local(calibrate, [study.task(point) for point in kinds.values()], workers, take)
    if failures:
        raise UserError(f"calibration of {failures[0]}")
    seconds = {point.id: _seconds(point, study.images, speeds[_trial_shape(point)]) for point in left}
    _print_plan(console, study, states, seconds)
    if seconds:
        whole = max(sum(seconds.values()) / workers, max(seconds.values()))
        console.print(f"about {duration(whole)} with --workers {workers} (from {len(speeds)} trials of a few steps)",
                      highlight=False)
    return study, seconds


def calibrate(task: PointTask, report: Report) -> Speed:
    """Train the network of a point for a few steps with the real training loop, and measure it on a few test images."""
    keep_freed_memory()
    images, device = study_images.read(task.images_folder), experiment.chosen_device(task.device)
    size = min(len(images.train), max(TRIAL_IMAGES, 4 * task.point.batch_size))
    trial = task.point.model_copy(update={
        "dataset_size": size, "num_epochs": 2, "batch_size": _trial_shape(task.point)[2]})
    model, data = experiment.network(trial, images), experiment.data_of(trial, images, device)
    seen = _Speeds(Console(quiet=True))
    settings = trial.training.model_copy(update={"checkpoint_seconds": 1e9})
    unmeasured = replace(data, validation=study_images.taken(data.validation, torch.arange(0)))
    with tempfile.TemporaryDirectory() as folder:
        for epochs in (2, 8):
            seen.speeds.clear()
            train(model, unmeasured, cross_entropy(0.0), settings.model_copy(update={"epochs": epochs}), label="trial",
                  seed=0, device=device, checkpoint=Path(folder) / f"{epochs}.pth", tracker=seen)
            if sum(size / speed for speed in seen.speeds) > TRIAL_SECONDS:
                break
    test = study_images.taken(data.validation, torch.arange(min(len(data.validation), 1000)))
    times = []
    for _ in range(2):
        started = time.perf_counter()
        assess(model, test, data.preprocessing)
        times.append(time.perf_counter() - started)
    return Speed(statistics.median(seen.speeds[1:]), len(test) / times[-1])


@dataclass
class _Speeds(Tracker):
    """A tracker that keeps the images a second of each epoch; the first epoch is slower, while kernels are chosen."""

    speeds: list[float] = field(default_factory=list)

    def epoch(self, label: str, **metrics: Any) -> None:
        """Keep the speed of an epoch."""
        self.speeds.append(metrics["images_per_second"])


def _trial_shape(point: Point) -> TrialShape:
    return point.width, point.depth, min(point.batch_size, point.dataset_size)


def _seconds(point: Point, images: StudyImages, speed: Speed) -> float:
    looks = point.training.measurements()
    return point.dataset_size * point.num_epochs / speed.training + looks * len(images.test) / speed.measuring


def _print_plan(console: Console, study: Study, states: dict[str, str], seconds: dict[str, float]) -> None:
    """Print a line for each configuration: its sizes, the states of its seeds and their total time."""
    groups: dict[str, list[Point]] = {}
    for point in study.points:
        groups.setdefault(f"{point.shape} {point.batch_size} {point.test_freq}", []).append(point)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("width", "depth", "N", "D", "epochs", "C = N D epochs", "batch", "seeds", "state", "time of one worker"):
        table.add_column(name, justify="left" if name in ("seeds", "state") else "right")
    for points in groups.values():
        first = points[0]
        row = experiment.facts(first, study.images)
        found = [states[point.id] for point in points]
        table.add_row(str(first.width), str(first.depth), f"{row['N']:,}", f"{row['D']:,}", str(row["epochs"]),
                      f"{row['C_proxy']:.2e}", str(first.batch_size), ",".join(str(point.seed) for point in points),
                      ", ".join(f"{found.count(state)} {state}" for state in dict.fromkeys(found)),
                      duration(sum(seconds.get(point.id, 0.0) for point in points)))
    console.print(table)
