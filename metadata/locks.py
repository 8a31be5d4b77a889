"""Lock folders and files for one process, and write folders that appear complete or not at all."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metadata.errors import UserError


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove the temporary files and folders of `write_atomically` and `appearing` calls that SIGKILL interrupted.

    Args:
        folder: the caller holds its lock, so that no other process is writing in it.
        name: the start of the names that were being written; all names unless given.
    """
    for leftover in folder.glob(f".{name}*.part"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill. It is renamed to `folder` at the end of the block, or removed after an exception.

    Args:
        folder: does not exist yet; its parents are made. One process at a time writes it.
    """
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)  # left by a write that SIGKILL interrupted
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def locked(folder: Path, advice: str) -> Iterator[None]:
    """Lock a folder for this process.

    Raises:
        UserError: another process holds the lock; `advice` says what to do instead of waiting.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is using this folder; wait until it ends, or {advice}") from error
        yield


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Lock a file or folder for this process; wait for other holders. A process that dies releases its locks."""
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
