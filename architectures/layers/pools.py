"""Pooling layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from architectures.layers.base import (
    Layer, OnnxWriter, Operator, Shape, outside, place_of, register, traced_argument, traced_tensors, windows)
from metadata.errors import UserError
from metadata.schemas import Padding, Pair

if TYPE_CHECKING:
    from torch import fx, nn

    from architectures.layers.channels import LabelBook, Labels


class Windows(Layer):
    """A layer that joins the numbers of a channel in windows of the image."""

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        return book.constant(inputs[0], (-2, -1))


class Pool(Windows):
    """A pool of windows of a fixed size."""

    # The arguments of the function in torch.nn.functional, in order, and their defaults.
    arguments: ClassVar[dict[str, Any]]
    keeps_sign = owns_output = True

    kernel_size: Pair
    stride: Pair
    padding: Padding = (0, 0)
    ceil_mode: bool = False

    @classmethod
    def from_call(cls, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        options = {name: traced_argument(node, position, name, default)
                   for position, (name, default) in enumerate(cls.arguments.items(), start=1)}
        if options.pop("divisor_override", None) is not None or options.pop("return_indices", False):
            raise outside(place_of(node), f"{cls.__name__} with divisor_override or return_indices")
        options["stride"] = options["stride"] or options["kernel_size"]
        return list(traced_tensors(node)[:1]), options

    @property
    def spread(self) -> tuple[int, int]:
        """The dilation of the windows."""
        return 1, 1

    def output_shape(self, inputs: list[Shape]) -> Shape:
        *around, height, width = images(inputs[0])
        if any(2 * pad > kernel for pad, kernel in zip(self.padding, self.kernel_size, strict=True)):
            raise ValueError(f"padding {list(self.padding)} is more than half of the window {list(self.kernel_size)}")
        return *around, *(windows(*axis, self.ceil_mode) for axis in zip(
            (height, width), self.kernel_size, self.stride, self.padding, self.spread, strict=True))

    def work(self, inputs: Sequence[Shape], output_shape: Shape) -> int:
        """Return the numbers in all windows. Padding is not looked at."""
        window = math.prod(map(min, self.kernel_size, inputs[0][-2:]))
        return super().work(inputs, output_shape) + math.prod(output_shape) * window

    def end_padding(self, shape: tuple[int, ...]) -> list[int]:
        """Return by axis how far the last windows reach beyond the image (C, H, W): the padding, or more by ceil_mode.

        ONNX runtimes do not agree on ceil_mode (ONNX keeps a last window that begins in the padding, PyTorch does not),
        so that ceil_mode is written out as padding.
        """
        ends = []
        for size, kernel, stride, pad, step in zip(shape[1:], self.kernel_size, self.stride, self.padding, self.spread,
                                                   strict=True):
            last = (windows(size, kernel, stride, pad, step, self.ceil_mode) - 1) * stride
            ends.append(max(pad, last + step * (kernel - 1) + 1 - size - pad) if self.ceil_mode else pad)
        return ends


@register
class MaxPool2d(Pool):
    """`torch.nn.MaxPool2d`."""

    arguments = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False,
                 "return_indices": False}
    functions = ("torch.nn.functional.max_pool2d",)
    operators = {"MaxPool": Operator("sums", passes_factors_on=True)}
    keeps_grid = True

    dilation: Pair = (1, 1)

    @property
    def spread(self) -> tuple[int, int]:
        return self.dilation

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        return writer.node("MaxPool", self.name, inputs, kernel_shape=self.kernel_size, strides=self.stride,
                           dilations=self.dilation, pads=[*self.padding, *self.end_padding(shape)])


@register
class AvgPool2d(Pool):
    """`torch.nn.AvgPool2d`."""

    arguments = {"kernel_size": None, "stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True,
                 "divisor_override": None}
    functions = ("torch.nn.functional.avg_pool2d",)
    operators = {"AveragePool": Operator("sums", passes_factors_on=True), "Mul": Operator("all")}

    count_include_pad: bool = True

    @classmethod
    def from_module(cls, module: nn.Module, name: str) -> dict[str, Any]:
        if module.divisor_override:
            raise outside(name, "AvgPool2d with padding_mode or divisor_override")
        return super().from_module(module, name)

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        """Write the mean of what lies in the image, times its share of the window where the padding counts.

        OpenVINO 2026 is wrong where it counts the padding itself and the network is int8: it pads integers with 0, which
        does not stand for zero there.
        """
        ends = self.end_padding(shape)
        shares = [shares_inside(*axis) for axis in zip(shape[1:], self.kernel_size, self.stride, self.padding, ends,
                                                       strict=True)]
        counts = self.count_include_pad and any((share < 1).any() for share in shares)
        pooled = writer.node("AveragePool", f"{self.name}.inside" if counts else self.name, inputs,
                             kernel_shape=self.kernel_size, strides=self.stride, pads=[*self.padding, *ends])
        if not counts:
            return pooled
        return writer.node("Mul", self.name, [pooled, writer.constant(f"{self.name}.shares", np.outer(*shares))])


def shares_inside(size: int, kernel: int, stride: int, pad: int, end: int) -> NDArray[np.float64]:
    """Return, by window along an axis, the part in the image over the part that counts: image and padding."""
    starts = np.arange((size + pad + end - kernel) // stride + 1) * stride - pad
    inside = np.minimum(starts + kernel, size) - np.maximum(starts, 0)
    return inside / (np.minimum(starts + kernel, size + pad) - starts)


def images(shape: Shape) -> Shape:
    """Return a shape (N, C, H, W) or (N, H, W) that has been checked.

    Raises:
        ValueError: another number of dimensions.
    """
    if len(shape) not in (3, 4):
        raise ValueError(f"expected images (N, C, H, W), got {list(shape)}")
    return shape


class AdaptivePool(Windows):
    """A pool to an output of a fixed size."""

    keeps_sign = True

    output_size: Pair

    @classmethod
    def from_call(cls, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        return [node.args[0]], {"output_size": traced_argument(node, 1, "output_size", 1)}

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return *images(inputs[0])[:-2], *self.output_size

    def work(self, inputs: Sequence[Shape], output_shape: Shape) -> int:
        """Return the numbers in all windows: along an axis they cover all inputs, and share up to two an output."""
        along = (have + 2 * want for have, want in zip(inputs[0][-2:], self.output_size, strict=True))
        return super().work(inputs, output_shape) + math.prod(output_shape[:-2]) * math.prod(along)

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        size, wanted = shape[1:], self.output_size
        over_all, windowed = self.operators
        if wanted == (1, 1):
            return writer.node(over_all, self.name, inputs)
        if any(have % want for have, want in zip(size, wanted, strict=True)):
            raise UserError(f"export: layer {self.name} pools {size[0]}x{size[1]} to {wanted[0]}x{wanted[1]}; windows of "
                            "unequal size have no ONNX operator, only whole multiples do")
        kernel = [have // want for have, want in zip(size, wanted, strict=True)]
        return writer.node(windowed, self.name, inputs, kernel_shape=kernel, strides=kernel)


@register
class AdaptiveAvgPool2d(AdaptivePool):
    """`torch.nn.AdaptiveAvgPool2d`."""

    functions = ("torch.nn.functional.adaptive_avg_pool2d",)
    operators = {"GlobalAveragePool": Operator("sums", passes_factors_on=True),
                 "AveragePool": Operator("sums", passes_factors_on=True)}


@register
class AdaptiveMaxPool2d(AdaptivePool):
    """`torch.nn.AdaptiveMaxPool2d`."""

    functions = ("torch.nn.functional.adaptive_max_pool2d",)
    operators = {"GlobalMaxPool": Operator(passes_factors_on=True), "MaxPool": Operator("sums", passes_factors_on=True)}
    keeps_grid = True


@register
class Upsample(Windows):
    """`torch.nn.Upsample` to a size in pixels."""

    operators = {"Resize": Operator()}
    keeps_sign = owns_output = True

    size: Pair
    mode: Literal["nearest", "bilinear"] = "nearest"

    @classmethod
    def from_module(cls, module: nn.Module, name: str) -> dict[str, Any]:
        if module.align_corners or not isinstance(module.size, tuple) or module.mode not in ("nearest", "bilinear"):
            raise outside(name, "Upsample by a factor, with align_corners or of another mode")
        return super().from_module(module, name)

    def output_shape(self, inputs: list[Shape]) -> Shape:
        if len(inputs[0]) != 4:
            raise ValueError(f"expected images (N, C, H, W), got {list(inputs[0])}")
        return *inputs[0][:2], *self.size

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        if any(size % before for size, before in zip(self.size, shape[1:], strict=True)):
            raise UserError(f"export: layer {self.name} scales {shape[1]}x{shape[2]} to {self.size[0]}x{self.size[1]}; "
                            "only whole multiples have the same ONNX operator everywhere")
        factors = [1.0, 1.0, *(size / before for size, before in zip(self.size, shape[1:], strict=True))]
        scales = writer.constant(f"{self.name}.scales", factors)
        if self.mode == "nearest":
            return writer.node("Resize", self.name, [*inputs, "", scales], mode="nearest", nearest_mode="floor",
                               coordinate_transformation_mode="asymmetric")
        return writer.node("Resize", self.name, [*inputs, "", scales], mode="linear",
                           coordinate_transformation_mode="half_pixel")
