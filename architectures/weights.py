"""Open weights files as data, and check them against their architecture."""

from __future__ import annotations

import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TYPE_CHECKING

from architectures.architecture import Architecture
from architectures.build import build
from architectures.counting import check_costs, layer_costs
from metadata.errors import VerificationError, first_line
from metadata.files import check_download, check_is_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What Python's zipfile raises for an archive that is damaged, encrypted, or compressed in an unknown way.
UNREADABLE_ARCHIVE = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, OSError, EOFError, ValueError,
                      LookupError)


def check_archive(path: Path) -> None:
    """Refuse an archive as `torch.save` writes them (a zip file) whose end is missing, or whose members cannot be opened.

    Files that are no archives, such as those of torch before 1.6, pass.

    Raises:
        VerificationError: the archive is cut short, damaged or encrypted.
    """
    with path.open("rb") as file:
        begins = file.read(4) == b"PK\x03\x04"
    if not zipfile.is_zipfile(path):
        if begins:
            raise VerificationError(f"{path}: the file is cut short: its end is missing; copy or download it again")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                archive.open(member.filename).close()
    except UNREADABLE_ARCHIVE as error:
        raise VerificationError(f"{path}: a damaged or encrypted archive: {first_line(error)}; copy or download it "
                                "again") from error


def load_tensors(path: Path, stand_ins: Sequence[Any] = ()) -> Any:
    """Return what `torch.save` wrote: tensors in plain containers (`weights_only`, so no code can run).

    Args:
        path: the file.
        stand_ins: callables with the names of classes that they stand for, as
            `torch.serialization.safe_globals` takes them.

    Raises:
        VerificationError: the file is missing, truncated, or holds objects other than tensors and plain values.
    """
    import torch
    check_is_file(path)
    try:
        check_download(path)
        check_archive(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    raise VerificationError(f"{path}: a TorchScript file, which is code; expected a state dict: "
                                            "torch.save(model.state_dict(), FILE)")
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise VerificationError(f"{path}: its members are compressed, which torch.save never does")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about tensors that are refused anyway
            with torch.serialization.safe_globals(list(stand_ins)):
                return torch.load(path, map_location="cpu", weights_only=True)
    except VerificationError:
        raise
    except Exception as error:  # whatever hostile bytes make torch's reader raise
        raise VerificationError(f"{path}: not a PyTorch state dict that holds only tensors: "
                                f"{first_line(error)}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict: named dense tensors with finite values, and nothing else.

    Raises:
        VerificationError: the file is not readable (see `load_tensors`), or holds no state dict.
    """
    return check_tensors(load_tensors(path), str(path))


def check_tensors(weights: Any, where: str) -> dict[str, Tensor]:
    """Check that the content of a weights file is a state dict, and return it as a plain dict.

    Raises:
        VerificationError: an entry is no tensor, not in memory, not dense, or not finite.
    """
    import torch
    if not isinstance(weights, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()):
        raise VerificationError(f"{where}: expected a state dict (names to tensors), got {type(weights).__name__}")
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise VerificationError(f"{where}: tensor {name} is no plain dense tensor ({tensor.layout}, {tensor.device})")
        if not all_finite(tensor):
            raise VerificationError(f"{where}: tensor {name} holds NaN or infinite values")
    return dict(weights)  # an OrderedDict's attributes are not data


def all_finite(tensor: Tensor) -> bool:
    """Tell whether no value of a tensor is NaN or infinite.

    Float8, which torch does not test, is judged as float32, and a sparse tensor by the values that it stores. A tensor
    without values (on the meta device) has none that is not finite.
    """
    import torch
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    values = stored_values(tensor)
    return bool(torch.isfinite(values.float() if values.element_size() == 1 else values).all())


def stored_values(tensor: Tensor) -> Tensor:
    """Return the numbers that a tensor stores: itself, or the values of a sparse tensor without their places."""
    import torch
    if tensor.layout == torch.sparse_coo:
        return tensor._values()
    return tensor if tensor.layout in (torch.strided, torch._mkldnn) else tensor.values()  # type: ignore[attr-defined]


def load_verified(architecture: Architecture, weights: dict[str, Tensor], where: str) -> torch.fx.GraphModule:
    """Build the architecture with the weights, after checking every name, shape and dtype.

    Raises:
        VerificationError: the weights do not fit the architecture; the message names the first wrong tensor.
    """
    import torch
    with torch.device("meta"):
        model = build(architecture)
    expected = model.state_dict()
    for name in expected:  # in the model's order, so that the same tensor is named every time
        if name not in weights:
            raise VerificationError(f"{where}: tensor {name} is missing")
    for name in weights:
        if name not in expected:
            raise VerificationError(f"{where}: tensor {name} belongs to no layer of the architecture")
    for name, tensor in weights.items():
        want = expected[name]
        if tensor.shape != want.shape:
            raise VerificationError(f"{where}: tensor {name} is {list(tensor.shape)}, the architecture says "
                                    f"{list(want.shape)}")
        if tensor.dtype != want.dtype:
            raise VerificationError(f"{where}: tensor {name} is {tensor.dtype}, expected {want.dtype}")
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def open_model(architecture: Architecture, weights: Path) -> torch.fx.GraphModule:
    """Return the verified model of an architecture and a weights file. Sizes are checked before the file is read.

    Raises:
        VerificationError: the weights do not fit the architecture, or one image takes too long (`check_costs`).
    """
    import torch
    costs = layer_costs(architecture)
    check_costs(str(weights), sum(cost.macs for cost in costs.values()),
                {name: cost.work for name, cost in costs.items()})
    with torch.device("meta"):
        empty = build(architecture).eval()
        if not empty.state_dict():
            raise VerificationError(f"{weights}: the architecture has no layer with weights")
    needed = sum(tensor.numel() * tensor.element_size() for tensor in empty.state_dict().values())
    if weights.is_file() and weights.stat().st_size > 2 * needed + 2**20:
        raise VerificationError(f"{weights}: the file has {weights.stat().st_size:,} bytes, its tensors need {needed:,}")
    return load_verified(architecture, read_weights(weights), str(weights))
