"""The files of a study below base_dir/results: one table of all runs, a curve a run, checkpoints of those under way.

Several processes, on several machines that share the folder, write the table; a process may be killed at any moment.
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
OVER = ("done", "diverged")  # the same configuration would come to the same; what failed is tried again

ResultRow = dict[str, Any]


class BusyError(UserError):
    """Another process is working on the point."""


@dataclass(frozen=True)
class Results:
    """Where a study's files are.

    Args:
        base_dir: the study's folder; everything is in `results` below it.
    """

    base_dir: Path

    @property
    def folder(self) -> Path:
        """Of all of them."""
        return self.base_dir / "results"

    @property
    def table(self) -> Path:
        """A row a run, in the columns COLUMNS."""
        return self.folder / "final_data.csv"

    def curve(self, point: str) -> Path:
        """A row a measured epoch of the run with this id, in the columns CURVE."""
        return self.folder / "runs" / f"{point}.csv"

    def unfinished(self, point: str) -> Path:
        """The folder of a run that is not over."""
        return self.folder / "checkpoints" / point

    def create(self) -> None:
        """Makes the folders.

        Raises:
            UserError: base_dir is no folder or cannot be written.
        """
        for folder in (self.folder / "runs", self.folder / "checkpoints"):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"base_dir {self.base_dir}: {folder} cannot be made ({error.strerror}); choose another "
                                "--base_dir") from error

    def rows(self) -> dict[str, dict[str, str]]:
        """The table's rows by id, in their order.

        Raises:
            UserError: the file is no table of this kind.
        """
        return _by_id(self.table, read_csv(self.table))

    def record(self, row: Mapping[str, Any]) -> None:
        """Adds a run's row to the table, or puts it in the place of the one with its id.

        The whole table is written anew and takes the old one's place at once, while a lock is held that the system takes
        from a process that dies: whoever is killed whenever, each row is there whole or not at all, and none is lost.
        A row that says that a run failed does not replace one that says how it ended.
        """
        with waiting_lock(self.table):
            remove_leftovers(self.table.parent, self.table.name)  # alone: the lock is the table's
            rows: dict[str, Mapping[str, Any]] = dict(self.rows())
            before = rows.get(row["id"])
            if before is None or before["status"] not in OVER or row["status"] in OVER:
                rows[row["id"]] = {**dict.fromkeys(COLUMNS, ""), **row}
                write_csv(self.table, [dict(content) for content in rows.values()])

    @contextmanager
    def claimed(self, point: str, patience_seconds: float = 0.0) -> Iterator[None]:
        """The run with this id for this process alone; free again when the process ends, however it does.

        A byte of one lock file stands for an id, so that no files of finished runs are left. A process can hold one run.

        Raises:
            BusyError: another process held it for so many seconds.
        """
        place = int.from_bytes(hashlib.sha256(point.encode()).digest()[:5], "big")
        deadline = time.monotonic() + patience_seconds
        with (self.folder / ".points.lock").open("a") as lock:
            while not _locked_byte(lock, place):
                if time.monotonic() > deadline:
                    raise BusyError(f"{point}: another process is running it on {self.folder}; wait for it")
                time.sleep(0.5)
            yield

    def forget_progress(self, point: str) -> None:
        """Removes what a run that is over does not need any more."""
        shutil.rmtree(self.unfinished(point), ignore_errors=True)


def _by_id(path: Path, rows: list[dict[str, str]]) -> dict[str, dict[str, str]]:
    for number, row in enumerate(rows, start=2):
        if missing := [key for key in ("id", "status") if row.get(key) is None]:
            raise UserError(f"{path} line {number}: expected a table of runs with the columns id and status, {missing[0]} "
                            "is missing; move the file away, or choose another --base_dir")
        if None in row:
            raise UserError(f"{path} line {number}: more cells than the header has columns; mend the line, or move the "
                            "file away")
    return {row["id"]: row for row in rows}


def _locked_byte(lock: IO[str], place: int) -> bool:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except (BlockingIOError, PermissionError):  # both are how a system says that another process holds it
        return False
    return True
