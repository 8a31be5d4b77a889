"""Muon: steps along the momentum made orthogonal, for kernels and hidden matrices; AdamW for every other parameter.

timm's Muon turns one matrix after the other, which launches some thirty operators for each. Here matrices are turned in
batches. The names in the state are timm's, so a checkpoint of either continues. So are the numbers, within rounding, where
the processor has bfloat16 instructions; elsewhere matrices are turned in float32, which rounds less than timm's bfloat16.
Source: Jordan 2024, "Muon: an optimizer for hidden layers in neural networks".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from compress.training.precision import has_bfloat16

# Newton-Schulz, a polynomial of its own for each iteration. Source: Cesista, You and Jordan 2025, "Squeezing 1-2%
# Efficiency Gains Out of Muon by Optimizing the Newton-Schulz Coefficients".
COEFFICIENTS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
                (2.8366, -3.0525, 1.2012))
EPS = 1e-7
BETAS = (0.9, 0.95)
SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5}


def suits_muon(shape: Sequence[int]) -> bool:
    """Return whether a kernel or matrix, flattened to (out, rest), gains by Muon: not a vector, depthwise or very thin."""
    if sum(side > 1 for side in shape) < 2 or 1 in shape[:2]:
        return False
    low, high = sorted(_flat(shape))
    return low >= 4 and high <= 128 * low


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return (B, m, n) matrices, m <= n, with singular values near 1. Columns and rows of zeros stay zero."""
    turned: Tensor = matrices / matrices.norm(2, (-2, -1), keepdim=True).clamp_(min=EPS)
    for a, b, c in COEFFICIENTS:
        gram = torch.bmm(turned, turned.mT)
        turned = torch.baddbmm(turned, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), turned, beta=a)
    return turned


class Muon(Optimizer):
    """Muon with Nesterov momentum, and AdamW for the groups with `use_fallback` and for what does not suit Muon.

    Args:
        groups: parameter groups.
        lr: learning rate; a tensor on the parameters' device where the step is captured in a CUDA graph.
        momentum: of Muon.
        adjust_lr_fn: a name in SCALES, the scale of a step by the matrix's shape.
        fallback_lr_scale: AdamW's learning rate is this factor times `lr`.
        weight_decay: decoupled, of every parameter.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float | Tensor, momentum: float, adjust_lr_fn: str,
                 fallback_lr_scale: float = 1.0, weight_decay: float = 0.0) -> None:
        super().__init__(groups, dict(lr=lr, momentum=momentum, adjust_lr_fn=adjust_lr_fn, weight_decay=weight_decay,
                                      fallback_lr_scale=fallback_lr_scale, use_fallback=False))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in moving:
                if "use_muon" not in self.state[parameter]:
                    self.state[parameter].update(_first_state(parameter, group.get("use_fallback", False)))
            if matrices := [parameter for parameter in moving if self.state[parameter]["use_muon"]]:
                self._turn(matrices, group)
            if rest := [parameter for parameter in moving if not self.state[parameter]["use_muon"]]:
                self._adamw(rest, group)

    def _turn(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        dtype = torch.bfloat16 if has_bfloat16(parameters[0].device) else torch.float32  # emulated, it is 20 times slower
        lr, gradients = group["lr"], [parameter.grad for parameter in parameters if parameter.grad is not None]
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
        for numbers in batches([parameter.shape for parameter in parameters], padded=parameters[0].device.type != "cpu"):
            rows, columns = (max(sides) for sides in zip(*(sorted(_flat(parameters[number].shape)) for number in numbers),
                                                         strict=True))
            batch = parameters[0].new_zeros(len(numbers), rows, columns, dtype=dtype)
            for index, number in enumerate(numbers):
                _part(batch[index], updates[number].shape).copy_(updates[number])
            batch = orthogonalized(batch)
            for index, number in enumerate(numbers):
                shape = parameters[number].shape
                part, scale = _part(batch[index], shape), SCALES[group["adjust_lr_fn"]](*_flat(shape))
                if isinstance(lr, Tensor):
                    parameters[number].addcmul_(part, lr, value=-scale)
                else:
                    parameters[number].add_(part, alpha=-lr * scale)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            state["step"] = state["step"].to(parameter.device)  # timm keeps it on the host
        adamw(parameters, [parameter.grad for parameter in parameters if parameter.grad is not None],
              [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
              [state["step"] for state in states], fused=True, amsgrad=False, beta1=BETAS[0], beta2=BETAS[1],
              lr=group["lr"] * group["fallback_lr_scale"], weight_decay=group["weight_decay"], eps=EPS, maximize=False)


def batches(shapes: Sequence[Sequence[int]], *, padded: bool) -> list[list[int]]:
    """Return the numbers of the shapes by batch: matrices of one shape, or of one shorter side where `padded`.

    Padding saves launches, which a GPU waits for, and costs arithmetic, which a CPU waits for.
    """
    found: dict[tuple[int, ...], list[int]] = {}
    for number, shape in enumerate(shapes):
        found.setdefault(tuple(sorted(_flat(shape))[:1 if padded else 2]), []).append(number)
    return list(found.values())


def _flat(shape: Sequence[int]) -> tuple[int, int]:
    """Return (out, rest) of a kernel's or matrix's shape."""
    return shape[0], torch.Size(shape[1:]).numel()


def _part(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the view of a wide (m, n) matrix that holds a kernel or matrix of a shape, on its side if it is tall."""
    out, rest = _flat(shape)
    return (matrix[:, :rest] if out <= rest else matrix[:, :out].mT).view(shape)


def _first_state(parameter: Tensor, fallback: bool) -> dict[str, Any]:
    if not fallback and suits_muon(parameter.shape):
        return {"use_muon": True, "momentum_buffer": torch.zeros_like(parameter)}
    return {"use_muon": False, "step": torch.zeros((), device=parameter.device), "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter)}
