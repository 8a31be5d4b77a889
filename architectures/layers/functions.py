"""Functions of layer types that torch has no function for. They call methods of tensors alone, and need no import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def reshape_images(input: Tensor, shape: Sequence[int]) -> Tensor:
    """Give each image's part of a tensor (N, ...) another shape: (N, *shape)."""
    return input.reshape(input.shape[0], *shape)


def take_slice(input: Tensor, dim: int, start: int, stop: int, step: int = 1) -> Tensor:
    """Return the positions `start:stop:step` along a dimension."""
    return input[(slice(None),) * dim + (slice(start, stop, step),)]


def scale_shift(input: Tensor, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Return input * scale + shift for two numbers."""
    scaled = input * scale if scale != 1.0 else input
    return scaled + shift if shift else scaled
