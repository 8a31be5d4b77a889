"""Run a plan: skip finished points, start with the longest, and record a failed point as a row like any other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from compress.studies.scaling import experiment, images as study_images
from compress.studies.scaling.images import StudyImages
from compress.studies.scaling.plans import SweepPlan, Point
from compress.studies.scaling.results import BusyError, OVER, Results, ResultRow
from compress.training.workers import Report, TaskOutcome, run_local, run_ray
from compress.training.trackers import Advance, Tracker
from loaders.catalog import set_name
from metadata.errors import UserError
from metadata.machine import usable_cores

PATIENCE_SECONDS = 300.0  # on Ray: time for the process of a lost machine to end


@dataclass(frozen=True, kw_only=True)
class PointTask:
    """A point and its paths, as sent to a worker process."""

    point: Point
    base_dir: Path
    images_folder: Path
    device: str
    checkpoint_seconds: float = 20.0
    patience_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Study:
    """An opened plan: its points, in the order of the plan, and its images."""

    plan: SweepPlan
    results: Results
    images_folder: Path
    images: StudyImages
    points: list[Point]

    def task(self, point: Point) -> PointTask:
        """Return the task of a point."""
        return PointTask(point=point, base_dir=self.plan.base_dir.resolve(), images_folder=self.images_folder.resolve(),
                         device=self.plan.device, checkpoint_seconds=self.plan.checkpoint_seconds)

    def states(self) -> dict[str, str]:
        """Return the state of each point by id: done, diverged, failed, begun or to do."""
        rows = self.results.rows()

        def state(point: Point) -> str:
            if point.id in rows:
                return rows[point.id]["status"]
            return "begun" if (self.results.unfinished(point.id) / experiment.CHECKPOINT).is_file() else "to do"
        return {point.id: state(point) for point in self.points}

    def cost(self, point: Point) -> float:
        """Return the approximate time of a point in arbitrary units; narrow networks take longer than their FLOPs say."""
        work = experiment.total_flops(point, self.images) + experiment.measuring_flops(point, self.images)
        return work * (1 + 16 / point.width)


def open_study(plan: SweepPlan, console: Console) -> Study:
    """Decode the images if necessary, and expand the plan; find every mistake in it.

    Raises:
        UserError: an unknown or missing data set, a base_dir that cannot be written, more images than the set has, an
            unavailable device, or a constant compute that no number of epochs meets.
    """
    experiment.chosen_device(plan.device)
    plan = plan.changed(dataset=set_name(plan.dataset))
    results = Results(plan.base_dir)
    results.create()
    results.rows()  # finds a damaged table now
    folder = study_images.prepare_images(results, plan.dataset, plan.data_root, plan.download, Tracker(console))
    images = study_images.read(folder)
    points = plan.points(lambda width, depth: experiment.parameters_of(width, depth, images))
    for point in points:
        images.check_size(point.dataset_size)
    return Study(plan=plan, results=results, images_folder=folder, images=images, points=points)


def check_workers(workers: int | None, device: str) -> int:
    """Return the number of worker processes: the given number, else one a core, or one on a GPU.

    Raises:
        UserError: fewer than one, or an unavailable device.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: expected 1 or more")
    on_gpu = experiment.chosen_device(device).type == "cuda"
    return workers or (1 if on_gpu else usable_cores())


# ------------------------------------------------------------------------------------------------------------ sweep


def run_sweep(plan: SweepPlan, console: Console, workers: int | None = None, ray: str | None = None) -> list[ResultRow]:
    """Run the unfinished points of a plan, and return the rows of all points that have one.

    Args:
        plan: the plan.
        console: progress is printed here.
        workers: processes on this machine; None: one a core, or one on a GPU.
        ray: the address of a Ray cluster, or "local", instead of processes.

    Raises:
        UserError: see `open_study`; fewer than one worker, both workers and Ray, Ray not installed, or no cluster.
        BusyError: another sweep still runs some of the points.
    """
    if workers is not None and ray is not None:
        raise UserError("--workers and --ray: pass one of them; a Ray cluster has its own processes")
    workers = check_workers(workers, plan.device)
    study = open_study(plan, console)
    states = study.states()
    left = sorted((point for point in study.points if states[point.id] not in OVER), key=study.cost, reverse=True)
    console.print(f"{len(study.points)} points, {len(study.points) - len(left)} of them finished before; results in "
                  f"{study.results.folder}", highlight=False, soft_wrap=True)
    if left:
        tasks = [study.task(point) for point in left]
        with _Board(study, left, console).shown() as board:
            if ray is not None:
                waiting = [replace(task, patience_seconds=PATIENCE_SECONDS) for task in tasks]
                on_gpu = None if plan.device == "auto" else plan.device == "cuda"
                run_ray(work, waiting, ray, board.outcome, on_gpu)
            else:
                run_local(work, tasks, workers, board.outcome, board.progress)
    rows = study.results.rows()
    mine: list[ResultRow] = [dict(rows[point.id]) for point in study.points if point.id in rows]
    print_rows(console, mine)
    if left and board.busy:
        raise BusyError(f"{len(board.busy)} of {len(study.points)} points are still run by another sweep in "
                        f"{study.results.folder}; wait for it, then run this command again")
    return mine


def work(task: PointTask, report: Report) -> ResultRow:
    """Run a point in a worker process; return the status busy if another process runs the same point."""
    try:
        return experiment.run_point(task.point, Results(task.base_dir), task.images_folder,
                                    experiment.chosen_device(task.device), _Reporting(Console(quiet=True), report=report),
                                    task.checkpoint_seconds, task.patience_seconds)
    except BusyError as error:
        return {"id": task.point.id, "status": "busy", "message": str(error)}


@dataclass
class _Reporting(Tracker):
    """A tracker that reports the fraction of the training that is done."""

    report: Report = field(default=lambda share: None)

    @contextmanager
    def progress(self, what: str, unit: str = "images") -> Iterator[Advance]:
        """Yield a function that reports to the parent process."""
        def advance(done: int, total: int, note: str = "") -> None:
            self.report(done / max(total, 1))
        yield advance


class _Board:
    """The display of a sweep: a line for each finished point and, on a terminal, a bar with the time left."""

    def __init__(self, study: Study, points: Sequence[Point], console: Console) -> None:
        self.study, self.console, self.count = study, console, len(points)
        self.costs = {point.id: study.cost(point) for point in points}
        self.total = sum(self.costs.values())
        self.shares: dict[str, float] = dict.fromkeys(self.costs, 0.0)
        self.over = 0
        self.busy: list[Point] = []  # run by another sweep
        self.start = time.monotonic()
        self.bars = Progress(TextColumn("{task.fields[points]}"), BarColumn(24), TextColumn("{task.percentage:>3.0f} %"),
                             TimeRemainingColumn(), TextColumn("left"), console=console, transient=True,
                             speed_estimate_period=600)

    @contextmanager
    def shown(self) -> Iterator[_Board]:
        """Show the bar within the block."""
        self.bar = self.bars.add_task("sweep", total=1.0, points=f"0/{self.count} points")
        if not self.console.is_terminal:
            yield self
            return
        with self.bars:
            yield self

    def progress(self, task: PointTask, share: float) -> None:
        """Take the progress of a point."""
        self.shares[task.point.id] = share
        self._update()

    def outcome(self, outcome: TaskOutcome[PointTask, ResultRow]) -> None:
        """Take the outcome of a point: record a row if the point failed, and print a line."""
        point = outcome.task.point
        row = outcome.result
        if row is None:
            row = {**experiment.facts(point, self.study.images), "status": "failed", "message": outcome.failure}
            self.study.results.record(row)
        self.over += 1
        self.shares[point.id] = 1.0
        self._update()
        if row["status"] == "busy":
            self.busy.append(point)
        name = f"{point.shape} seed {point.seed}"
        if row["status"] == "done":
            text = (f"test loss {float(row['final_test_loss_avg_last5']):.4f}, accuracy "
                    f"{float(row['final_test_acc_avg_last5']):.2%}, {float(row['seconds']):.0f} s")
        else:
            text = f"{row['status']}: {row['message']}"
        self.console.print(f"{self.over}/{self.count} {name}: {text}{self._left()}", highlight=False, soft_wrap=True,
                           style="" if row["status"] == "done" else "bold red")

    def _share(self) -> float:
        return sum(self.costs[name] * share for name, share in self.shares.items()) / self.total

    def _update(self) -> None:
        self.bars.update(self.bar, completed=self._share(), points=f"{self.over}/{self.count} points")

    def _left(self) -> str:
        if self.console.is_terminal or self.over == self.count:
            return ""
        seconds = (time.monotonic() - self.start) * (1 / self._share() - 1)
        return f"; about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """Format a duration, such as 45 s, 12 min or 1 h 05 min."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 60 else (
        f"{minutes // 60} h {minutes % 60:02d} min")


def print_rows(console: Console, rows: Sequence[ResultRow]) -> None:
    """Print a line for each configuration with the mean over its seeds, then the failed and diverged runs."""
    groups: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in rows:
        if row["status"] == "done":
            groups.setdefault(tuple(row[key] for key in ("width", "depth", "N", "D", "epochs")), []).append(row)
    table = Table(title="means over seeds; final: the last five measured epochs", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("width", "depth", "N", "D", "epochs", "seeds", "final test loss", "deviation", "final test accuracy"):
        table.add_column(name, justify="right")
    for key, group in groups.items():
        losses = [float(row["final_test_loss_avg_last5"]) for row in group]
        accuracy = statistics.mean(float(row["final_test_acc_avg_last5"]) for row in group)
        table.add_row(*(f"{int(part):,}" for part in key), str(len(group)), f"{statistics.mean(losses):.4f}",
                      f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "", f"{accuracy:.2%}")
    if groups:
        console.print(table)
    for row in rows:
        if row["status"] != "done":
            console.print(f"{row['status']}: {row['id']}: {row['message']}", style="bold red", highlight=False,
                          soft_wrap=True)
