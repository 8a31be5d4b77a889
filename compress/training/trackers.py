"""Progress: bars with the time left on a terminal, and a line now and then where the output is a file.

Metrics go to `metrics.csv` (all epochs of all trainings of a stage), from which curves can be drawn later.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from compress.training.loggers import Logger
from metadata.errors import UserError
from metadata.formats import read_csv, write_csv


class Advance(Protocol):
    """Shows how far the work is; `note` stands beside the bar."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


QUIET_SECONDS = 10.0  # between lines where the output is a file


def terminal() -> Console:
    """Return the console that the verbs print on; a file or a pipe gets lines of 120 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


@dataclass
class Tracker:
    """Shows progress on a console and keeps a stage's metrics.

    Args:
        console: where progress is shown.
        folder: where `metrics.csv` is written; None writes nothing.
        loggers: take the metrics too.
    """

    console: Console
    folder: Path | None = None
    loggers: list[Logger] = field(default_factory=list)
    _rows: list[dict[str, Any]] = field(default_factory=list, init=False)

    @contextmanager
    def progress(self, what: str, unit: str = "images") -> Iterator[Advance]:
        """Yield `advance(done, total)`, which moves a bar on a terminal and prints a line now and then elsewhere."""
        if not self.console.is_terminal:
            lines = _Lines(self.console, what, unit)
            yield lines
            lines.over = True
            return
        columns = (TextColumn("{task.description}"), BarColumn(16), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"),
                   TimeRemainingColumn(), TextColumn("left  {task.fields[note]}"))  # fits 80 columns but for the note
        with Progress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(what, total=None, unit=unit, note="")

            def advance(done: int, total: int, note: str = "") -> None:
                bars.update(task, completed=done, total=total, note="  ".join(filter(None, (note, self._last_note()))))

            yield advance

    def start(self, label: str, done_epochs: int) -> None:
        """Begin or continue the training `label`; drop the rows of epochs that will run again."""
        if self.folder:
            old = read_csv(self.folder / "metrics.csv")
            try:
                self._rows = [row for row in old if row["training"] != label or int(row["epoch"]) <= done_epochs]
            except (LookupError, ValueError, TypeError) as error:
                raise UserError(f"{self.folder / 'metrics.csv'}: not the metrics of a training; move it away") from error
        for logger in self.loggers:
            logger.start(done_epochs)

    def epoch(self, label: str, **metrics: Any) -> None:
        """Add the row of an epoch to metrics.csv."""
        self._rows.append({"training": label, **metrics})
        if self.folder:
            write_csv(self.folder / "metrics.csv", self._rows)
        for logger in self.loggers:
            logger.log(metrics["epoch"], {key: value for key, value in metrics.items() if key != "epoch"})

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.console.print(f"warning: {text}", style="bold red", highlight=False, soft_wrap=True)

    def _last_note(self) -> str:
        if not self._rows:
            return ""
        row = self._rows[-1]
        return f"epoch {row['epoch']}: {float(row.get('validation_accuracy') or row['train_accuracy']):.1%}"


class _Lines:
    """Progress for logs: what is done, how far, and the time left; one line in QUIET_SECONDS at most."""

    def __init__(self, console: Console, what: str, unit: str) -> None:
        self.console, self.what, self.unit = console, what, unit
        self.start = self.last = time.monotonic()
        self.first: int | None = None
        self.over = False  # a test split is read through the same function long after the others

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = done  # a resumed training does not start at 0
        if now - self.last >= QUIET_SECONDS and done > self.first and not self.over:
            self.last = now
            left = (now - self.start) / (done - self.first) * (total - done)
            self.console.print(f"  {self.what}: {done}/{total} {self.unit}, {left:.0f} s left"
                               f"{', ' + note if note else ''}", highlight=False)
