"""Activations: functions of each value for itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TYPE_CHECKING

import numpy as np

from architectures.layers.base import (
    Layer, OnnxWriter, Operator, Shape, Unchanging, register, traced_argument, traced_tensors, with_channels)
from metadata.schemas import Number, Size

if TYPE_CHECKING:
    from torch import fx

    from architectures.layers.channels import Kept, LabelBook, Labels


@register
class ReLU(Unchanging):
    """`torch.nn.ReLU`."""

    functions = ("torch.nn.functional.relu", "torch.relu")
    methods = ("relu",)
    operators = {"Relu": Operator("weighted", passes_factors_on=True)}
    nonnegative = keeps_grid = owns_output = True
    post_op = ("relu", [])
    post_op_anywhere = True


@register
class ReLU6(Unchanging):
    """`torch.nn.ReLU6`."""

    functions = ("torch.nn.functional.relu6",)
    operators = {"Clip": Operator("weighted")}
    nonnegative = owns_output = True
    post_op = ("hardtanh", [0.0, 6.0])

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        return writer.node("Clip", self.name, [*inputs, writer.constant(f"{self.name}.min", 0.0),
                                               writer.constant(f"{self.name}.max", 6.0)])


@register
class SiLU(Unchanging):
    """`torch.nn.SiLU`."""

    functions = ("torch.nn.functional.silu",)
    operators = {"Sigmoid": Operator("all"), "Mul": Operator("all")}
    owns_output = True
    post_op = ("swish", [])

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        return writer.node("Mul", self.name, [*inputs, writer.node("Sigmoid", f"{self.name}.sigmoid", inputs)])


@register
class Hardswish(Unchanging):
    """`torch.nn.Hardswish`."""

    functions = ("torch.nn.functional.hardswish",)
    operators = {"HardSwish": Operator("all")}
    owns_output = True
    post_op = ("hardswish", [])


@register
class Hardsigmoid(Unchanging):
    """`torch.nn.Hardsigmoid`."""

    functions = ("torch.nn.functional.hardsigmoid",)
    operators = {"HardSigmoid": Operator("all")}
    nonnegative = True

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        return writer.node("HardSigmoid", self.name, inputs, alpha=1 / 6, beta=0.5)


@register
class Sigmoid(Unchanging):
    """`torch.nn.Sigmoid`."""

    functions = ("torch.sigmoid", "torch.nn.functional.sigmoid")
    methods = ("sigmoid",)
    operators = {"Sigmoid": Operator("all")}
    nonnegative = True


@register
class Tanh(Unchanging):
    """`torch.nn.Tanh`."""

    functions = ("torch.tanh", "torch.nn.functional.tanh")
    methods = ("tanh",)
    operators = {"Tanh": Operator()}


@register
class LeakyReLU(Unchanging):
    """`torch.nn.LeakyReLU`."""

    functions = ("torch.nn.functional.leaky_relu",)
    operators = {"LeakyRelu": Operator("all", passes_factors_on=True)}

    negative_slope: Number = 0.01

    @classmethod
    def from_call(cls, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        return [node.args[0]], {"negative_slope": traced_argument(node, 1, "negative_slope", 0.01)}

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        return writer.node("LeakyRelu", self.name, inputs, alpha=self.negative_slope)


@register
class GELU(Unchanging):
    """`torch.nn.GELU`."""

    functions = ("torch.nn.functional.gelu",)
    operators = {"Div": Operator(), "Erf": Operator(), "Pow": Operator(), "Tanh": Operator(), "Mul": Operator("all"),
                 "Add": Operator("sums")}

    approximate: Literal["none", "tanh"] = "none"

    @classmethod
    def from_call(cls, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        return list(traced_tensors(node)), dict(node.kwargs)

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        """Write x/2 (1 + erf(x / sqrt 2)), or with tanh(sqrt(2/pi) (x + 0.044715 x^3)).

        Opset 17 has no GELU; runtimes recognise these nodes. Source: Hendrycks and Gimpel 2016.
        """
        name = self.name
        one, half = writer.constant(f"{name}.one", 1.0), writer.constant(f"{name}.half", 0.5)
        if self.approximate == "none":
            scaled = writer.node("Div", f"{name}.scaled", [*inputs, writer.constant(f"{name}.root", np.sqrt(2.0))])
            curve = writer.node("Erf", f"{name}.erf", [scaled])
        else:
            cube = writer.node("Pow", f"{name}.cube", [*inputs, writer.constant(f"{name}.three", 3.0)])
            small = writer.node("Mul", f"{name}.small", [cube, writer.constant(f"{name}.factor", 0.044715)])
            inner = writer.node("Add", f"{name}.inner", [*inputs, small])
            root = writer.constant(f"{name}.root", np.sqrt(2 / np.pi))
            curve = writer.node("Tanh", f"{name}.tanh", [writer.node("Mul", f"{name}.scaled", [inner, root])])
        gate = writer.node("Add", f"{name}.gate", [curve, one])
        return writer.node("Mul", name, [writer.node("Mul", f"{name}.gated", [*inputs, gate]), half])


@register
class PReLU(Layer):
    """`torch.nn.PReLU`: a slope below zero for each channel, or one for all."""

    operators = {"PRelu": Operator(passes_factors_on=True)}
    owns_output = True

    num_parameters: Size = 1

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if self.num_parameters > 1:
            with_channels(inputs[0], self.num_parameters, *range(2, 10))
        return inputs[0]

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        return inputs[0]

    def pruned(self, kept: Kept, weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.num_parameters == 1:
            return {}, {}
        channels = kept.output[1]
        return {"num_parameters": len(channels)}, {"weight": weights["weight"][channels]}

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        slopes = writer.weight(self, "weight").reshape(-1, *[1] * (len(shape) - 1))
        return writer.node("PRelu", self.name, [*inputs, writer.constant(f"{self.name}.weight", slopes)])
