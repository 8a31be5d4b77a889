"""The torch module that an ONNX file becomes: its layers as modules, and a list of calls.

A layer with weights is a module of torch.nn, named as the file names its weights. Everything else is a call of a torch
function. The number of images in a batch is free, whatever the file fixes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Function = Callable[..., Any]


@dataclass(frozen=True)
class ImageCount:
    """Stands for a size that is the number of images, times a number, among the arguments of a call."""

    times: int = 1


@dataclass(frozen=True)
class Slot:
    """Stands for the value of an earlier call, by its number; 0 is the images."""

    number: int


@dataclass(frozen=True)
class KeptTensor:
    """Stands for a parameter or a buffer of the network, by its name."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Call:
    """One step of the network.

    Args:
        target: a function, or the name of a module of the network.
        args: positional arguments; `ImageCount`, `Slot` and `KeptTensor` stand for what is known only in a forward pass.
        kwargs: named arguments, as they are.
        output: the slot of the result.
        last: slots that no later call reads.
        place: the operator and the node of the file that it stands for.
    """

    target: Function | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: int
    last: tuple[int, ...] = ()
    place: str = ""


def expand_to(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return a tensor whose axes of one are repeated to the sizes; a method, so that a trace sees it."""
    return tensor.expand(*sizes)


class OnnxNetwork(nn.Module):
    """A network that was read from an ONNX file: (N, C, H, W) float32 -> (N, classes) logits.

    Args:
        calls: in order; `architectures.onnx_network.builder` makes them.
        result: the slot of the logits.
        classes: their number.
    """

    def __init__(self, calls: list[Call], result: int, classes: int) -> None:
        super().__init__()
        self.calls, self.result, self.classes = calls, result, classes
        self.remarks: list[str] = []  # one line about each change that reading the file made

    def forward(self, images: Tensor) -> Tensor:
        count = images.shape[0]
        values: dict[int, Any] = {0: images}
        for call in self.calls:
            place_in_file = call.place  # noqa: F841  (a trace names it: architectures.tracing.STATED_PLACE)
            args = [self._filled(value, values, count) for value in call.args]
            target = self.get_submodule(call.target) if isinstance(call.target, str) else call.target
            values[call.output] = target(*args, **call.kwargs)
            for number in call.last:
                del values[number]
        logits: Tensor = values[self.result]
        return logits

    def _filled(self, value: Any, values: dict[int, Any], count: int) -> Any:
        """Return an argument with the values of this forward pass."""
        if isinstance(value, Slot):
            return values[value.number]
        if isinstance(value, ImageCount):
            return count * value.times if value.times != 1 else count
        if isinstance(value, KeptTensor):
            owner, _, name = value.name.rpartition(".")
            return getattr(self.get_submodule(owner), name)
        if isinstance(value, list | tuple):
            return type(value)(self._filled(entry, values, count) for entry in value)
        return value
