"""Read safetensors files: a header in JSON, and numbers one after another. No package is needed for that."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TYPE_CHECKING

from metadata.errors import VerificationError, first_line
from metadata.files import MAX_JSON_BYTES, parse_json

if TYPE_CHECKING:
    from torch import Tensor

# torch's name and the bytes of a number, by the name in the header.
STORED_TYPES = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
                "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
                "BOOL": ("bool", 1)}


def read_stored_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, on the CPU.

    Raises:
        VerificationError: the header is not as the format says, or the tensors do not fill the file, each byte once.
    """
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(len(content) - 8, MAX_JSON_BYTES):
        raise VerificationError(f"{path}: not a safetensors file: a header of {length:,} bytes, "
                                f"the file has {len(content):,}")
    try:
        header = parse_json(content[8:8 + length].decode())
        return _tensors({name: entry for name, entry in header.items() if name != "__metadata__"}, content, 8 + length)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise VerificationError(f"{path}: not a safetensors file: {first_line(error)}") from error


def _tensors(header: dict[str, Any], content: bytes, start: int) -> dict[str, Tensor]:
    import torch
    memory, found, place = bytearray(content[start:]), {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (dtype, item_bytes), shape, (begin, end) = STORED_TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if begin != place or not all(type(size) is int and 0 <= size < 2**40 for size in shape) or len(shape) > 16 or (
                end - begin != math.prod(shape) * item_bytes or end > len(memory)):
            raise ValueError(f"tensor {name[:60]!r} of shape {shape[:9]} lies at {begin} to {end}, expected at "
                             f"{place}")
        place = end
        numbers = torch.frombuffer(memory, dtype=torch.uint8, count=end - begin, offset=begin) if end > begin else (
            torch.empty(0, dtype=torch.uint8))
        found[name] = numbers.clone().view(getattr(torch, dtype)).reshape(shape)  # a copy begins where its type may
    if place != len(memory):
        raise ValueError(f"{len(memory) - place:,} bytes belong to no tensor")
    return {name: found[name] for name in header}
