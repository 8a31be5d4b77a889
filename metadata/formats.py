"""Write state dicts, CSV and figures atomically; read CSV and this package's own JSON."""

from __future__ import annotations

import csv
import io
import json
import pickletools
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metadata.errors import UserError, first_line
from metadata.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

# Of the files of torch.save: what readers need beside the numbers, and what the numbers' places are multiples of.
NEEDED, ALIGNMENT = ("data.pkl", "byteorder", "version"), 64
LOCAL_BYTES = 30  # of a zip entry's own header, without its name
LARGE_BYTES = 2**26  # from which on a few kB do not matter


def write_tensors(path: Path, content: Any) -> None:
    """Write what `torch.save` writes, atomically. A full disk raises OSError and leaves the old file.

    The bytes go through memory because torch's own writer turns a full disk into a RuntimeError without a cause.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a state dict so that `torch.load` reads it, in few bytes (see `weights_content`), atomically."""
    write_atomically(path, weights_content(weights))


def weights_content(weights: Mapping[str, Tensor]) -> bytes | memoryview:
    """Return a state dict as a file that `torch.load` reads, without the bytes that `torch.save` spends on its own form.

    Tensors lie in one storage for each type of number (see `in_one_storage_a_type`). Scales and biases of a network with
    int8 weights are float16 where that holds their numbers exactly; `Module.load_state_dict` makes them float32 again. Of
    the archive, what `torch.load` does not read is left out.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(in_one_storage_a_type(narrowed(weights)), buffer)
    return buffer.getbuffer() if buffer.tell() > LARGE_BYTES else _without_the_rest(buffer)


def narrowed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in which, beside int8 weights, float32 tensors are float16 where that changes no number."""
    import torch

    if not any(tensor.dtype == torch.int8 for tensor in weights.values()):
        return dict(weights)
    halves: dict[tuple[Any, ...], Tensor] = {}  # by place: tied tensors stay tied
    for tensor in weights.values():
        if tensor.dtype == torch.float32 and (place := _place(tensor)) and place not in halves and (
                torch.equal((half := tensor.half()).float(), tensor)):
            halves[place] = half
    return {name: halves.get(_place(tensor), tensor) for name, tensor in weights.items()}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tells a tensor's numbers from those of others, empty for one that is not plain (sparse, quantized).

    Views of one memory may begin at one address and still hold other numbers: a part, a transpose, the same bytes as
    another type, a conjugate. All tensors without numbers have the address 0.
    """
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized:
        return ()
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg())


def _without_the_rest(saved: io.BytesIO) -> bytes:
    """Return a file of `torch.save` with shorter names, no identifier, and a shorter list of its tensors.

    The numbers of each storage begin at a multiple of 64 bytes, so that the file can be mapped into memory.
    """
    small = io.BytesIO()
    with zipfile.ZipFile(saved) as full, zipfile.ZipFile(small, "w") as archive:
        for member in full.infolist():
            name = member.filename.partition("/")[2]
            content = full.read(member)
            entry = zipfile.ZipInfo(f"a/{name}")
            if name == "data.pkl":
                content = pickletools.optimize(content)  # without the marks that nothing refers to
            elif name.startswith("data/"):
                begins = small.tell() + LOCAL_BYTES + len(entry.filename) + 4
                padding = -begins % ALIGNMENT
                entry.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
            elif name not in NEEDED:
                continue
            archive.writestr(entry, content)
            entry.extra = b""  # the directory at the end needs no padding
    return small.getvalue()


def in_one_storage_a_type(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors as parts of one storage for each type of number.

    A file of `torch.save` spends some 330 bytes on each storage: names, headers, and zeros up to a multiple of 64 bytes.
    `torch.load` gives the same tensors. Tensors that share their numbers (tied weights) go on doing so. Tensors that are
    not plain (sparse, quantized) stay as they are. The numbers lie in the order of the names, so that a file has as many
    bytes whatever the order of its tensors.
    """
    import torch

    places = {name: place for name, tensor in weights.items() if (place := _place(tensor))}
    plain = {places[name]: weights[name] for name in sorted(places)}
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
