"""Layers that act in training alone: dropout and stochastic depth. In evaluation they return their input."""

from __future__ import annotations

from typing import Any, Literal, TYPE_CHECKING

from architectures.layers.base import Unchanging, outside, register, traced_argument
from architectures.layers.modules import OwnModule
from metadata.schemas import Fraction

if TYPE_CHECKING:
    from torch import fx, nn


@register
class Dropout(Unchanging):
    """`torch.nn.Dropout`."""

    functions = ("torch.nn.functional.dropout",)
    identity = keeps_grid = True  # on the grid once it is trained

    p: Fraction = 0.5

    @classmethod
    def from_call(cls, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        return [node.args[0]], {"p": traced_argument(node, 1, "p", 0.5)}


@register
class StochasticDepth(OwnModule, Unchanging):
    """A residual branch that is dropped for some images (mode "row") or for all ("batch")."""

    identity = keeps_grid = True
    other_classes = ("torchvision.ops.stochastic_depth.StochasticDepth", "timm.layers.drop.DropPath")

    p: Fraction = 0.0
    mode: Literal["row", "batch"] = "row"

    @classmethod
    def from_module(cls, module: nn.Module, name: str) -> dict[str, Any]:
        if hasattr(module, "drop_prob"):  # timm's
            drop: Any = module
            if drop.drop_prob and not getattr(drop, "scale_by_keep", True):
                raise outside(name, "stochastic depth that does not scale the branches that are kept (scale_by_keep=False)")
            return {"p": float(drop.drop_prob or 0.0)}
        return super().from_module(module, name)
