"""Learning-rate schedules: pure functions from progress in [0, 1) to a factor on the peak learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable


def constant(progress: float) -> float:
    """The peak rate throughout."""
    return 1.0


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0. Source: Loshchilov and Hutter 2017, SGDR, eq. 5, one cycle."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """A straight line from 1 to 0."""
    return 1.0 - progress


def step(progress: float) -> float:
    """A tenth after half, a hundredth after three quarters."""
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine, "linear": linear,
                                                  "step": step}


def rate(schedule: str, warmup: float, progress: float) -> float:
    """The factor at `progress`: a linear rise over the first `warmup` share of the steps, then the schedule."""
    if progress < warmup:
        return progress / warmup
    return SCHEDULES[schedule]((progress - warmup) / (1 - warmup))
