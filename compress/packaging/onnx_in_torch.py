"""An ONNX file of the toolkit as a torch module: for torch.export, and for what is lowered from there.

`export` writes the float file and `quantize_static` the int8 file. The module does what the file says, operator by
operator. Int8 stays int8: a QuantizeLinear or DequantizeLinear becomes the operator of `quantized_decomposed` that torch's
own quantization writes, and that ExecuTorch's and torch's backends turn into integer arithmetic. They look for a pattern in
which every reader of a quantized tensor dequantizes it by itself, so the module dequantizes at each reading.

ONNX files of other tools are read by `architectures.onnx_network`, which finds layers again and computes in float; here
every node stays what it is.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from metadata.errors import UserError

Attributes = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A tensor of int8 levels, with what they stand for: `(levels - zero_point) * scale`.

    Args:
        levels: int8.
        scale, zero_point: a number, or one for each index of `axis`.
        axis: None for one scale.
    """

    levels: Tensor
    scale: Any
    zero_point: Any
    axis: int | None


class OnnxInTorch(nn.Module):
    """An ONNX file of the toolkit as a module: (N, C, H, W) float32 to (N, classes) logits.

    Args:
        model: as `compress.packaging.export.export` or `compress.quantization.static.quantize_static` writes it. Unsigned
            levels become signed ones, each with a zero point 128 lower, so that the numbers stay the same.

    Raises:
        UserError: the file has an operator without a torch form.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers quantized_decomposed
        graph = model.graph
        for node in graph.node:
            if node.op_type not in OPERATORS and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                raise UserError(f"export: operator {node.op_type} of node {node.name!r} has no form in torch.export")
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self._fixed: dict[str, Any] = {name: values.tolist() for name, values in constants.items()
                                       if values.dtype == np.int64 or (values.dtype.kind == "f" and values.ndim == 0)}
        self._stored: dict[str, str] = {}
        self._steps: dict[str, tuple[Any, Any]] = {}  # of quantizing nodes: scale and zero point
        quantizing = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        for node in quantizing:
            self._steps[node.name] = self._step(constants, node)
        inside = {name for node in quantizing for name in node.input[1:]}
        for name, values in constants.items():
            if name not in self._fixed and name not in inside:
                self._store(name, values)
        self._nodes = [(node.op_type, node.name, list(node.input), node.output[0],
                        {each.name: helper.get_attribute_value(each) for each in node.attribute}) for node in graph.node]
        self._input, self._output = graph.input[0].name, graph.output[0].name

    def _step(self, constants: dict[str, Any], node: onnx.NodeProto) -> tuple[Any, Any]:
        """Return scale and zero point of a quantizing node: numbers, or names in the module for one a channel."""
        scale = constants[node.input[1]]
        zero = constants[node.input[2]].astype(np.int64) - 128 * int(constants[node.input[2]].dtype == np.uint8)
        if scale.size == 1:
            return float(scale.reshape(())), int(zero.reshape(()))
        return self._store(f"{node.input[0]}.scale", scale), self._store(f"{node.input[0]}.zero_point", zero)

    def _store(self, name: str, values: Any) -> str:
        """Keep a constant: floats as parameters, integers as buffers. Return its name in the module."""
        own = self._stored.setdefault(name, name.replace(".", "_"))
        if own not in self._parameters and own not in self._buffers:
            if values.dtype == np.uint8:
                values = (values.astype(np.int16) - 128).astype(np.int8)
            tensor = torch.from_numpy(np.array(values))
            if tensor.is_floating_point():
                self.register_parameter(own, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(own, tensor)
        return own

    def forward(self, images: Tensor) -> Tensor:
        found: dict[str, Any] = {self._input: images}

        def read(name: str) -> Any:
            if not name:
                return None
            if name in self._fixed:
                return self._fixed[name]
            value = found[name] if name in found else getattr(self, self._stored[name])
            return _dequantized(value) if isinstance(value, Quantized) else value

        for operator, name, inputs, output, attributes in self._nodes:
            if operator == "DequantizeLinear":
                scale, zero = (getattr(self, part) if isinstance(part, str) else part for part in self._steps[name])
                levels = found[inputs[0]] if inputs[0] in found else getattr(self, self._stored[inputs[0]])
                axis = attributes.get("axis", 1) if isinstance(scale, Tensor) else None
                found[output] = Quantized(levels=levels, scale=scale, zero_point=zero, axis=axis)
            elif operator == "QuantizeLinear":
                found[output] = torch.ops.quantized_decomposed.quantize_per_tensor(
                    read(inputs[0]), *self._steps[name], -128, 127, torch.int8)
            else:
                found[output] = OPERATORS[operator]([read(each) for each in inputs], attributes)
        result: Tensor = read(self._output)
        return result


def _dequantized(value: Quantized) -> Tensor:
    operators: Any = torch.ops.quantized_decomposed
    low = -128 if value.axis is None else -127
    if value.axis is None:
        return operators.dequantize_per_tensor(  # type: ignore[no-any-return]
            value.levels, value.scale, value.zero_point, low, 127, torch.int8)
    return operators.dequantize_per_channel(  # type: ignore[no-any-return]
        value.levels, value.scale, value.zero_point, value.axis, low, 127, torch.int8)


# ------------------------------------------------------------------------------------------------------ the operators


def _sides(attributes: Attributes) -> tuple[list[int], list[int]]:
    """Return the padding at the start and at the end of height and width."""
    pads = attributes.get("pads", [0, 0, 0, 0])
    return pads[:2], pads[2:]


def _conv(inputs: list[Any], attributes: Attributes) -> Tensor:
    start, end = _sides(attributes)
    images, weight, bias = [*inputs, None][:3]
    if start != end:
        images, start = F.pad(images, (start[1], end[1], start[0], end[0])), [0, 0]
    return F.conv2d(images, weight, bias, attributes.get("strides", 1), start, attributes.get("dilations", 1),
                    attributes.get("group", 1))


def _gemm(inputs: list[Any], attributes: Attributes) -> Tensor:
    rows, weight, bias = [*inputs, None][:3]
    return F.linear(rows, weight if attributes.get("transB") else weight.t(), bias)


def _max_pool(inputs: list[Any], attributes: Attributes) -> Tensor:
    kernel, (start, end), images = attributes["kernel_shape"], _sides(attributes), inputs[0]
    if start != end or any(2 * pad > size for pad, size in zip(start, kernel, strict=True)):
        images, start = F.pad(images, (start[1], end[1], start[0], end[0]), value=-torch.inf), [0, 0]
    return F.max_pool2d(images, kernel, attributes.get("strides", 1), start, attributes.get("dilations", 1))


def _average_pool(inputs: list[Any], attributes: Attributes) -> Tensor:
    kernel, strides, (start, end) = attributes["kernel_shape"], attributes.get("strides", 1), _sides(attributes)
    if start == end and all(2 * pad <= size for pad, size in zip(start, kernel, strict=True)):
        return F.avg_pool2d(inputs[0], kernel, strides, start, count_include_pad=False)
    sides = start[1], end[1], start[0], end[0]
    inside = F.avg_pool2d(F.pad(torch.ones(1, 1, *inputs[0].shape[2:]), sides), kernel, strides)
    return F.avg_pool2d(F.pad(inputs[0], sides), kernel, strides) / inside


def _reshape(inputs: list[Any], attributes: Attributes) -> Tensor:
    images, target = inputs
    shape = [images.shape[at] if size == 0 else size for at, size in enumerate(target)]
    return images.reshape(shape)  # type: ignore[no-any-return]


def _expand(images: Tensor, sizes: list[Any]) -> Tensor:
    return images.expand([-1 if isinstance(size, int) and size == 1 else size for size in sizes])


def _instance_norm(inputs: list[Any], attributes: Attributes) -> Tensor:
    images, scale, offset = inputs
    over = tuple(range(2, images.dim()))
    variance, mean = torch.var_mean(images, over, correction=0, keepdim=True)
    shape = [1, -1, *[1] * len(over)]
    normal = (images - mean) * torch.rsqrt(variance + attributes.get("epsilon", 1e-5))
    return normal * scale.reshape(shape) + offset.reshape(shape)  # type: ignore[no-any-return]


def _layer_norm(inputs: list[Any], attributes: Attributes) -> Tensor:
    images, scale, offset = [*inputs, None][:3]
    axis = attributes.get("axis", -1)
    return F.layer_norm(images, images.shape[axis:], scale, offset, attributes.get("epsilon", 1e-5))


def _slice(inputs: list[Any], attributes: Attributes) -> Tensor:
    images, starts, ends, axes, steps = [*inputs, None, None][:5]
    for at, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = axes[at] if axes else at
        last = None if end >= 2**31 - 1 else end
        index = [slice(None)] * (axis % images.dim()) + [slice(start, last, steps[at] if steps else 1)]
        images = images[tuple(index)]
    return images  # type: ignore[no-any-return]


def _pad(inputs: list[Any], attributes: Attributes) -> Tensor:
    images, pads, value = [*inputs, None][:3]
    rank = len(pads) // 2
    around = [side for at in reversed(range(rank)) for side in (pads[at], pads[at + rank])]
    return F.pad(images, around, value=value or 0.0)


def _resized(inputs: list[Any], attributes: Attributes) -> Tensor:
    scales = [float(scale) for scale in inputs[2]][2:]
    sizes = [round(size * scale) for size, scale in zip(inputs[0].shape[2:], scales, strict=True)]
    return F.interpolate(inputs[0], sizes, mode="nearest" if attributes["mode"] == "nearest" else "bilinear")


def _reduced(function: Callable[..., Tensor]) -> Callable[[list[Any], Attributes], Tensor]:
    def reduce(inputs: list[Any], attributes: Attributes) -> Tensor:
        axes = inputs[1] if len(inputs) > 1 else attributes["axes"]
        return function(inputs[0], dim=list(axes), keepdim=bool(attributes.get("keepdims", 1)))

    return reduce


def _plain(function: Callable[..., Any]) -> Callable[[list[Any], Attributes], Any]:
    """Return an operator without attributes."""
    return lambda inputs, attributes: function(*inputs)


OPERATORS: dict[str, Callable[[list[Any], Attributes], Any]] = {
    "Add": _plain(torch.add), "Sub": _plain(torch.sub), "Mul": _plain(torch.mul), "Div": _plain(torch.div),
    "Pow": _plain(torch.pow), "Sqrt": _plain(torch.sqrt), "Exp": _plain(torch.exp), "Erf": _plain(torch.erf),
    "Tanh": _plain(torch.tanh), "Sigmoid": _plain(torch.sigmoid), "Relu": _plain(F.relu), "HardSwish": _plain(F.hardswish),
    "Reciprocal": _plain(torch.reciprocal), "MatMul": _plain(torch.matmul),
    "Shape": lambda inputs, attributes: list(inputs[0].shape[attributes.get("start", 0):attributes.get("end")]),
    "Expand": _plain(_expand),
    "HardSigmoid": lambda inputs, attributes: torch.clamp(
        inputs[0] * attributes.get("alpha", 0.2) + attributes.get("beta", 0.5), 0.0, 1.0),
    "LeakyRelu": lambda inputs, attributes: F.leaky_relu(inputs[0], attributes.get("alpha", 0.01)),
    "PRelu": lambda inputs, attributes: torch.where(inputs[0] < 0, inputs[0] * inputs[1], inputs[0]),
    "Clip": _plain(torch.clamp),
    "Softmax": lambda inputs, attributes: torch.softmax(inputs[0], attributes.get("axis", -1)),
    "Conv": _conv, "Gemm": _gemm, "MaxPool": _max_pool, "AveragePool": _average_pool,
    "GlobalAveragePool": lambda inputs, attributes: inputs[0].mean((2, 3), keepdim=True),
    "GlobalMaxPool": lambda inputs, attributes: inputs[0].amax((2, 3), keepdim=True),
    "ReduceMean": _reduced(torch.mean), "ReduceSum": _reduced(torch.sum), "ReduceMax": _reduced(torch.amax),
    "ReduceL2": _reduced(lambda images, dim, keepdim: torch.linalg.vector_norm(images, 2, dim, keepdim)),
    "BatchNormalization": lambda inputs, attributes: F.batch_norm(
        inputs[0], inputs[3], inputs[4], inputs[1], inputs[2], eps=attributes.get("epsilon", 1e-5)),
    "InstanceNormalization": _instance_norm, "LayerNormalization": _layer_norm,
    "Flatten": lambda inputs, attributes: inputs[0].flatten(attributes.get("axis", 1)),
    "Reshape": _reshape, "Transpose": lambda inputs, attributes: inputs[0].permute(*attributes["perm"]),
    "Concat": lambda inputs, attributes: (torch.cat(inputs, attributes["axis"]) if isinstance(inputs[0], Tensor)
                                          else [*itertools.chain(*inputs)]),  # sizes are lists of numbers
    "Slice": _slice, "Pad": _pad, "Resize": _resized,
    "Gather": lambda inputs, attributes: torch.index_select(inputs[0], attributes.get("axis", 0), torch.tensor(inputs[1])),
}
