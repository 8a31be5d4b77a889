"""The data of an ONNX file that lie in other files of its folder, as torch's exporter writes them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from metadata.errors import UserError, VerificationError, first_line
from metadata.files import check_download, inside

MAX_ONNX_BYTES = 2**31  # protobuf's limit; external data must not be a way around it
EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}


def parse_onnx(path: Path) -> Any:
    """Return an ONNX file's model, without external data.

    Raises:
        UserError: the package onnx is not installed.
        VerificationError: the file is too large, or not ONNX.
        MemoryError: the model needs more memory than there is.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError(f"{path}: an ONNX submission needs the packages onnx and onnxruntime; "
                        "pip install onnx onnxruntime") from error
    from google.protobuf.message import DecodeError

    if path.stat().st_size >= MAX_ONNX_BYTES:
        raise VerificationError(f"{path}: {path.stat().st_size:,} bytes are over the limit of 2 GB for an ONNX file")
    check_download(path)
    try:
        return onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, RecursionError, ValueError, TypeError) as error:
        if "alloc failed" in str(error):  # protobuf's word for it
            raise MemoryError from error
        raise VerificationError(f"{path}: not an ONNX file: {first_line(error)}") from error


def stored_tensors(graph: Any) -> list[Any]:
    """Return the stored tensors of a graph: initializers, and those that are attributes of a node."""
    from onnx import AttributeProto
    return [*graph.initializer, *(attribute.t for node in graph.node for attribute in node.attribute
                                  if attribute.type == AttributeProto.TENSOR)]


def data_files(path: Path) -> tuple[Path, ...]:
    """Return the files that hold an ONNX file's external data, sorted.

    Raises:
        UserError, VerificationError: see `parse_onnx` and `check_external_data`.
    """
    return check_external_data(path, stored_tensors(parse_onnx(path).graph))


def check_external_data(path: Path, tensors: Iterable[Any]) -> tuple[Path, ...]:
    """Return the files that hold the tensors' external data, before any of it is read.

    Raises:
        VerificationError: a name leaves the folder or is no plain file, a tensor is not as long as its shape and type say,
            or all data together exceed the limit.
    """
    from onnx import TensorProto
    found, total = set(), path.stat().st_size
    for tensor in tensors:
        if tensor.data_location != TensorProto.EXTERNAL:
            if tensor.external_data:
                raise VerificationError(f"{path}: tensor {tensor.name!r} names another file and says that it needs none")
            continue
        file, offset, length = _place(path, tensor)
        total += length
        if total >= MAX_ONNX_BYTES:  # tensors may share bytes, so the size of the files is no bound
            raise VerificationError(f"{path}: the data in its own and in other files are over the limit of 2 GB")
        if offset + length > file.stat().st_size:
            raise VerificationError(f"{path}: tensor {tensor.name!r} ends at byte {offset + length:,} of {file.name}, "
                                    f"which has {file.stat().st_size:,}")
        found.add(file)
    return tuple(sorted(found))


def _place(path: Path, tensor: Any) -> tuple[Path, int, int]:
    """Return the file of an external tensor, the first of its bytes there, and their number."""
    from onnx import helper
    where = {entry.key: entry.value for entry in tensor.external_data}
    if not where.keys() <= EXTERNAL_KEYS or len(where) < len(tensor.external_data):
        raise VerificationError(f"{path}: tensor {tensor.name!r} states {sorted(map(str, where))} of its place, expected "
                                f"each of {sorted(EXTERNAL_KEYS)} once at most")
    name = where.get("location", "")
    if not isinstance(name, str) or not name or Path(name).is_absolute():  # protobuf gives bytes for what is no UTF-8
        raise VerificationError(f"{path}: tensor {tensor.name!r} lies in {name!r}; expected a file in the same folder")
    file = inside(path.parent, name)
    if not file.is_file():
        raise VerificationError(f"{path}: tensor {tensor.name!r} lies in {name!r}, and there is no such plain file")
    try:
        needed = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        offset, length = int(where.get("offset", 0)), int(where.get("length", needed))
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise VerificationError(f"{path}: tensor {tensor.name!r} is not what it says: {first_line(error)}") from error
    if offset < 0 or length != needed or min(tensor.dims, default=0) < 0:
        raise VerificationError(f"{path}: tensor {tensor.name!r} has {length:,} bytes from byte {offset:,} of {name!r} on, "
                                f"its shape {list(tensor.dims)} needs {needed:,}")
    return file, offset, length


def read_external_data(path: Path, model: Any) -> None:
    """Read checked external data into the model. Raise VerificationError where they cannot be read."""
    from onnx import external_data_helper
    from onnx.checker import ValidationError
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (ValidationError, OSError, ValueError, TypeError) as error:
        raise VerificationError(f"{path}: its data in other files cannot be read: {first_line(error)}") from error
