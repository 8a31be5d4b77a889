"""Learning-rate schedules: pure functions from progress in [0, 1] to a factor on the peak rate; plateau has a state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


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


def one_cycle(progress: float, rise: float) -> float:
    """Half a cosine up from 1/25 during `rise`, half a cosine down to 1/250,000; as torch's OneCycleLR does.

    Source: Smith and Topin 2018, "Super-Convergence"; the shape and figures of torch.optim.lr_scheduler.OneCycleLR.
    """
    low, end = 1 / 25, 1 / 25 / 1e4
    if progress < rise:
        return low + (1 - low) * (1 - cosine(progress / rise))
    return end + (1 - end) * cosine((progress - rise) / (1 - rise))


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine, "linear": linear,
                                                  "step": step}
ONE_CYCLE_RISE = 0.3


@dataclass(frozen=True)
class Schedule:
    """A schedule with its settings.

    Args:
        name: of SCHEDULES, or "one_cycle", or "plateau" (constant here; see `Plateau`).
        warmup: share of the steps with a linear rise from nought; of one_cycle, the share that rises (0: 0.3).
        anneal: share of the training after which the end of the schedule is reached; the rest stays there.
        floor: what is added to the schedule's factors, which are scaled by 1 - floor, so that the peak stays the peak.
        step_size: "step" only: epochs between drops; 0 for drops at a half and at three quarters.
        gamma: "step" only: factor of a drop, with `step_size`.
    """

    name: str = "cosine"
    warmup: float = 0.0
    anneal: float = 1.0
    floor: float = 0.0
    step_size: int = 0
    gamma: float = 0.1

    def factor(self, progress: float, epoch: int) -> float:
        """The factor on the peak rate at `progress` in [0, 1], in the epoch that is counted from nought."""
        progress = min(progress / self.anneal, 1.0)
        if self.name == "one_cycle":
            value = one_cycle(progress, self.warmup or ONE_CYCLE_RISE)
        elif progress < self.warmup:
            return progress / self.warmup
        elif self.name == "step" and self.step_size:
            value = self.gamma ** (epoch // self.step_size)
        else:
            shape = SCHEDULES["constant" if self.name == "plateau" else self.name]
            value = shape((progress - self.warmup) / (1 - self.warmup))
        return self.floor + (1 - self.floor) * value if self.floor else value


@dataclass
class Plateau:
    """Lowers the rate by `factor` when the loss has not fallen for more than `patience` epochs.

    Source: torch.optim.lr_scheduler.ReduceLROnPlateau in mode "min", with its relative threshold of 1e-4.
    """

    patience: int
    factor: float
    value: float = 1.0
    best: float = math.inf
    waited: int = 0

    def see(self, loss: float) -> None:
        """Takes an epoch's loss into account."""
        if loss < self.best * (1 - 1e-4):
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.value, self.waited = self.value * self.factor, 0
