"""Optimizers by name. Every parameter is in exactly one parameter group; norms and biases have no weight decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from architectures.heads import head_parameters
from compress.training.muon import Muon
from compress.training.settings import TrainingSettings
from metadata.errors import UserError


Groups = list[dict[str, Any]]


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Return two groups: matrices and kernels with weight decay, vectors (norms, biases) without."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [([p for p in trainable if p.dim() > 1], weight_decay), ([p for p in trainable if p.dim() <= 1], 0.0)]
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def _muon(groups: Groups, settings: TrainingSettings, scaled: bool, head: Set[nn.Parameter]) -> Optimizer:
    """Update kernels and hidden matrices, flattened to (out, in * h * w), by Muon; vectors and the head by AdamW.

    Kernels that gain nothing by Muon (depthwise ones, for instance) are left to AdamW as well.
    """
    decayed, *vectors = groups if groups[0]["params"][0].dim() > 1 else [{"params": [], "weight_decay": 0.0}, *groups]
    adamw = {"use_fallback": True}
    parts = [{"params": [p for p in decayed["params"] if p not in head], "weight_decay": decayed["weight_decay"]},
             {"params": [p for p in decayed["params"] if p in head], "weight_decay": decayed["weight_decay"], **adamw,
              "fallback_lr_scale": (settings.head_lr or settings.adamw_lr) / settings.lr},
             *({**group, **adamw} for group in vectors)]
    return Muon([part for part in parts if part["params"]], lr=settings.lr, momentum=settings.momentum,
                adjust_lr_fn=settings.muon_scale, fallback_lr_scale=settings.adamw_lr / settings.lr)


def _sgd(groups: Groups, settings: TrainingSettings, scaled: bool, head: Set[nn.Parameter]) -> Optimizer:
    """Return SGD with Nesterov momentum, in one kernel over all tensors of a group.

    Under a loss scaler torch 2.14's fused kernel leaves the momentum uninitialized if the scaler skips the first step (the
    usual case at the first scale of 65,536), and the next step makes the weights NaN.
    """
    return torch.optim.SGD(groups, settings.lr, settings.momentum, nesterov=settings.momentum > 0, fused=not scaled)


OPTIMIZERS: dict[str, Callable[[Groups, TrainingSettings, bool, Set[nn.Parameter]], Optimizer]] = {
    "sgd": _sgd,
    "adam": lambda groups, settings, scaled, head: torch.optim.Adam(groups, settings.lr, fused=True),
    "adamw": lambda groups, settings, scaled, head: torch.optim.AdamW(groups, settings.lr, fused=True),
    "muon": _muon,
}


def make_optimizer(settings: TrainingSettings, model: nn.Module, example: Tensor, *, scaled: bool = False) -> Optimizer:
    """Return an optimizer over the model's trainable parameters; for SAM, the optimizer that makes the step.

    Args:
        settings: which optimizer, and its settings.
        model: what to train.
        example: (N, C, H, W) float32 on the model's device; Muon finds the model's last layer by it.
        scaled: a loss scaler may skip steps of the optimizer.

    Raises:
        UserError: Muon does not find the model's last layer.
    """
    name = settings.sam_base if settings.optimizer == "sam" else settings.optimizer
    head = set(head_parameters(model, example).values()) if name == "muon" else set[nn.Parameter]()
    groups = parameter_groups(model, settings.weight_decay)
    if name == "muon" and not head and any(parameter.dim() > 1 for group in groups for parameter in group["params"]):
        raise UserError("optimizer muon: expected a last layer with weights in the graph of the forward pass, to leave it "
                        "to AdamW, got none; take another optimizer, or use_reentrant=False where the model calls "
                        "torch.utils.checkpoint")
    return OPTIMIZERS[name](groups, settings, scaled, head)


class Ascent:
    """The ascent of SAM to the worst point nearby, w + rho g / |g|. The optimizer then steps by the gradient at that point.

    Source: Foret et al. 2021, "Sharpness-Aware Minimization", eq. 2.

    Args:
        parameters: those without `requires_grad` are left out.
        rho: length of the ascent, in the norm over all parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rho: float) -> None:
        self.parameters: list[Tensor] = [parameter for parameter in parameters if parameter.requires_grad]
        self.rho = rho
        self._home: list[Tensor] = []

    @torch.no_grad()
    def up(self, gradient_scale: float = 1.0) -> None:
        """Move the weights along their gradients.

        A gradient that is not finite (an overflow under a loss scaler) moves nothing. The step is then a plain one, which
        the scaler skips if its gradient overflows too.

        Args:
            gradient_scale: factor by which a loss scaler multiplied the loss.
        """
        moving = [parameter for parameter in self.parameters if parameter.grad is not None]
        self._home = [torch.empty_like(parameter) for parameter in self.parameters]
        torch._foreach_copy_(self._home, self.parameters)
        gradients = [parameter.grad for parameter in moving if parameter.grad is not None]
        if gradient_scale != 1:
            gradients = list(torch._foreach_div(gradients, gradient_scale))
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        factor = torch.where(torch.isfinite(norm), self.rho / (norm + 1e-12), torch.zeros_like(norm))
        if gradient_scale != 1:
            gradients = [torch.nan_to_num(gradient, 0.0, 0.0, 0.0) for gradient in gradients]
        torch._foreach_add_(moving, list(torch._foreach_mul(gradients, factor)))

    @torch.no_grad()
    def down(self) -> None:
        """Put the weights back, to the bit."""
        torch._foreach_copy_(self.parameters, self._home)
        self._home = []


@contextmanager
def frozen_statistics(model: nn.Module) -> Any:
    """Let batch norms use the statistics of their batch inside the context without recording them."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
    for module in norms:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in norms:
            module.track_running_stats = True
