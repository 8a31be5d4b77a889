"""Write state dicts, CSV and figures atomically; read CSV and this package's own JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metadata.errors import UserError, first_line
from metadata.files import write_atomically


def write_tensors(path: Path, content: Any) -> None:
    """Write what `torch.save` writes, atomically. A full disk raises OSError and leaves the old file.

    The bytes go through memory because torch's own writer turns a full disk into a RuntimeError without a cause.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows. The header is the union of their keys, in order of appearance."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, buffer.getvalue().encode())


def write_figure(path: Path, figure: Any, dpi: int = 110, svg: bool = False) -> None:
    """Write a matplotlib figure as PNG, and optionally as SVG beside it, atomically. Close the figure.

    The SVG holds no date and no random names: the same figure gives the same bytes.
    """
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    drawing = io.BytesIO()
    if svg:
        figure.set_layout_engine("none")  # the layout is done
        with plt.rc_context({"svg.hashsalt": path.stem}):
            figure.savefig(drawing, format="svg", metadata={"Date": None})
    plt.close(figure)
    write_atomically(path, buffer.getvalue())
    if svg:
        write_atomically(path.with_suffix(".svg"), drawing.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, or [] where there is no file.

    Raises:
        UserError: the file is not text, or not CSV.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: damaged, expected a CSV file ({first_line(error)}); move it away") from error


def packaged_json(name: str) -> dict[str, Any]:
    """Return the content of a JSON file of this package, such as `datasets.json`."""
    content = json.loads((Path(__file__).parent / name).read_text())
    assert isinstance(content, dict)
    return content
