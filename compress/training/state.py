"""Everything that changes while a model trains. A checkpoint holds this state, and nothing else."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.training.averaging import Average
from compress.training.schedules import Plateau
from compress.training.settings import TrainingSettings

POSITION = ("epoch", "done", "step", "seen", "best_loss", "best_epoch", "stopped", "compiled")


@dataclass(kw_only=True)
class TrainingState:
    """The weights, the optimizer, and the position in the training.

    Args:
        model: what trains.
        optimizer: over the model's parameters.
        scaler: the loss scaler.
        average: the moving average of the weights, if there is one.
        plateau: factor on the learning rate of the schedule "plateau".
        lr: current learning rate.
        loss_sum, correct, seen: sums over the images of the current epoch so far.
        compiled: whether the network is compiled; None until that is known.
        epoch: finished epochs.
        done: steps of the current epoch that are done.
        step: steps of the whole training that are done.
        best_loss, best_epoch: the lowest monitored loss, and its epoch (counted from 1).
        stopped: early stopping has ended the training.
        earlier_seconds: training time of earlier sittings.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    plateau: Plateau
    lr: float
    loss_sum: Tensor
    correct: Tensor
    compiled: bool | None
    seen: int = 0
    epoch: int = 0
    done: int = 0
    step: int = 0
    best_loss: float = math.inf
    best_epoch: int = 0
    stopped: bool = False
    earlier_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def measured(self) -> nn.Module:
        """The model that is measured and kept: the average of the weights, if there is one."""
        return self.average.model if self.average else self.model

    @property
    def seconds(self) -> float:
        """Training time over all sittings."""
        return self.earlier_seconds + time.monotonic() - self.started

    def count(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """Add a batch to the sums of the epoch."""
        self.loss_sum.add_(loss, alpha=images)
        self.correct += correct
        self.seen += images

    def advance(self) -> None:
        """Note that a step is done, and let the average follow the weights."""
        self.step, self.done = self.step + 1, self.done + 1
        if self.average:
            self.average.follow(self.step)

    def end_epoch(self, monitored: float, settings: TrainingSettings) -> bool:
        """Begin the next epoch, and decide on plateau and early stopping; return whether the loss is the lowest so far."""
        self.epoch, self.done, self.seen = self.epoch + 1, 0, 0
        self.loss_sum.zero_()
        self.correct.zero_()
        if settings.schedule == "plateau":
            self.plateau.update(monitored)
        best = monitored < self.best_loss
        if best:
            self.best_loss, self.best_epoch = monitored, self.epoch
        self.stopped = 0 < settings.early_patience <= self.epoch - self.best_epoch
        return best

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        return {**{key: getattr(self, key) for key in POSITION}, "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "average": self.average.state_dict() if self.average else None, "plateau": vars(self.plateau),
                "loss_sum": float(self.loss_sum), "correct": float(self.correct), "seconds": self.seconds}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Continue from the content of a checkpoint; `compiled` stays as it is where it is known."""
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        if self.average:
            self.average.load_state_dict(content["average"])
        self.plateau = Plateau(**content["plateau"])
        compiled = self.compiled
        for key in POSITION:
            setattr(self, key, content[key])
        if compiled is not None:
            self.compiled = compiled
        self.loss_sum += content["loss_sum"]
        self.correct += content["correct"]
        self.earlier_seconds = content["seconds"]
