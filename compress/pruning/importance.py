"""How important each channel of a group of coupled layers is: the criteria that pruning can rank channels by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from compress.pruning.library import tp

# Criterion -> importance of a group's channels. Sources: l1 and l2 Li et al. 2017; bn_scale Liu et al. 2017 (network
# slimming); fpgm He et al. 2019; taylor Molchanov et al. 2019, first order.
CRITERIA: dict[str, Callable[[], Any]] = {
    "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "bn_scale": lambda: tp.importance.BNScaleImportance(),
    "fpgm": lambda: tp.importance.FPGMImportance(p=2),
    "taylor": lambda: tp.importance.GroupTaylorImportance(),
    "random": lambda: tp.importance.RandomImportance(),
}
NEEDS_GRADIENTS = {"taylor"}


def accumulate_gradients(loss: Callable[[nn.Module], Iterable[Tensor]]) -> Callable[[nn.Module], None]:
    """Return a `gradients` function for `prune` that sums the gradients of the losses that `loss(model)` yields."""
    def fill(model: nn.Module) -> None:
        model.zero_grad()
        for value in loss(model):
            value.backward()
    return fill
