"""Pairs of products that int8 kernels add in 16 bits on CPUs without VNNI, and which weights can exceed the 16 bits."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Kernels = Literal["onednn", "onnxruntime"]
PAIR_LIMIT = 128  # of the sum of a pair's weights of one sign: activations are 0 to 255, and 255 * 128 fits in 16 bits


def weight_pairs(weight: np.ndarray, kernels: Kernels = "onednn") -> np.ndarray:
    """Return the pairs of weights whose products are added: (out, in of a group, *kernel) int -> (out, pairs, 2) int16.

    Pairs are input channels 2i and 2i + 1 of a group at one kernel position. The last one of an odd number of channels is
    paired with a zero by oneDNN, and with the next position's first one by ONNX Runtime. Tests ask the kernels for it.
    """
    outputs, inputs, *kernel = weight.shape
    positions = math.prod(kernel)
    rows = weight.reshape(outputs, inputs, positions).swapaxes(1, 2).astype(np.int16)  # (out, kernel positions, in)
    if kernels == "onnxruntime":
        rows = rows.reshape(outputs, 1, positions * inputs)
    rows = np.pad(rows, ((0, 0), (0, 0), (0, rows.shape[2] % 2)))
    return rows.reshape(outputs, rows[:1].size // 2, 2)


def can_saturate(pairs: np.ndarray) -> np.ndarray:
    """Return which pairs' sums of products exceed 16 bits for some activations of 0 to 255: (..., 2) -> (...) bool."""
    most, least = pairs.clip(min=0).sum(-1), pairs.clip(max=0).sum(-1)
    return (most > PAIR_LIMIT) | (least < -PAIR_LIMIT)  # type: ignore[no-any-return]


def saturating_pairs(weight: np.ndarray, groups: int = 1, kernels: Kernels = "onednn") -> int:
    """Return the number of pairs of an int8 layer's weights, (out, in of a group, *kernel), that can saturate."""
    if weight.ndim > 2 and weight.shape[1] == 1 and len(weight) == groups:  # depthwise kernels multiply one by one
        return 0
    return int(can_saturate(weight_pairs(weight, kernels)).sum())
