"""Optimizers by name, and the parameter groups: every parameter in exactly one, norms and biases without decay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

# name -> (parameter groups, learning rate, momentum) -> optimizer. `fused` runs one kernel over all tensors.
OPTIMIZERS: dict[str, Callable[[list[dict[str, object]], float, float], Optimizer]] = {
    "sgd": lambda groups, lr, momentum: torch.optim.SGD(groups, lr, momentum, nesterov=momentum > 0, fused=True),
    "adam": lambda groups, lr, momentum: torch.optim.Adam(groups, lr, fused=True),
    "adamw": lambda groups, lr, momentum: torch.optim.AdamW(groups, lr, fused=True),
}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and kernels with weight decay; vectors (norms, biases) without."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [([p for p in trainable if p.dim() > 1], weight_decay), ([p for p in trainable if p.dim() <= 1], 0.0)]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def make_optimizer(name: str, model: nn.Module, lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """Builds the optimizer `name` (of OPTIMIZERS) over the model's trainable parameters."""
    return OPTIMIZERS[name](parameter_groups(model, weight_decay), lr, momentum)
