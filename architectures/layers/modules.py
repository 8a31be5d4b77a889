"""Modules of layer types that torch has no module for. `model.py` holds their source, so they need torch alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TYPE_CHECKING

from architectures.layers.base import Layer

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnModules:
    """The module classes. Their source also goes into a package's model.py."""

    Parameter: type[nn.Module]
    Buffer: type[nn.Module]
    Gather: type[nn.Module]
    StochasticDepth: type[nn.Module]


@functools.cache
def own_modules() -> OwnModules:
    """Return the module classes. They are defined on first use because they need torch."""
    import torch
    from torch import nn

    class Parameter(nn.Module):
        """A tensor that is learned, the same for every image: a class token, positions, a scale for each channel."""

        def __init__(self, shape: Sequence[int]) -> None:
            super().__init__()
            self.shape = tuple(shape)
            self.value = nn.Parameter(torch.zeros(self.shape))

        def forward(self, images: Tensor) -> Tensor:
            return self.value.expand(images.shape[0], *self.shape)

    class Buffer(nn.Module):
        """A tensor that is not learned, the same for every image: a mask, means to subtract."""

        def __init__(self, shape: Sequence[int]) -> None:
            super().__init__()
            self.shape = tuple(shape)
            self.value: Tensor
            self.register_buffer("value", torch.zeros(self.shape))

        def forward(self, images: Tensor) -> Tensor:
            return self.value.expand(images.shape[0], *self.shape)

    class Gather(nn.Module):
        """Takes `count` positions along a dimension, in the order of `index`."""

        def __init__(self, dim: int, count: int) -> None:
            super().__init__()
            self.dim, self.count = dim, count
            self.index: Tensor
            self.register_buffer("index", torch.zeros(count, dtype=torch.int64))

        def forward(self, input: Tensor) -> Tensor:
            return input.index_select(self.dim, self.index)

    class StochasticDepth(nn.Module):
        """Drops whole images ("row") or the whole batch with probability p, and scales what is left. Training only.

        Source: Huang et al. 2016.
        """

        def __init__(self, p: float = 0.0, mode: str = "row") -> None:
            super().__init__()
            self.p, self.mode = p, mode

        def forward(self, input: Tensor) -> Tensor:
            if not self.training or self.p == 0.0:
                return input
            count = input.shape[0] if self.mode == "row" else 1
            kept = torch.empty([count] + [1] * (input.dim() - 1), dtype=input.dtype, device=input.device)
            return input * (kept.bernoulli_(1 - self.p) / max(1 - self.p, 1e-12))

    return OwnModules(Parameter=Parameter, Buffer=Buffer, Gather=Gather, StochasticDepth=StochasticDepth)


class OwnModule(Layer):
    """A layer whose module is the one of `own_modules` with the type's name."""

    @classmethod
    def module_class(cls) -> Callable[..., Any]:
        kind: Callable[..., Any] = getattr(own_modules(), cls.__name__)
        return kind

    @classmethod
    def definitions(cls) -> tuple[Callable[..., Any], ...]:
        return (cls.module_class(),)
