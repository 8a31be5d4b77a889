"""Layers that compute with one, two or three tensors, without weights: sums, products, powers, reductions, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, TYPE_CHECKING

import numpy as np
from pydantic import Field, model_validator

from architectures.axes import image_dim
from architectures.layers.base import (
    FunctionLayer, OnnxWriter, Operator, Shape, Unchanging, place_of, register, traced_argument)
from architectures.layers.functions import scale_shift
from architectures.layers.tensors import Binary, axis
from metadata.errors import UserError
from metadata.schemas import Dimension, Number

if TYPE_CHECKING:
    from torch import fx

    from architectures.layers.channels import LabelBook, Labels


@register
class Subtract(Binary):
    """The difference of two tensors."""

    functions = ("operator.sub", "torch.sub", "torch.subtract")
    methods = ("sub", "subtract")
    operators = {"Sub": Operator()}
    keeps_sign = False

    def expression(self, inputs: list[str], module: str) -> str:
        return " - ".join(inputs)


@register
class Divide(Binary):
    """The quotient of two tensors, value by value."""

    functions = ("operator.truediv", "torch.div", "torch.true_divide", "torch.divide")
    methods = ("div", "divide", "true_divide")
    operators = {"Div": Operator()}

    def expression(self, inputs: list[str], module: str) -> str:
        return " / ".join(inputs)


@register
class ScaleShift(FunctionLayer):
    """A tensor times a number, plus a number."""

    functions = (scale_shift,)
    operators = {"Mul": Operator("all"), "Add": Operator("sums")}
    owns_output = True

    scale: Number = 1.0
    shift: Number = 0.0

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return inputs[0]

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        return inputs[0]

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        value = inputs[0]
        if self.scale != 1.0:
            name = self.name if not self.shift else f"{self.name}.scaled"
            value = writer.node("Mul", name, [value, writer.constant(f"{self.name}.scale", self.scale)])
        if self.shift:
            value = writer.node("Add", self.name, [value, writer.constant(f"{self.name}.shift", self.shift)])
        return value

    def expression(self, inputs: list[str], module: str) -> str:
        scaled = f"{inputs[0]} * {self.scale!r}" if self.scale != 1.0 else inputs[0]
        return f"{scaled} + {self.shift!r}" if self.shift else scaled


class Pointwise(Unchanging, FunctionLayer):
    """A function of each value for itself, without a module."""

    owns_output = True

    def expression(self, inputs: list[str], module: str) -> str:
        return f"{self.functions[0]}({inputs[0]})"


@register
class Exp(Pointwise):
    """`torch.exp`."""

    functions = ("torch.exp",)
    methods = ("exp",)
    operators = {"Exp": Operator()}
    nonnegative = True


@register
class Sqrt(Pointwise):
    """`torch.sqrt`."""

    functions = ("torch.sqrt",)
    methods = ("sqrt",)
    operators = {"Sqrt": Operator()}


@register
class Reciprocal(Pointwise):
    """`torch.reciprocal`."""

    functions = ("torch.reciprocal",)
    methods = ("reciprocal",)
    operators = {"Reciprocal": Operator()}


@register
class Erf(Pointwise):
    """`torch.erf`."""

    functions = ("torch.erf",)
    methods = ("erf",)
    operators = {"Erf": Operator()}


@register
class Clamp(Pointwise):
    """`torch.clamp` between two numbers, or with one of them."""

    functions = ("torch.clamp", "torch.clip")
    methods = ("clamp", "clip")
    operators = {"Clip": Operator("weighted")}

    min: Number | None = None
    max: Number | None = None

    @model_validator(mode="after")
    def _check_limits(self) -> Clamp:
        if self.min is None and self.max is None:
            raise ValueError(f"layer {self.name}: a Clamp needs min or max")
        return self

    @classmethod
    def from_call(cls, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        return [node.args[0]], {"min": traced_argument(node, 1, "min", None), "max": traced_argument(node, 2, "max", None)}

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        limits = [writer.constant(f"{self.name}.{key}", value) if value is not None else ""
                  for key, value in (("min", self.min), ("max", self.max))]
        return writer.node("Clip", self.name, [*inputs, *limits])

    def expression(self, inputs: list[str], module: str) -> str:
        return f"{inputs[0]}.clamp({self.min}, {self.max})"


@register
class Softmax(Unchanging):
    """`torch.nn.Softmax` along one dimension."""

    functions = ("torch.softmax", "torch.nn.functional.softmax")
    methods = ("softmax",)
    operators = {"Softmax": Operator()}
    nonnegative = owns_output = True

    dim: Dimension

    @classmethod
    def from_call(cls, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        source: Any = node.args[0]
        return [source], {"dim": image_dim(source, traced_argument(node, 1, "dim", None))}

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if axis(self.dim, len(inputs[0])) == 0:
            raise ValueError("it mixes the images of a batch")
        return inputs[0]

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        return book.constant(inputs[0], [self.dim])

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        return writer.node("Softmax", self.name, inputs, axis=self.dim)


class Reduction(FunctionLayer):
    """One number for all those along some dimensions."""

    place_of_dim: ClassVar[int] = 1  # among a call's arguments; keepdim comes next

    dim: Annotated[list[Dimension], Field(min_length=1, max_length=8)]
    keepdim: bool = False

    @classmethod
    def from_call(cls, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        source: Any = node.args[0]
        dim = traced_argument(node, cls.place_of_dim, "dim", None)
        if dim is None:
            raise UserError(f"layer {place_of(node)}: a {cls.__name__.lower()} over the batch is not in the layer table; "
                            "name the dimensions")
        return [source], {"dim": [image_dim(source, each) for each in ([dim] if isinstance(dim, int) else dim)],
                          "keepdim": traced_argument(node, cls.place_of_dim + 1, "keepdim", False)}

    def output_shape(self, inputs: list[Shape]) -> Shape:
        shape = inputs[0]
        over = [axis(dim, len(shape)) for dim in self.dim]
        if len(set(over)) < len(over) or 0 in over:
            raise ValueError(f"dim {self.dim} names a dimension twice, or that of the images")
        return tuple(1 if at in over else size for at, size in enumerate(shape) if self.keepdim or at not in over)

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        over = tuple(axis(dim, inputs[0].ndim) for dim in self.dim)
        labels = book.reduced(inputs[0], over)
        return labels if self.keepdim else labels.squeeze(over)

    def expression(self, inputs: list[str], module: str) -> str:
        return f"{inputs[0]}.{self.methods[0]}({self.dim}, keepdim={self.keepdim})"


@register
class Sum(Reduction):
    """`torch.sum` over named dimensions."""

    functions = ("torch.sum",)
    methods = ("sum",)
    operators = {"ReduceSum": Operator()}
    keeps_sign = owns_output = True

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        axes = writer.constant(f"{self.name}.axes", self.dim, np.int64)
        return writer.node("ReduceSum", self.name, [*inputs, axes], keepdims=int(self.keepdim))


@register
class Maximum(Reduction):
    """`torch.amax`: the largest number along some dimensions."""

    functions = ("torch.amax",)
    methods = ("amax",)
    operators = {"ReduceMax": Operator()}
    keeps_sign = keeps_grid = owns_output = True

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        return writer.node("ReduceMax", self.name, inputs, axes=self.dim, keepdims=int(self.keepdim))


@register
class Norm(Reduction):
    """The Euclidean norm along some dimensions: `torch.linalg.vector_norm`."""

    functions = ("torch.linalg.vector_norm",)
    operators = {"ReduceL2": Operator()}
    nonnegative = owns_output = True
    place_of_dim = 2

    @classmethod
    def from_call(cls, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        if traced_argument(node, 1, "ord", 2) not in (2, 2.0):
            raise ValueError(node)
        return super().from_call(node)

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        return writer.node("ReduceL2", self.name, inputs, axes=self.dim, keepdims=int(self.keepdim))

    def expression(self, inputs: list[str], module: str) -> str:
        return f"torch.linalg.vector_norm({inputs[0]}, dim={self.dim}, keepdim={self.keepdim})"


def product_shape(one: Shape, other: Shape) -> Shape:
    """Return the shape of a matrix product of two tensors, each with the images first.

    Raises:
        ValueError: the two do not fit.
    """
    if len(one) != len(other) or len(one) < 3 or one[-1] != other[-2]:
        raise ValueError(f"a product of {list(one)} and {list(other)} is none of matrices for each image")
    return *np.broadcast_shapes(one[:-2], other[:-2]), one[-2], other[-1]


def by_matrix(book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
    """Return the labels of a function of matrices that takes each matrix as a whole."""
    return book.elementwise([book.constant(labels, (-2, -1)) for labels in inputs],
                            [(*shape[:-2], 1, 1) for shape in shapes])


@register
class MatMul(FunctionLayer):
    """The matrix product of two tensors, for each image by itself."""

    input_count = (2, 2)
    functions = ("torch.matmul",)
    operators = {"MatMul": Operator("weighted")}
    owns_output = keeps_sign = True

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return product_shape(*inputs)

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        """Let whole matrices go where there are several, else the positions that the product sums over.

        Rows of the first and columns of the second go where nothing else does.
        """
        if any(labels.shape[at] > 1 for labels in inputs for at in range(1, labels.ndim - 2)):
            return by_matrix(book, inputs, shapes)
        one, other = inputs
        rows = one.shape[-2] > 1
        one = book.constant(one, [-1 if rows else -2])
        columns = not rows and one.shape[-1] == 1 and other.shape[-1] > 1
        other = book.constant(other, [-2 if columns else -1])
        if rows or columns:
            book.constant(other if rows else one, (-2, -1))
            return one if rows else other
        summed = [(*shape[:-2], 1, size) for shape, size in zip(shapes, (shapes[0][-1], shapes[1][-2]), strict=True)]
        book.elementwise([one, other.swapaxes(-1, -2)], summed)
        return np.zeros([1] * one.ndim, np.int64)

    def macs(self, inputs: Sequence[Shape], output_shape: Shape) -> int:
        return math.prod(output_shape) * inputs[0][-1]

    def expression(self, inputs: list[str], module: str) -> str:
        return " @ ".join(inputs)


@register
class ScaledDotProduct(FunctionLayer):
    """Attention: softmax(queries keys^T scale + mask) values, as `torch.nn.functional.scaled_dot_product_attention`."""

    input_count = (3, 4)
    functions = ("torch.nn.functional.scaled_dot_product_attention",)
    operators = {"MatMul": Operator("weighted"), "Transpose": Operator("all"), "Softmax": Operator(),
                 "Mul": Operator("all"), "Add": Operator("sums")}
    owns_output = True

    scale: Annotated[Number, Field(gt=0)]

    def output_shape(self, inputs: list[Shape]) -> Shape:
        queries, keys, values, *mask = inputs
        scores = product_shape(queries, (*keys[:-2], keys[-1], keys[-2]))
        if mask and np.broadcast_shapes(scores, mask[0]) != scores:
            raise ValueError(f"a mask {list(mask[0])} does not fit scores {list(scores)}")
        return product_shape(scores, values)

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        """Let whole heads go where there are several, else channels."""
        if any(labels.shape[at] > 1 for labels in inputs for at in range(1, labels.ndim - 2)):
            return by_matrix(book, inputs, shapes)
        queries, keys, values = (book.constant(labels, [-2]) for labels in inputs[:3])
        book.elementwise([queries, keys], [(*shape[:-2], 1, shape[-1]) for shape in shapes[:2]])
        for mask in inputs[3:]:
            book.constant(mask, range(1, mask.ndim))
        return values

    def macs(self, inputs: Sequence[Shape], output_shape: Shape) -> int:
        queries, keys = inputs[0], inputs[1]
        return math.prod(queries) * keys[-2] + math.prod(output_shape) * keys[-2]

    def work(self, inputs: Sequence[Shape], output_shape: Shape) -> int:
        scores = math.prod(inputs[0][:-1]) * inputs[1][-2]
        return super().work(inputs, output_shape) + 4 * scores

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        name, rank = self.name, len(shape) + 1
        queries, keys, values, *mask = inputs
        order = [*range(rank - 2), rank - 1, rank - 2]
        scaled = writer.node("Mul", f"{name}.scaled", [queries, writer.constant(f"{name}.scale", self.scale)])
        turned = writer.node("Transpose", f"{name}.keys", [keys], perm=order)
        scores = writer.node("MatMul", f"{name}.scores", [scaled, turned])
        if mask:
            scores = writer.node("Add", f"{name}.masked", [scores, *mask])
        return writer.node("MatMul", name, [writer.node("Softmax", f"{name}.weights", [scores], axis=rank - 1), values])

    def expression(self, inputs: list[str], module: str) -> str:
        return f"nn.functional.scaled_dot_product_attention({', '.join(inputs)}, scale={self.scale!r})"

