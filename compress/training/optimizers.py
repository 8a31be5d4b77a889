"""Optimizers by name, and the parameter groups: every parameter in exactly one, norms and biases without decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer


@dataclass(frozen=True)
class Settings:
    """How weights move.

    Args:
        name: of OPTIMIZERS, or "sam".
        lr: peak learning rate.
        momentum: of SGD (Nesterov's) and Muon.
        weight_decay: on matrices and kernels.
        adamw_lr: Muon only: peak learning rate of what is left to AdamW.
        head_lr: Muon only: peak learning rate of the last matrix, which is left to AdamW as well; 0 for adamw_lr.
        muon_scale: Muon only: how a matrix's shape scales its step: "match_rms_adamw" (0.2 sqrt(max(out, in)), so that
            rates are like AdamW's) or "original" (sqrt(max(1, out / in))).
        sam_base: SAM only: the optimizer that makes the step.
        sam_rho: SAM only: length of the ascent.
    """

    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    adamw_lr: float = 0.002
    head_lr: float = 0.0
    muon_scale: str = "match_rms_adamw"
    sam_base: str = "sgd"
    sam_rho: float = 0.05


Groups = list[dict[str, Any]]


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Two groups: matrices and kernels with weight decay; vectors (norms, biases) without."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [([p for p in trainable if p.dim() > 1], weight_decay), ([p for p in trainable if p.dim() <= 1], 0.0)]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def _muon(groups: Groups, settings: Settings) -> Optimizer:
    """Kernels and hidden matrices, flattened to (out, in * h * w), by Muon; vectors and the last matrix by AdamW.

    Kernels that have no use for it (depthwise ones, for instance) are left to AdamW by timm as well.
    Source: Jordan 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    from timm.optim import Muon

    decayed, *vectors = groups if groups[0]["params"][0].dim() > 1 else [{"params": [], "weight_decay": 0.0}, *groups]
    adamw = {"use_fallback": True, "nesterov": False}  # with Nesterov's momentum timm would take NAdamW
    parts = [{"params": decayed["params"][:-1], "weight_decay": decayed["weight_decay"]},
             {"params": decayed["params"][-1:], "weight_decay": decayed["weight_decay"], **adamw,
              "fallback_lr_scale": (settings.head_lr or settings.adamw_lr) / settings.lr},
             *({**group, **adamw} for group in vectors)]
    optimizer: Optimizer = Muon([part for part in parts if part["params"]], lr=settings.lr, momentum=settings.momentum,
                                nesterov=True, adjust_lr_fn=settings.muon_scale,
                                fallback_lr_scale=settings.adamw_lr / settings.lr)
    return optimizer


# `fused` runs one kernel over all tensors of a group.
OPTIMIZERS: dict[str, Callable[[Groups, Settings], Optimizer]] = {
    "sgd": lambda groups, settings: torch.optim.SGD(groups, settings.lr, settings.momentum,
                                                    nesterov=settings.momentum > 0, fused=True),
    "adam": lambda groups, settings: torch.optim.Adam(groups, settings.lr, fused=True),
    "adamw": lambda groups, settings: torch.optim.AdamW(groups, settings.lr, fused=True),
    "muon": _muon,
}


def make_optimizer(settings: Settings, model: nn.Module) -> Optimizer:
    """Builds an optimizer over the model's trainable parameters; for SAM, the one that makes its step."""
    name = settings.sam_base if settings.name == "sam" else settings.name
    return OPTIMIZERS[name](parameter_groups(model, settings.weight_decay), settings)


class Ascent:
    """SAM's climb to the worst point nearby: w + rho g / |g|. The gradient there is what the optimizer then steps by.

    Source: Foret et al. 2021, "Sharpness-Aware Minimization", eq. 2.

    Args:
        parameters: the trainable ones.
        rho: length of the climb, in the norm over all parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rho: float) -> None:
        self.parameters, self.rho = [parameter for parameter in parameters if parameter.requires_grad], rho
        self._home: list[Tensor] = []

    @torch.no_grad()
    def up(self, gradient_scale: float = 1.0) -> None:
        """Moves the weights along their gradients; `gradient_scale` is what a loss scaler multiplied the loss by.

        A gradient that is not finite (a loss scaled too far) moves nothing: the step is then a plain one, which the scaler
        skips if it overflows too.
        """
        moving = [parameter for parameter in self.parameters if parameter.grad is not None]
        self._home = [parameter.clone() for parameter in self.parameters]
        gradients = [parameter.grad / gradient_scale for parameter in moving if parameter.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        factor = torch.where(torch.isfinite(norm), self.rho / (norm + 1e-12), torch.zeros_like(norm))
        for parameter, gradient in zip(moving, gradients, strict=True):
            parameter.add_(torch.nan_to_num(gradient, 0.0, 0.0, 0.0) * factor)

    @torch.no_grad()
    def down(self) -> None:
        """Puts the weights back, to the bit."""
        for parameter, home in zip(self.parameters, self._home, strict=True):
            parameter.copy_(home)
        self._home = []


@contextmanager
def frozen_statistics(model: nn.Module) -> Any:
    """Batch norms use their batch's statistics inside, but do not remember them."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
    for module in norms:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in norms:
            module.track_running_stats = True
