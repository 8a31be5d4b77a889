"""Layers that move numbers and compute nothing: other shapes, orders and parts of a tensor. The images stay first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, TYPE_CHECKING

import numpy as np
from pydantic import Field, model_validator

from architectures.layers.base import FunctionLayer, OnnxWriter, Operator, Shape, register
from architectures.layers.functions import reshape_images, take_slice
from architectures.layers.modules import OwnModule
from architectures.layers.tensors import axis
from metadata.schemas import Number, Size

if TYPE_CHECKING:
    from torch import Tensor, fx

    from architectures.layers.channels import Kept, LabelBook, Labels

Positive = Annotated[int, Field(ge=1, le=7)]  # a dimension that is not that of the images
Position = Annotated[int, Field(ge=0, le=2**20)]


class Move(FunctionLayer):
    """A layer whose output's numbers are numbers of its input."""

    keeps_sign = keeps_grid = True

    @classmethod
    def needs_shapes(cls, node: fx.Node) -> bool:
        return True


@register
class Reshape(Move):
    """Another shape for each image's numbers, in the same order."""

    functions = (reshape_images,)
    operators = {"Reshape": Operator("all")}

    shape: Annotated[list[Size], Field(min_length=1, max_length=8)]

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if math.prod(inputs[0][1:]) != math.prod(self.shape):
            raise ValueError(f"shape {self.shape} does not hold the numbers of {list(inputs[0][1:])}")
        return inputs[0][0], *self.shape

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        return book.reshaped(inputs[0], shapes[0], self.output_shape(shapes))

    def pruned(self, kept: Kept, weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"shape": [len(indices) for indices in kept.output[1:]]}, {}

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        target = writer.constant(f"{self.name}.shape", [-1, *self.shape], np.int64)
        return writer.node("Reshape", self.name, [*inputs, target])

    def expression(self, inputs: list[str], module: str) -> str:
        return f"{inputs[0]}.reshape(-1, {', '.join(map(str, self.shape))})"


@register
class Permute(Move):
    """The dimensions in another order; the images stay first."""

    functions = ("torch.permute",)
    operators = {"Transpose": Operator("all")}

    dims: Annotated[list[Annotated[int, Field(ge=0, le=8)]], Field(min_length=2, max_length=9)]

    @model_validator(mode="after")
    def _check_dims(self) -> Permute:
        if self.dims[0] != 0 or sorted(self.dims) != list(range(len(self.dims))):
            raise ValueError(f"layer {self.name}: dims {self.dims} is no order that keeps the images first")
        return self

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if len(inputs[0]) != len(self.dims):
            raise ValueError(f"expected {len(self.dims)} dimensions, got {list(inputs[0])}")
        return tuple(inputs[0][dim] for dim in self.dims)

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        return inputs[0].transpose(self.dims)

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        return writer.node("Transpose", self.name, inputs, perm=self.dims)

    def expression(self, inputs: list[str], module: str) -> str:
        return f"{inputs[0]}.permute({', '.join(map(str, self.dims))})"


@register
class Slice(Move):
    """The positions `start:stop:step` along a dimension."""

    functions = (take_slice,)
    operators = {"Slice": Operator("all")}

    dim: Positive
    start: Position
    stop: Position
    step: Size = 1

    def output_shape(self, inputs: list[Shape]) -> Shape:
        shape, at = inputs[0], axis(self.dim, len(inputs[0]))
        if not self.start < self.stop <= shape[at]:
            raise ValueError(f"{self.start} to {self.stop} does not lie in the {shape[at]} positions of dimension {at}")
        return *shape[:at], len(range(self.start, self.stop, self.step)), *shape[at + 1:]

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        """Let a slice with a step take what it takes: without some of the positions it would be none."""
        labels = book.constant(inputs[0], [self.dim]) if self.step > 1 else inputs[0]
        return labels if labels.shape[self.dim] == 1 else labels.take(range(self.start, self.stop), self.dim)

    def pruned(self, kept: Kept, weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.step > 1:
            return {}, {}
        start = int(np.searchsorted(kept.inputs[0][self.dim], self.start))
        return {"start": start, "stop": start + len(kept.output[self.dim])}, {}

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        numbers = [writer.constant(f"{self.name}.{key}", [value], np.int64) for key, value in
                   (("starts", self.start), ("ends", self.stop), ("axes", self.dim), ("steps", self.step))]
        return writer.node("Slice", self.name, [*inputs, *numbers])

    def expression(self, inputs: list[str], module: str) -> str:
        step = f":{self.step}" if self.step > 1 else ""
        return f"{inputs[0]}[{':, ' * self.dim}{self.start}:{self.stop}{step}]"


@register
class Pad(Move):
    """`torch.nn.functional.pad` with one number: before and after the last dimension, then the one before it."""

    functions = ("torch.nn.functional.pad",)
    operators = {"Pad": Operator("all")}
    keeps_sign = keeps_grid = False

    pad: Annotated[list[Annotated[int, Field(ge=0, le=2**16)]], Field(min_length=2, max_length=8)]
    value: Number = 0.0

    def output_shape(self, inputs: list[Shape]) -> Shape:
        shape = list(inputs[0])
        if len(self.pad) % 2 or len(self.pad) // 2 >= len(shape):
            raise ValueError(f"pad {self.pad} does not fit {list(inputs[0])}")
        for index, size in enumerate(self.pad):
            shape[-1 - index // 2] += size
        return tuple(shape)

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        """Let padding be removed along an axis that loses something."""
        labels = inputs[0]
        for at in range(len(self.pad) // 2):
            along = labels.ndim - 1 - at
            if labels.shape[along] > 1:
                labels = np.concatenate([
                    book.fresh(*labels.shape[:along], self.pad[2 * at], *labels.shape[along + 1:]), labels,
                    book.fresh(*labels.shape[:along], self.pad[2 * at + 1], *labels.shape[along + 1:])], along)
        return labels

    def pruned(self, kept: Kept, weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        pad = []
        for at in range(len(self.pad) // 2):
            before = int(np.searchsorted(kept.output[-1 - at], self.pad[2 * at]))
            pad += [before, len(kept.output[-1 - at]) - before - len(kept.inputs[0][-1 - at])]
        return {"pad": pad}, {}

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        sides = [(0, 0)] * (len(shape) + 1)
        for index in range(0, len(self.pad), 2):
            sides[-1 - index // 2] = (self.pad[index], self.pad[index + 1])
        amounts = [before for before, _ in sides] + [after for _, after in sides]
        pads = writer.constant(f"{self.name}.pads", amounts, np.int64)
        return writer.node("Pad", self.name, [*inputs, pads, writer.constant(f"{self.name}.value", self.value)])

    def expression(self, inputs: list[str], module: str) -> str:
        return f"nn.functional.pad({inputs[0]}, {self.pad}, value={self.value})"


@register
class Gather(OwnModule):
    """Positions along a dimension, in an order that the weights hold."""

    operators = {"Gather": Operator()}
    keeps_sign = keeps_grid = True

    dim: Positive
    count: Size

    def parameters(self) -> int:
        return self.count

    def check_weights(self, weights: Mapping[str, Tensor], inputs: list[Shape]) -> None:
        size, index = inputs[0][self.dim - 1], weights["index"]
        if not bool(((index >= 0) & (index < size)).all()):
            raise ValueError(f"index holds a position outside the {size} of dimension {self.dim}")

    def output_shape(self, inputs: list[Shape]) -> Shape:
        shape, at = inputs[0], axis(self.dim, len(inputs[0]))
        return *shape[:at], self.count, *shape[at + 1:]

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        labels = inputs[0]
        return labels if labels.shape[self.dim] == 1 else labels.take(book.weight(self, "index"), self.dim)

    def pruned(self, kept: Kept, weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        taken = weights["index"][kept.output[self.dim]]
        places = np.searchsorted(kept.inputs[0][self.dim], taken.tolist())
        return {"count": len(taken)}, {"index": taken.new_tensor(places)}

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        index = writer.constant(f"{self.name}.index", writer.weight(self, "index"), np.int64)
        return writer.node("Gather", self.name, [*inputs, index], axis=self.dim)


class Stored(OwnModule):
    """A tensor of the network's own, the same for every image: (N, *shape). Its input says how many images there are."""

    shape: Annotated[list[Size], Field(max_length=8)]

    def parameters(self) -> int:
        return math.prod(self.shape)

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return inputs[0][0], *self.shape

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        return book.fresh(1, *self.shape)

    def pruned(self, kept: Kept, weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        stays = kept.output[1:]
        return {"shape": [len(indices) for indices in stays]}, {"value": weights["value"][np.ix_(*stays)]}

    def work(self, inputs: Any, output_shape: Shape) -> int:
        return math.prod(output_shape)

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        return writer.constant(self.name, writer.weight(self, "value")[None])


@register
class Parameter(Stored):
    """A tensor that is learned: a class token, positions, a scale for each channel."""


@register
class Buffer(Stored):
    """A tensor that is not learned: a mask, means to subtract."""
