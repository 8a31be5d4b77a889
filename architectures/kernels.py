"""Run one int8 or float layer on oneDNN's kernels: packed, and fused with the activation and addition behind it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

from architectures.int8 import int8_modules
from architectures.pairs import PAIR_LIMIT, saturating_pairs
from metadata.errors import first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


ON_KERNELS = "on oneDNN's int8 kernels"


@functools.cache
def no_int8_kernels() -> str:
    """Return why no int8 layer runs on oneDNN's kernels in this process, or "" where they compute exactly.

    On CPUs without VNNI they are exact for weights whose pairs stay within PAIR_LIMIT alone, see `kernels_saturate`.
    """
    return _fault_of_kernels(PAIR_LIMIT // 2)


@functools.cache
def kernels_saturate() -> bool:
    """Return whether oneDNN's kernels are wrong for some weights: CPUs without VNNI add two products in 16 bits."""
    return bool(_fault_of_kernels(127))


def _fault_of_kernels(weights: int) -> str:
    """Try the kernels on the largest activations and weights of this size; return what is wrong, or ""."""
    import torch
    levels = torch.full((1, 64, 4, 4), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    weight, scale = torch.full((16, 64, 3, 3), weights, dtype=torch.int8), torch.ones(16)
    one, zero_points = [1, 1], torch.zeros(16, dtype=torch.long)
    try:
        ops = torch.ops.onednn
        packed = ops.qconv_prepack(weight, scale, 1.0, 0, one, one, one, 1, list(levels.shape))
        convolved = ops.qconv2d_pointwise(levels, 1.0, 0, packed, scale, zero_points, None, one, one, one, 1, 1.0, 0,
                                          torch.float32, "none", [], "")
        total = torch.ones_like(convolved)
        added = ops.qconv2d_pointwise.binary(levels, 1.0, 0, packed, scale, zero_points, total, None, one, one, one, 1, 1.0,
                                             0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "")
        row = levels[:, :, 0, 0].contiguous()
        packed = ops.qlinear_prepack(weight[:, :, 0, 0].contiguous(), list(row.shape))
        product = ops.qlinear_pointwise(row, 1.0, 0, packed, scale, zero_points, None, 1.0, 0, torch.float32, "none", [],
                                        "")
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        return f"this PyTorch has no int8 kernels for this CPU ({first_line(error)})"
    expected = torch.nn.functional.conv2d(levels.float(), weight.float(), padding=1)
    if not (torch.equal(convolved, expected) and torch.equal(added, expected + 1)
            and bool((product == 64 * 255 * weights).all())):
        return "this CPU's int8 kernels do not compute exact sums"
    return ""


def why_not_int8(model: nn.Module) -> str:
    """Return why the model's int8 layers compute in float32 in this process, or "" if they run on oneDNN's kernels."""
    layers = [layer for layer in int8_modules(model) if layer.activations == "int8"]
    if not layers or (reason := no_int8_kernels()):
        return reason if layers else ""
    count = sum(saturating_pairs(layer.weight.numpy()) for layer in layers) if kernels_saturate() else 0
    if not count:
        return ""
    return (f"this CPU has no VNNI instructions, and {count:,} sums of two products of these weights can exceed 16 bits "
            "there; quantize with weights: pair")


def int8_arithmetic(model: nn.Module) -> str | None:
    """Return how the model's int8 layers compute in this process, for reports, or None for a model without int8 layers."""
    if not int8_modules(model):
        return None
    reason = why_not_int8(model)
    return f"in float32, with the same results to rounding: {reason}" if reason else ON_KERNELS


def layer_by_layer(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the model as its layers define it, without int8 kernels."""
    return getattr(model, "_layer_by_layer", model)


class NotFiniteError(ArithmeticError):
    """A tensor holds NaN or infinite values, so its range is not defined."""


class QuantizedTensor:
    """A tensor and its 8-bit integers. The integers are computed at the first use, and shared by all kernels.

    Args:
        tensor: (1, ...) float32.
        nonnegative: the tensor is known to hold no negative value, such as a ReLU's output.
    """

    __slots__ = ("_parts", "nonnegative", "tensor")

    def __init__(self, tensor: Tensor, nonnegative: bool = False) -> None:
        self.tensor, self.nonnegative = tensor, nonnegative
        self._parts: tuple[Tensor, float, int] | None = None

    def parts(self) -> tuple[Tensor, float, int]:
        """Return unsigned 8-bit integers of the tensor's shape, scale and zero point.

        The arithmetic is that of `Int8Layers.quantize_activations`.

        Raises:
            NotFiniteError: the tensor holds NaN or infinite values.
        """
        import torch
        if self._parts is None:
            high = max(self.tensor.amax().item(), 0.0)
            low = 0.0 if self.nonnegative else min(self.tensor.amin().item(), 0.0)
            if not math.isfinite(high - low):
                raise NotFiniteError
            scale = max((high - low) / 255, 1e-12)
            zero_point = round(-low / scale)
            scale = max(scale, high / max(255 - zero_point, 1), -low / max(zero_point, 1))
            # A float near 1.5 * 2^23 has no bits left for a fraction: the addition rounds, half to even, and the lowest
            # byte of the sum is the integer. That takes two passes over the tensor, both vectorized.
            shifted = torch.add(torch.tensor(12582912.0 + zero_point), self.tensor, alpha=1 / scale)
            self._parts = shifted.view(torch.int32).to(torch.uint8), scale, zero_point
        return self._parts


class Kernel:
    """A convolution or linear layer on oneDNN, packed for the shape of its first input, fused with what follows.

    Args:
        layer: Conv2d, Linear, Int8Conv2d or Int8Linear, on the CPU.
        post_op: the activation in oneDNN's words, see `Layer.post_op`, or None.
        adds: add a second tensor before the activation.
    """

    def __init__(self, layer: nn.Module, post_op: tuple[str, list[float]] | None = None, adds: bool = False) -> None:
        self.layer, self.adds = layer, adds
        self.attribute: tuple[str, list[float]] = post_op or ("none", [])
        self.int8 = getattr(layer, "activations", "float32") == "int8"
        self.call: Callable[..., Tensor] | None = None
        self.shapes: tuple[torch.Size, torch.Size] | None = None  # of the input and of the added tensor, at the first call

    def __call__(self, value: QuantizedTensor, other: Tensor | None = None) -> Tensor:
        """Return the layer's output, plus `other`. The kernel may write the output into `other`."""
        shapes = None if other is None else (value.tensor.shape, other.shape)
        if self.call is None:
            self.call, self.shapes = self._packed(value.tensor, other), shapes
        elif shapes != self.shapes:  # at another image size the addition may broadcast
            return self._broadcasting(value, other)
        return self.call(value, other)

    @functools.cached_property
    def _broadcasting(self) -> Callable[..., Tensor]:
        """Return the layer followed by a separate addition, for any two shapes."""
        import torch
        alone, act = Kernel(self.layer), torch.relu_ if self.attribute[0] == "relu" else lambda x: x
        return lambda value, other: act(alone(value) + other)

    def _packed(self, tensor: Tensor, other: Tensor | None) -> Callable[..., Tensor]:
        import torch
        layer: Any = self.layer
        shape = list(tensor.shape)
        bias = None if layer.bias is None else layer.bias.detach()
        name, scalars = self.attribute
        weight = layer.weight.detach()
        if not self.int8 and weight.dtype == torch.int8:
            weight = weight.float() * layer.weight_scale.view(-1, *[1] * (weight.dim() - 1))
        float32, zero_points = torch.float32, torch.zeros(len(weight), dtype=torch.long)
        if weight.dim() == 2:
            if not self.int8:
                function = {"none": lambda x: x, "relu": torch.relu_}[name]
                return lambda value, other: function(torch.nn.functional.linear(value.tensor, weight, bias))
            scale, product = layer.weight_scale, torch.ops.onednn.qlinear_pointwise.default
            packed = torch.ops.onednn.qlinear_prepack(weight, shape)
            return lambda value, other: product(*value.parts(), packed, scale, zero_points, bias, 1.0, 0, float32, name,
                                                scalars, "")
        stride, padding, dilation = (list(pair) for pair in (layer.stride, layer.padding, layer.dilation))
        groups = layer.groups
        sizes = [(size + 2 * pad - reach * (kernel - 1) - 1) // step + 1 for size, pad, reach, kernel, step in
                 zip(shape[2:], padding, dilation, layer.kernel_size, stride, strict=True)]
        if other is not None and list(other.shape) != [shape[0], len(weight), *sizes]:  # broadcast: not in place
            return self._broadcasting
        if self.int8:
            scale, ops = layer.weight_scale, torch.ops.onednn
            packed = ops.qconv_prepack(weight, scale, 1.0, 0, stride, padding, dilation, groups, shape)
            if self.adds:
                convolve_and_add = ops.qconv2d_pointwise.binary
                return lambda value, other: convolve_and_add(
                    *value.parts(), packed, scale, zero_points, other, bias, stride, padding, dilation, groups, 1.0, 0,
                    float32, 1.0, 0, "sum", 1.0, name, scalars, "")
            convolve = ops.qconv2d_pointwise.default
            return lambda value, other: convolve(*value.parts(), packed, scale, zero_points, bias, stride, padding,
                                                 dilation, groups, 1.0, 0, float32, name, scalars, "")
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, shape)
        if self.adds:
            after = name if name != "none" else None
            if other is tensor:  # the kernel still reads it: not in place
                add = torch.ops.mkldnn._convolution_pointwise.binary
                return lambda value, other: add(value.tensor, other, packed, bias, padding, stride, dilation, groups, "add",
                                                1.0, after, scalars, "")
            add_to = torch.ops.mkldnn._convolution_pointwise_.binary
            return lambda value, other: add_to(other, value.tensor, packed, bias, padding, stride, dilation, groups, "add",
                                               1.0, after, scalars, "")
        plain = torch.ops.mkldnn._convolution_pointwise.default
        return lambda value, other: plain(value.tensor, packed, bias, padding, stride, dilation, groups, name, scalars, "")
