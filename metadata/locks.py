"""Folders and files for one process alone, and folders that appear complete or not at all."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metadata.errors import UserError


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Removes the temporary files and folders that `write_atomically` and `appearing` left where SIGKILL cut them short.

    Args:
        folder: where nobody else is writing what is removed; the caller holds the lock.
        name: what the names of those that were being written begin with; all unless given.
    """
    for leftover in folder.glob(f".{name}*.part"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill, which takes its place as `folder` when it is complete, or else disappears.

    Args:
        folder: is not there yet; its parents are made. One process at a time writes it.
    """
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)  # of a write that SIGKILL cut short
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def locked(folder: Path, advice: str) -> Iterator[None]:
    """A folder for this process alone.

    Raises:
        UserError: another process holds it; `advice` says what else to do.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is running it; wait for it, or {advice}") from error
        yield


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """A file or folder for this process alone; waits for those that have it. A process that dies lets go."""
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
