"""Pairs of products that int8 kernels add in 16 bits on CPUs without VNNI, and which weights can exceed the 16 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PAIR_LIMIT = 128  # of the sum of a pair's weights of one sign: activations are 0 to 255, and 255 * 128 fits in 16 bits


def weight_rows(weight: Tensor) -> Tensor:
    """Return a layer's weights as kernels read them: (out, in, *kernel) -> (out, kernel positions, in)."""
    return weight.reshape(*weight.shape[:2], -1).transpose(1, 2)


def in_pairs(rows: Tensor) -> Tensor:
    """Return the pairs of weights whose products are added: (out, positions, in) -> (out, pairs, 2).

    oneDNN's kernels pair input channels 2i and 2i + 1 of a group at one kernel position. The last one of an odd number is
    paired with a zero. tests/architectures/test_pairs.py tries the kernels for it.
    """
    import torch
    return torch.nn.functional.pad(rows, (0, rows.shape[2] % 2)).reshape(len(rows), -1, 2)


def saturating_pairs(weight: Tensor) -> int:
    """Return the number of pairs of int8 weights (out, in, *kernel) whose products exceed 16 bits for some activations."""
    pairs = in_pairs(weight_rows(weight)).short()
    return int(((pairs.clamp(min=0).sum(2) > PAIR_LIMIT) | (pairs.clamp(max=0).sum(2) < -PAIR_LIMIT)).sum())
