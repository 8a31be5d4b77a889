"""Open weights files as data, and check them against their architecture."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TYPE_CHECKING

from architectures.architecture import Architecture
from architectures.archives import check_archive, is_archive
from architectures.build import build, check_shapes
from architectures.counting import check_costs, layer_costs
from architectures.layers.base import Layer
from architectures.safetensors_files import read_stored_tensors
from metadata.errors import VerificationError, first_line
from metadata.files import check_download, check_is_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def load_tensors(path: Path, stand_ins: Sequence[Any] = ()) -> Any:
    """Return what `torch.save` wrote: tensors in plain containers (`weights_only`, so no code can run).

    Args:
        path: the file, or a `.safetensors` file.
        stand_ins: callables with the names of classes that they stand for, as
            `torch.serialization.safe_globals` takes them.

    Raises:
        VerificationError: the file is missing, truncated, or holds objects other than tensors and plain values.
    """
    import torch
    check_is_file(path)
    try:
        check_download(path)
        if path.suffix == ".safetensors":
            return read_stored_tensors(path)
        check_archive(path)
        if is_archive(path):
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
    return check_tensors(load_tensors(path), str(path), path.stat().st_size)


def check_tensors(weights: Any, where: str, file_bytes: int | None = None) -> dict[str, Tensor]:
    """Check that the content of a weights file is a state dict of finite numbers, and return it as a plain dict.

    Raises:
        VerificationError: see `check_layouts`, or a value is not finite.
    """
    return check_values(check_layouts(weights, where, file_bytes), where)


def check_layouts(weights: Any, where: str, file_bytes: int | None = None) -> dict[str, Tensor]:
    """Check that the content of a weights file is a state dict, by what its tensors say of themselves. Look at no value.

    The methods of a tensor are looked up in torch's class: a file may give its tensors attributes with the same names.

    Args:
        weights: what the file holds.
        where: the file, for the message.
        file_bytes: the size of the file, which the tensors cannot exceed; unbounded unless given.

    Raises:
        VerificationError: an entry is no tensor, has attributes of its own, is not in memory or not dense, shares numbers
            among its own places, or takes more bytes than the file has.
    """
    import torch
    kind, needed, known = torch.Tensor, 0, set()
    if not isinstance(weights, dict) or not all(
            isinstance(name, str) and type(value) in (kind, torch.nn.Parameter) for name, value in weights.items()):
        raise VerificationError(f"{where}: expected a state dict (names to tensors), got {type(weights).__name__}")
    for name, tensor in weights.items():
        if vars(tensor):
            raise VerificationError(f"{where}: tensor {name} has attributes of its own: {min(map(str, vars(tensor)))[:60]}")
        layout, device = tensor.layout, tensor.device
        if layout != torch.strided or device.type != "cpu" or tensor.is_quantized or kind.is_neg(tensor) or (
                kind.is_conj(tensor)):
            raise VerificationError(f"{where}: tensor {name} is no plain dense tensor ({layout}, {device})")
        sizes, strides = tuple(kind.size(tensor)), kind.stride(tensor)
        span = 1
        for stride, size in sorted(zip(strides, sizes, strict=True)):
            if size > 1 and stride < span:
                raise VerificationError(f"{where}: tensor {name} is no plain dense tensor: its shape {list(sizes)} with "
                                        f"strides {list(strides)} uses the same numbers several times")
            span += max(size - 1, 0) * stride
        place = (kind.data_ptr(tensor), tensor.dtype, sizes, strides)
        if place not in known:  # tied tensors share their numbers
            known.add(place)
            needed += kind.numel(tensor) * kind.element_size(tensor)
        if file_bytes is not None and needed > file_bytes:
            raise VerificationError(f"{where}: tensor {name}: its tensors need {needed:,} bytes up to here, the file has "
                                    f"{file_bytes:,}")
    return dict(weights)  # an OrderedDict's attributes are not data


def check_values(weights: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return tensors whose layouts were checked. Raise VerificationError for a value that is not finite."""
    known = set()
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place not in known and not all_finite(tensor):
            raise VerificationError(f"{where}: tensor {name} holds NaN or infinite values")
        known.add(place)
    return weights


def all_finite(tensor: Tensor) -> bool:
    """Tell whether no value of a tensor is NaN or infinite.

    Float8, which torch does not test, is judged as float32, and a sparse tensor by the values that it stores. A tensor
    without values (on the meta device) has none that is not finite.
    """
    import torch
    if tensor.is_meta or not torch.Tensor.is_floating_point(tensor):  # a tensor of a file may have attributes of that name
        return True
    values = stored_values(tensor)
    return bool(torch.isfinite(torch.Tensor.float(values) if torch.Tensor.element_size(values) == 1 else values).all())


def stored_values(tensor: Tensor) -> Tensor:
    """Return the numbers that a tensor stores: itself, or the values of a sparse tensor without their places."""
    import torch
    if tensor.layout == torch.sparse_coo:
        return tensor._values()
    return tensor if tensor.layout in (torch.strided, torch._mkldnn) else tensor.values()  # type: ignore[attr-defined]


def load_verified(architecture: Architecture, weights: dict[str, Tensor], where: str) -> torch.fx.GraphModule:
    """Build the architecture with the weights, after checking every name, shape and dtype.

    Beside int8 weights a file may hold float32 numbers as float16; they are float32 in the model.

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
        halved = architecture.is_int8 and (tensor.dtype, want.dtype) == (torch.float16, torch.float32)
        if tensor.dtype != want.dtype and not halved:
            raise VerificationError(f"{where}: tensor {name} is {tensor.dtype}, expected {want.dtype}")
    weights = {name: tensor.to(expected[name].dtype) for name, tensor in weights.items()}
    check_positions(architecture, weights, where)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def check_positions(architecture: Architecture, weights: dict[str, Tensor], where: str) -> None:
    """Let each layer check its own tensors; one on the meta device has no values to check."""
    checking = [layer for layer in architecture.layers if type(layer).check_weights is not Layer.check_weights]
    if not checking:
        return
    own: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        layer_name, _, key = name.rpartition(".")
        if not tensor.is_meta:
            own.setdefault(layer_name, {})[key] = tensor
    shapes = {"input": architecture.input_shape, **check_shapes(architecture)}
    for layer in checking:
        try:
            if layer.name in own:
                layer.check_weights(own[layer.name], [shapes[name] for name in layer.inputs])
        except ValueError as error:
            raise VerificationError(f"{where}: layer {layer.name}: {error}") from error


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
    tensors = check_layouts(load_tensors(weights), str(weights), weights.stat().st_size)
    model = load_verified(architecture, tensors, str(weights))
    check_values(tensors, str(weights))
    return model
