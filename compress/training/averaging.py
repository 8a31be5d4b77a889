"""An exponential moving average of a model's weights and statistics, kept beside the model that trains."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class Average:
    """A copy of the model that follows the model slowly: average += (1 - decay) (model - average) after every step.

    The decay starts low, min(decay, (1 + step) / (10 + step)), so that the random initial weights are soon forgotten.
    Source: Polyak and Juditsky 1992; the warm-up is TensorFlow's ExponentialMovingAverage with num_updates.

    Args:
        model: what to follow; parameters and floating-point buffers are averaged, integer buffers copied.
        decay: in (0, 1); 0.999 averages over about a thousand steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        mine, theirs = self.model.state_dict(), model.state_dict()
        floating = [name for name, tensor in mine.items() if tensor.is_floating_point()]
        self._mine, self._theirs = [mine[name] for name in floating], [theirs[name] for name in floating]
        whole = [name for name in mine if name not in set(floating)]
        self._whole = [mine[name] for name in whole], [theirs[name] for name in whole]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take one step towards the model, which has taken `step` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._mine, self._theirs, 1 - decay)
        if self._whole[0]:
            torch._foreach_copy_(*self._whole)

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict of the averaged model."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore an earlier average."""
        self.model.load_state_dict(state)
