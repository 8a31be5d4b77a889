"""Learning-rate schedules: pure functions from progress in [0, 1] to a factor on the peak rate. Plateau has a state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from compress.training.settings import TrainingSettings


def constant(progress: float) -> float:
    """Return 1: the peak rate throughout."""
    return 1.0


def cosine(progress: float) -> float:
    """Fall from 1 to 0 by half a cosine. Source: Loshchilov and Hutter 2017, SGDR, eq. 5, one cycle."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """Fall from 1 to 0 in a straight line."""
    return 1.0 - progress


def step(progress: float) -> float:
    """Return a tenth after one half, a hundredth after three quarters."""
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


def one_cycle(progress: float, rise: float) -> float:
    """Rise from 1/25 by half a cosine during `rise`, then fall to 1/250,000 by half a cosine, as torch's OneCycleLR.

    Source: Smith and Topin 2018, "Super-Convergence"; the shape and figures of torch.optim.lr_scheduler.OneCycleLR.
    """
    low, end = 1 / 25, 1 / 25 / 1e4
    if progress < rise:
        return low + (1 - low) * (1 - cosine(progress / rise))
    return end + (1 - end) * cosine((progress - rise) / (1 - rise))


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine, "linear": linear,
                                                  "step": step}
ONE_CYCLE_RISE = 0.3


def rate_factor(settings: TrainingSettings, progress: float, epoch: int) -> float:
    """Return the factor on the peak rate; "plateau" is constant here, see `Plateau`.

    Args:
        settings: the schedule's settings. `lr_floor` is added to the factors, which are scaled by 1 - lr_floor, so that
            the peak stays the peak.
        progress: share of the training that is done, in [0, 1].
        epoch: the current epoch, counted from 0.
    """
    progress = min(progress / settings.anneal, 1.0)
    if settings.schedule == "one_cycle":
        value = one_cycle(progress, settings.warmup or ONE_CYCLE_RISE)
    elif progress < settings.warmup:
        return progress / settings.warmup
    elif settings.schedule == "step" and settings.step_size:
        value = settings.gamma ** (epoch // settings.step_size)
    else:
        shape = SCHEDULES["constant" if settings.schedule == "plateau" else settings.schedule]
        value = shape((progress - settings.warmup) / (1 - settings.warmup))
    return settings.lr_floor + (1 - settings.lr_floor) * value if settings.lr_floor else value


@dataclass(kw_only=True)
class Plateau:
    """Lower the rate by `factor` when the loss has not fallen for more than `patience` epochs.

    Source: torch.optim.lr_scheduler.ReduceLROnPlateau in mode "min", with its relative threshold of 1e-4.
    """

    patience: int
    factor: float
    value: float = 1.0
    best: float = math.inf
    waited: int = 0

    def update(self, loss: float) -> None:
        """Take an epoch's loss into account."""
        if loss < self.best * (1 - 1e-4):
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.value, self.waited = self.value * self.factor, 0
