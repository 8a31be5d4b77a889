"""Write state dicts, CSV and figures atomically; read CSV and this package's own JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metadata.errors import UserError, first_line
from metadata.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(path: Path, content: Any) -> None:
    """Write what `torch.save` writes, atomically. A full disk raises OSError and leaves the old file.

    The bytes go through memory because torch's own writer turns a full disk into a RuntimeError without a cause.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a state dict as `torch.save` does, in fewer bytes (see `in_one_storage_a_type`), atomically."""
    write_tensors(path, in_one_storage_a_type(weights))


def in_one_storage_a_type(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors as parts of one storage for each type of number.

    A file of `torch.save` spends some 330 bytes on each storage: names, headers, and zeros up to a multiple of 64 bytes.
    `torch.load` gives the same tensors. Tensors that share their numbers (tied weights) go on doing so. Tensors that are
    not plain (sparse, quantized) stay as they are.
    """
    import torch

    places = {name: (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
              for name, tensor in weights.items() if tensor.layout == torch.strided and not tensor.is_quantized}
    plain = {place: weights[name] for name, place in places.items()}
    joined: dict[tuple[Any, ...], Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in plain.values()):
        of_type = {place: tensor.detach() for place, tensor in plain.items() if tensor.dtype == dtype}
        storage = torch.cat([tensor.reshape(-1) for tensor in of_type.values()])
        parts = storage.split([tensor.numel() for tensor in of_type.values()])
        joined |= {place: part.view(tensor.shape) for (place, tensor), part in zip(of_type.items(), parts, strict=True)}
    return {name: joined[places[name]] if name in places else tensor for name, tensor in weights.items()}


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
