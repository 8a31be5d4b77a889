"""Layers that move, join or combine tensors, and those that do nothing in evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, TYPE_CHECKING

import numpy as np
from pydantic import Field

from architectures.axes import image_dim
from architectures.layers.base import (
    FunctionLayer, Layer, OnnxWriter, Operator, Shape, Unchanging, outside, place_of, register, resolved, traced_argument,
    traced_tensors)
from metadata.errors import UserError
from metadata.schemas import Dimension

if TYPE_CHECKING:
    from torch import fx

    from architectures.layers.channels import LabelBook, Labels


@register
class Identity(Unchanging):
    """`torch.nn.Identity`."""

    methods = ("contiguous",)
    identity = keeps_grid = True


@register
class Flatten(Layer):
    """`torch.nn.Flatten`, and `x.view(x.size(0), -1)`, the old way to write it."""

    functions = ("torch.flatten", "torch.reshape")
    methods = ("flatten", "view", "reshape")
    operators = {"Flatten": Operator("sums"), "Reshape": Operator("all")}
    keeps_sign = keeps_grid = True

    start_dim: Dimension = 1
    end_dim: Dimension = -1

    @classmethod
    def needs_shapes(cls, node: fx.Node) -> bool:
        return "flatten" not in str(node.target)

    @classmethod
    def from_call(cls, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        if "flatten" in str(node.target):
            return [node.args[0]], {"start_dim": traced_argument(node, 1, "start_dim", 0),
                                    "end_dim": traced_argument(node, 2, "end_dim", -1)}
        raise outside(place_of(node), "a reshape of unknown shapes")

    def output_shape(self, inputs: list[Shape]) -> Shape:
        shape = inputs[0]
        start, end = (axis(dim, len(shape)) for dim in (self.start_dim, self.end_dim))
        if start > end:
            raise ValueError(f"start_dim {self.start_dim} comes after end_dim {self.end_dim}")
        return *shape[:start], math.prod(shape[start:end + 1]), *shape[end + 1:]

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        return book.reshaped(inputs[0], shapes[0], self.output_shape(shapes))

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        if self.start_dim == 1 and self.end_dim in (-1, len(shape)):
            return writer.node("Flatten", self.name, inputs, axis=1)
        target = writer.constant(f"{self.name}.shape", [-1, *writer.shape(self.name)], np.int64)
        return writer.node("Reshape", self.name, [*inputs, target])


@register
class Mean(FunctionLayer):
    """`torch.mean` over named dimensions."""

    functions = ("torch.mean",)
    methods = ("mean",)
    operators = {"ReduceMean": Operator(), "GlobalAveragePool": Operator("sums", passes_factors_on=True),
                 "Flatten": Operator("sums")}
    keeps_sign = True

    dim: Annotated[list[Dimension], Field(max_length=8)]
    keepdim: bool = False

    @classmethod
    def from_call(cls, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        source: Any = node.args[0]
        dim = traced_argument(node, 1, "dim", None)
        if dim is None:
            raise UserError(f"layer {place_of(node)}: a mean over the batch is not in the layer table; name the dimensions")
        return [source], {"dim": [image_dim(source, each) for each in ([dim] if isinstance(dim, int) else dim)],
                                "keepdim": traced_argument(node, 2, "keepdim", False)}

    def output_shape(self, inputs: list[Shape]) -> Shape:
        shape = inputs[0]
        over = [axis(dim, len(shape)) for dim in self.dim] or list(range(len(shape)))  # as torch: none means all
        if len(set(over)) < len(over):
            raise ValueError(f"dim {self.dim} names a dimension twice")
        return tuple(1 if at in over else size for at, size in enumerate(shape) if self.keepdim or at not in over)

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        over = [axis(dim, inputs[0].ndim) for dim in self.dim] or list(range(inputs[0].ndim))
        labels = book.reduced(inputs[0], over)
        return labels if self.keepdim else labels.squeeze(tuple(over))

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        axes = sorted(dim % (len(shape) + 1) for dim in self.dim)
        if axes != [2, 3] or len(shape) != 3:
            return writer.node("ReduceMean", self.name, inputs, axes=axes, keepdims=int(self.keepdim))
        if self.keepdim:  # runtimes have int8 kernels for this pooling, and none for the mean
            return writer.node("GlobalAveragePool", self.name, inputs)
        pooled = writer.node("GlobalAveragePool", f"{self.name}.pooled", inputs)
        return writer.node("Flatten", self.name, [pooled], axis=1)

    def expression(self, inputs: list[str], module: str) -> str:
        return f"{inputs[0]}.mean({self.dim}, keepdim={self.keepdim})"


class Binary(FunctionLayer):
    """An operation on two tensors of one shape, or of shapes that broadcast."""

    input_count = (2, 2)
    call_inputs = ("input", "other")
    broadcasts = keeps_sign = owns_output = True

    @classmethod
    def from_call(cls, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        if more := ", ".join(f"{name}={value}" for name, value in node.kwargs.items() if name not in cls.call_inputs):
            raise UserError(f"layer {place_of(node)}: {cls.__name__} has no option {more} in the layer table")
        if len(node.args) != 2 or len(traced_tensors(node)) != 2 or node.kwargs:
            raise UserError(f"layer {place_of(node)}: {cls.__name__} takes two tensors here; constants are not in the "
                            "layer table")
        return list(traced_tensors(node)), {}

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return np.broadcast_shapes(*inputs)

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        return book.elementwise(inputs, shapes)


@register
class Add(Binary):
    """The sum of two tensors."""

    functions = ("operator.add", "_operator.iadd", "torch.add")
    methods = ("add",)
    operators = {"Add": Operator("sums")}

    def expression(self, inputs: list[str], module: str) -> str:
        return " + ".join(inputs)


@register
class Multiply(Binary):
    """The product of two tensors, value by value."""

    functions = ("operator.mul", "_operator.imul", "torch.mul")
    methods = ("mul",)
    operators = {"Mul": Operator("all")}

    def expression(self, inputs: list[str], module: str) -> str:
        return " * ".join(inputs)


@register
class Concat(FunctionLayer):
    """Tensors joined along a dimension."""

    input_count = (1, 1000)
    functions = ("torch.cat", "torch.concat", "torch.concatenate")
    call_inputs = ("tensors",)
    operators = {"Concat": Operator("all"), "Shape": Operator(), "Expand": Operator()}  # these repeat what is stored once
    keeps_sign = owns_output = True

    dim: Dimension = 1

    @classmethod
    def from_call(cls, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        sources: Any = list(node.args[0])  # type: ignore[arg-type]
        return sources, {"dim": image_dim(sources[0], traced_argument(node, 1, "dim", 0))}

    def call(self, inputs: list[Any]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        return resolved("torch.cat"), (inputs,), self.options()

    def output_shape(self, inputs: list[Shape]) -> Shape:
        at = axis(self.dim, len(inputs[0]))
        around = {(*shape[:at], *shape[at + 1:]) for shape in inputs}
        if len({len(shape) for shape in inputs}) > 1 or len(around) > 1:
            raise ValueError(f"the shapes {[list(shape) for shape in inputs]} differ elsewhere than in dim {self.dim}")
        return *inputs[0][:at], sum(shape[at] for shape in inputs), *inputs[0][at + 1:]

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        return book.joined(inputs, shapes, axis(self.dim, len(shapes[0])))

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        return writer.node("Concat", self.name, writer.for_each_image(inputs, self.name), axis=self.dim)

    def expression(self, inputs: list[str], module: str) -> str:
        return f"torch.cat([{', '.join(inputs)}], dim={self.dim})"


def joined_dims(before: Shape, after: Shape) -> tuple[int, int] | None:
    """Return the first and the last of the dimensions, but the batch, that a reshape joins; None where it does more."""
    more = len(before) - len(after)
    for start in range(1, len(before) - more if more >= 0 else 0):
        end = start + more
        if after == (*before[:start], math.prod(before[start:end + 1]), *before[end + 1:]):
            return start, end
    return None


def axis(dim: int, dimensions: int) -> int:
    """Return a dimension, which may be counted from the end, counted from the start.

    Raises:
        IndexError: there is no such dimension.
    """
    if not -dimensions <= dim < dimensions:
        raise IndexError(f"there is no dimension {dim} of {dimensions}")
    return dim % dimensions
