"""Architectures as JSON."""

from __future__ import annotations

from typing import Any


def layer(name: str, kind: str, inputs: list[str], **options: Any) -> dict[str, Any]:
    """Return a layer as JSON."""
    return {"name": name, "type": kind, "inputs": inputs, **options}


def tiny(**changes: Any) -> dict[str, Any]:
    """Return a small architecture as JSON, with changes to its top level."""
    return {"schema": 1, "model_type": "Tiny", "num_classes": 4, "input_shape": [3, 8, 8], "output_shape": [4],
            "layers": [layer("conv", "Conv2d", ["input"], in_channels=3, out_channels=6, kernel_size=[3, 3]),
                       layer("relu", "ReLU", ["conv"]), layer("pool", "Mean", ["relu"], dim=[2, 3]),
                       layer("fc", "Linear", ["pool"], in_features=6, out_features=4)], **changes}
