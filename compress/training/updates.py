"""One update of the weights: gradients in parts, SAM's second pass, clipping, the loss scaler, the optimizer."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.training.distributed import Team
from compress.training.mixup import Batch, Loss, parts
from compress.training.optimizers import Ascent, frozen_statistics
from compress.training.precision import autocast
from compress.training.settings import TrainingSettings


@dataclass(kw_only=True)
class Updater:
    """Computes gradients and moves the weights.

    Args:
        model: whose weights move.
        network: what computes; the model, or a wrapped or compiled form of the model.
        loss: (network, batch) -> mean loss and logits.
        settings: the optimizer's settings, `clip` and `accumulate`.
        optimizer: over the model's parameters.
        scaler: the loss scaler, disabled unless the training computes in float16.
        dtype: type to compute in, None for float32.
        device: of the model.
        team: the processes that train together.
    """

    model: nn.Module
    network: nn.Module
    loss: Loss
    settings: TrainingSettings
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype | None
    device: torch.device
    team: Team

    def step(self, batch: Batch, lr: float | Tensor) -> tuple[Tensor, Tensor]:
        """Move the weights by a batch; return its mean loss and the number of right predictions, before the step."""
        loss, correct = self.gradients(batch)
        self.apply(batch, lr)
        return loss, correct

    def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Leave the gradient of the mean loss in the parameters; return that loss and the number of right predictions."""
        self.optimizer.zero_grad(set_to_none=True)
        losses, counts = [], []
        pieces = parts(batch, self.settings.accumulate)
        for index, part in enumerate(pieces):
            last = index == len(pieces) - 1  # the processes exchange gradients once a step
            with nullcontext() if last or self.team.size == 1 else self.network.no_sync():  # type: ignore[operator]
                value, logits = self.forward(self.network, part)
                if len(pieces) > 1:
                    value = value * (len(part.labels) / len(batch.labels))
                self.scaler.scale(value).backward()
            losses.append(value.detach())
            counts.append(part.correct(logits.detach()))
        return sum(losses[1:], losses[0]), sum(counts[1:], counts[0])

    def forward(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mean loss and the logits of a batch."""
        with autocast(self.dtype, self.device):
            return self.loss(network, batch)

    def apply(self, batch: Batch, lr: float | Tensor) -> None:
        """Move the weights by the gradients; SAM first replaces them by those at the worst point nearby."""
        if self.settings.optimizer == "sam":
            ascent = Ascent(self.model.parameters(), self.settings.sam_rho)
            ascent.up(self.scaler.get_scale())
            with frozen_statistics(self.model):
                self.gradients(batch)
            ascent.down()
        if self.settings.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
