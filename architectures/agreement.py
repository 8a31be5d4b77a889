"""How far two batches of logits are apart."""

from __future__ import annotations

import math

from torch import Tensor


def largest_difference(expected: Tensor, got: Tensor) -> tuple[float, float]:
    """Return the largest difference of two batches of logits (N, classes), and the largest logit that is expected.

    The difference is infinite where a logit is not finite: a NaN is not equal to anything.
    """
    difference = float((expected - got).abs().max())
    return difference if math.isfinite(difference) else math.inf, float(expected.abs().max())


def relative_difference(expected: Tensor, got: Tensor) -> float:
    """Return the largest difference of two batches of logits (N, classes), relative to the largest logit expected."""
    difference, largest = largest_difference(expected, got)
    return difference / (largest or 1.0) if math.isfinite(difference) else difference
