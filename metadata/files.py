"""Reading and writing the project's files: JSON, state dicts and CSV, atomically, with errors that name file and key."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model_loader import UserError, first_line, write_atomically, write_json

__all__ = ["appearing", "locked", "packaged_json", "read_csv", "remove_leftovers", "waiting_lock", "write_atomically",
           "write_csv", "write_figure", "write_json", "write_tensors"]


def write_tensors(path: Path, content: Any) -> None:
    """`torch.save`, atomically; a full disk raises OSError and leaves what was there.

    The bytes pass through memory because torch's own writer turns a full disk into a RuntimeError without a cause.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows with the union of their keys, in order of appearance, as the header."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, buffer.getvalue().encode())


def write_figure(path: Path, figure: Any, dpi: int = 110, svg: bool = False) -> None:
    """A matplotlib figure as PNG, and as SVG beside it if wanted, atomically; the figure is closed.

    The SVG carries no date and no random names: the same figure gives the same bytes.
    """
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    drawing = io.BytesIO()
    if svg:
        figure.set_layout_engine("none")  # it has been laid out
        with plt.rc_context({"svg.hashsalt": path.stem}):
            figure.savefig(drawing, format="svg", metadata={"Date": None})
    plt.close(figure)
    write_atomically(path, buffer.getvalue())
    if svg:
        write_atomically(path.with_suffix(".svg"), drawing.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, or none where there is no file.

    Raises:
        UserError: it is no text, or no CSV.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: damaged, expected a CSV file ({first_line(error)}); move it away") from error


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


def packaged_json(name: str) -> dict[str, Any]:
    """A JSON file of this package, such as `datasets.json`."""
    content = json.loads((Path(__file__).parent / name).read_text())
    assert isinstance(content, dict)
    return content
