"""The bytes of the weights file that a package of a network would have: the file is made, with random weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import torch

from architectures.architecture import Architecture
from architectures.build import build
from compress.quantization.dynamic import quantize_graph
from compress.search.timings import random_onnx
from metadata.formats import write_weights

Form = Literal["float32", "int8_dynamic", "int8_static"]
# Bytes by which a file of other weights may be larger: an ONNX file stores equal zero points once, some 20 bytes each.
UNCERTAIN: dict[Form, int] = {"float32": 0, "int8_dynamic": 0, "int8_static": 256}


def weights_file_bytes(architecture: Architecture, form: Form) -> int:
    """Return the bytes of a weights file.

    Those of a `.pth` depend on shapes alone; for an `.onnx` see `UNCERTAIN`.

    Args:
        architecture: the float network.
        form: "float32" and "int8_dynamic": the `.pth`; "int8_static": the `.onnx` in QDQ form, by the default settings.
    """
    if form == "int8_static":
        return len(random_onnx(architecture, "int8").SerializeToString())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(architecture)
        state = (quantize_graph(model)[0] if form == "int8_dynamic" else model).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        write_weights(path, state)
        return path.stat().st_size
