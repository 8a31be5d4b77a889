"""Layers with weights: convolutions and matrix products, float and dynamic int8."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TYPE_CHECKING

import numpy as np
from pydantic import model_validator

from architectures.layers.base import Layer, OnnxWriter, Operator, Shape, outside, register, windows, with_channels
from metadata.schemas import Padding, Pair, Size

if TYPE_CHECKING:
    from torch import nn

    from architectures.layers.channels import Kept, LabelBook, Labels


class Convolution(Layer):
    """A convolution of images, float or int8."""

    weighted = owns_output = True
    channel_axis = 1

    in_channels: Size
    out_channels: Size
    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Padding = (0, 0)
    dilation: Pair = (1, 1)
    groups: Size = 1

    @model_validator(mode="after")
    def _check_groups(self) -> Convolution:
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"layer {self.name}: groups {self.groups} does not divide {self.in_channels} -> "
                             f"{self.out_channels} channels")
        return self

    @property
    def width(self) -> int:
        return self.out_channels

    def output_shape(self, inputs: list[Shape]) -> Shape:
        count, _, *sizes = with_channels(inputs[0], self.in_channels, 4)
        return count, self.out_channels, *map(windows, sizes, self.kernel_size, self.stride, self.padding, self.dilation)

    def macs(self, inputs: Sequence[Shape], output_shape: Shape) -> int:
        return math.prod(output_shape) * self.in_channels // self.groups * math.prod(self.kernel_size)

    @property
    def depthwise(self) -> bool:
        """Whether every output channel has one input channel of its own."""
        return self.groups == self.in_channels > 1

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        """Let each group lose the same channels of its inputs and outputs; a depthwise group goes with its input.

        A convolution of one image of channels (efficient channel attention) mixes those that stay, as a norm does.
        """
        if self.out_channels == inputs[0].shape[1] == 1 < inputs[0].size and self.output_shape(shapes) == shapes[0]:
            return inputs[0]
        channels = book.constant(inputs[0], (-2, -1))
        if self.depthwise:
            return channels if channels.shape[1] == 1 else channels.repeat(self.out_channels // self.groups, axis=1)
        outputs = book.fresh(1, self.out_channels, 1, 1)
        for labels in (channels, outputs):
            book.alike(labels, 1, self.groups)
        return outputs

    def pruned(self, kept: Kept, weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs, outputs = kept.inputs[0][1], kept.output[1]
        of_a_group = inputs[inputs < self.in_channels // self.groups]
        weight = weights["weight"][outputs]
        changed = {"weight": weight if self.depthwise else weight[:, of_a_group]}
        if "bias" in weights:
            changed["bias"] = weights["bias"][outputs]
        return {"in_channels": len(inputs), "out_channels": len(outputs),
                "groups": len(inputs) if self.depthwise else self.groups}, changed


@register
class Conv2d(Convolution):
    """`torch.nn.Conv2d` that pads with zeros."""

    operators = {"Conv": Operator("weighted")}

    bias: bool = True

    @classmethod
    def from_module(cls, module: nn.Module, name: str) -> dict[str, Any]:
        if module.padding_mode != "zeros":
            raise outside(name, "Conv2d with padding_mode or divisor_override")
        options = super().from_module(module, name)
        return options | {"bias": module.bias is not None, "padding": cls._explicit_padding(options, name)}

    @staticmethod
    def _explicit_padding(options: dict[str, Any], name: str) -> tuple[int, ...]:
        padding: tuple[int, ...] | str = options["padding"]
        if not isinstance(padding, str):
            return padding
        if padding == "valid":
            return 0, 0
        total = [step * (size - 1) for step, size in zip(options["dilation"], options["kernel_size"], strict=True)]
        if any(amount % 2 for amount in total):
            raise outside(name, "padding 'same' with an even kernel pads unevenly and")
        return tuple(amount // 2 for amount in total)

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        inputs = [*inputs, writer.parameter(self, "weight"), onnx_bias(writer, self, self.bias, self.out_channels)]
        return writer.node("Conv", self.name, inputs, kernel_shape=self.kernel_size, strides=self.stride,
                           pads=[*self.padding, *self.padding], dilations=self.dilation, group=self.groups)


class MatrixProduct(Layer):
    """A linear layer, float or int8."""

    weighted = owns_output = True
    channel_axis = -1

    in_features: Size
    out_features: Size

    @property
    def width(self) -> int:
        return self.out_features

    def output_shape(self, inputs: list[Shape]) -> Shape:
        *shape, features = inputs[0]
        if features != self.in_features:
            raise ValueError(f"expected {self.in_features} features, got {list(inputs[0])}")
        return *shape, self.out_features

    def macs(self, inputs: Sequence[Shape], output_shape: Shape) -> int:
        return math.prod(output_shape) * self.in_features

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        """Give the outputs labels of their own, unless only axes that the layer does not look at have some."""
        labels = inputs[0]
        if labels.shape[-1] == 1 and labels.size > 1:
            return labels
        book.constant(labels, range(labels.ndim - 1))
        return book.fresh(*[1] * (labels.ndim - 1), self.out_features)

    def pruned(self, kept: Kept, weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs, outputs = kept.inputs[0][-1], kept.output[-1]
        changed = {"weight": weights["weight"][outputs][:, inputs]}
        if "bias" in weights:
            changed["bias"] = weights["bias"][outputs]
        return {"in_features": len(inputs), "out_features": len(outputs)}, changed


@register
class Linear(MatrixProduct):
    """`torch.nn.Linear`."""

    operators = {"Gemm": Operator("weighted"), "MatMul": Operator("weighted"), "Add": Operator("sums")}

    bias: bool = True

    @classmethod
    def from_module(cls, module: nn.Module, name: str) -> dict[str, Any]:
        return super().from_module(module, name) | {"bias": module.bias is not None}

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        if len(shape) == 1:  # (N, features)
            inputs = [*inputs, writer.parameter(self, "weight"), onnx_bias(writer, self, self.bias, self.out_features)]
            return writer.node("Gemm", self.name, inputs, transB=1)
        weight = writer.constant(f"{self.name}.weight", writer.weight(self, "weight").T)
        product = writer.node("MatMul", f"{self.name}.product", [*inputs, weight])
        return writer.node("Add", self.name, [product, onnx_bias(writer, self, self.bias, self.out_features)])


@register
class Int8Conv2d(Convolution):
    """A convolution whose weights are int8; `activations` says what the products are computed in."""

    int8 = True

    activations: Literal["int8", "float32"] = "int8"


@register
class Int8Linear(MatrixProduct):
    """A linear layer whose weights are int8; `activations` says what the products are computed in."""

    int8 = True

    activations: Literal["int8", "float32"] = "int8"


def onnx_bias(writer: OnnxWriter, layer: Layer, has_bias: bool, outputs: int) -> str:
    """Write a layer's bias, or zeros where the layer has none, and return its name.

    OpenVINO 2026 computes wrong int8 sums for small batches behind a Gemm without a bias. Bias correction also needs one.
    """
    return writer.parameter(layer, "bias") if has_bias else writer.constant(f"{layer.name}.bias", np.zeros(outputs))
