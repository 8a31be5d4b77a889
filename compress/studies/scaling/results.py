"""The files of a study below base_dir/results: one table of all runs, a curve for each run, checkpoints of unfinished runs.

Several processes, on several machines that share the folder, write the table. A process may be killed at any moment.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from metadata.errors import UserError
from metadata.formats import read_csv, write_csv
from metadata.locks import remove_leftovers, waiting_lock

COLUMNS = ("width", "depth", "seed", "batch_size", "N", "D", "epochs", "steps", "C_proxy", "total_flops",
           "final_test_loss_avg_last5", "final_test_acc_avg_last5", "best_test_loss", "best_test_acc",
           "id", "dataset", "test_freq", "status", "message", "seconds")
CURVE = ("epoch", "train_loss", "train_acc", "test_loss", "test_acc")
OVER = ("done", "diverged")  # a repetition would give the same result; failed runs are retried

ResultRow = dict[str, Any]


class BusyError(UserError):
    """Another process runs the point."""


@dataclass(frozen=True)
class Results:
    """The files of a study.

    Args:
        base_dir: the folder of the study; all files are in `results` below it.
    """

    base_dir: Path

    @property
    def folder(self) -> Path:
        """The folder of all files."""
        return self.base_dir / "results"

    @property
    def table(self) -> Path:
        """The table: a row for each run, with the columns COLUMNS."""
        return self.folder / "final_data.csv"

    def curve(self, point: str) -> Path:
        """Return the curve of the run with this id: a row for each measured epoch, with the columns CURVE."""
        return self.folder / "runs" / f"{point}.csv"

    def unfinished(self, point: str) -> Path:
        """Return the folder of an unfinished run."""
        return self.folder / "checkpoints" / point

    def create(self) -> None:
        """Create the folders.

        Raises:
            UserError: base_dir is not a folder, or cannot be written.
        """
        for folder in (self.folder / "runs", self.folder / "checkpoints"):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"base_dir {self.base_dir}: {folder} cannot be made ({error.strerror}); choose another "
                                "--base_dir") from error

    def rows(self) -> dict[str, dict[str, str]]:
        """Return the rows of the table by id, in their order.

        Raises:
            UserError: the file is not a table of runs.
        """
        return _by_id(self.table, read_csv(self.table))

    def record(self, row: Mapping[str, Any]) -> None:
        """Add the row of a run to the table, or replace the row with the same id.

        The whole table is written to a new file and renamed under a lock, and the system frees the lock when its process
        dies. So a process may be killed at any moment: each row is complete or absent, and no row is lost. The row of a
        failed run does not replace the row of a finished run.
        """
        with waiting_lock(self.table):
            remove_leftovers(self.table.parent, self.table.name)  # safe, because this process holds the lock of the table
            rows: dict[str, Mapping[str, Any]] = dict(self.rows())
            before = rows.get(row["id"])
            if before is None or before["status"] not in OVER or row["status"] in OVER:
                rows[row["id"]] = {**dict.fromkeys(COLUMNS, ""), **row}
                write_csv(self.table, [dict(content) for content in rows.values()])

    @contextmanager
    def claimed(self, point: str, patience_seconds: float = 0.0) -> Iterator[None]:
        """Reserve the run with this id for this process; the system frees the run when the process ends, even if killed.

        Each id locks one byte of a single lock file, so that finished runs leave no files. A process can hold one run.

        Raises:
            BusyError: another process still holds the run after `patience_seconds`.
        """
        place = int.from_bytes(hashlib.sha256(point.encode()).digest()[:5], "big")
        deadline = time.monotonic() + patience_seconds
        with (self.folder / ".points.lock").open("a") as lock:
            while not _locked_byte(lock, place):
                if time.monotonic() > deadline:
                    raise BusyError(f"{point}: another process is running it on {self.folder}; wait until it ends")
                time.sleep(0.5)
            yield

    def forget_progress(self, point: str) -> None:
        """Remove the files that a finished run no longer needs."""
        shutil.rmtree(self.unfinished(point), ignore_errors=True)


def _by_id(path: Path, rows: list[dict[str, str]]) -> dict[str, dict[str, str]]:
    for number, row in enumerate(rows, start=2):
        if missing := [key for key in ("id", "status") if row.get(key) is None]:
            raise UserError(f"{path} line {number}: expected a table of runs with the columns id and status, {missing[0]} "
                            "is missing; move the file away, or choose another --base_dir")
        if None in row:
            raise UserError(f"{path} line {number}: more cells than the header has columns; correct the line, or move the "
                            "file away")
    return {row["id"]: row for row in rows}


def _locked_byte(lock: IO[str], place: int) -> bool:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except (BlockingIOError, PermissionError):  # systems use either to say that another process holds the lock
        return False
    return True
