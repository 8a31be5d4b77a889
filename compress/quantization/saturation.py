"""Saturation: emulate the 16-bit sums of CPUs without VNNI in a static int8 ONNX file.

Such CPUs multiply unsigned 8-bit activations by signed 8-bit weights with vpmaddubsw, which adds two adjacent products in
16 bits and saturates; the further sums are in 32 bits. So one file gives different answers on two machines. The loss is
the excess of a pair of products over 16 bits, and few pairs of weights are large enough to exceed 16 bits: the emulation
computes the excess of those pairs alone and subtracts it from the layer's exact output.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, PMADDUBSW. Which products are adjacent was measured.
The sums are those of the CPU, bit for bit: tests/quantization/test_native_sums.py compares them with ONNX Runtime on a CPU
with AVX2 alone, tests/quantization/test_portability.py with oneDNN and OpenVINO capped to AVX2. The rounding behind them is
not: a runtime requantizes the integer sum at once, the emulation rounds it to float32 first. So some values of a layer's
output (one in a thousand on ONNX Runtime) lie a step or two off, and the layers behind carry that on. (Capped to AVX-512,
oneDNN differs at borders padded with a zero point other than 0.)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from metadata.errors import UserError

Array = NDArray[Any]
Backend = Literal["onnxruntime", "openvino"]
LOWEST, HIGHEST = -2**15, 2**15 - 1
PAIRS_AT_ONCE = 256  # of one layer; their products are the emulation's largest tensors
INT64_END = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """An int8 Conv, Gemm or MatMul.

    Args:
        node: the layer in the graph.
        levels: name of the uint8 or int8 tensor that the layer reads.
        signed: whether that tensor is int8.
        zero_point: of the activations.
        scale: of each output channel's accumulator, (outputs,).
        weight: integer weights, (outputs, inputs of a group, *kernel).
        groups: number of channel groups.
    """

    node: onnx.NodeProto
    levels: str
    signed: bool
    zero_point: int
    scale: Array
    weight: Array
    groups: int

    @property
    def name(self) -> str:
        return self.node.name or self.node.output[0]


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """The pairs of products of one layer that can saturate, ordered by output channel.

    Args:
        output: output channel of each pair, (pairs,).
        position: kernel position of the first and of the second product, (pairs, 2).
        channel: input channel of each product, (pairs, 2).
        weight: integer weight of each product, (pairs, 2).
    """

    output: Array
    position: Array
    channel: Array
    weight: Array


class _Graph:
    """Finds the node that writes a tensor, and the values of constant tensors."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.producer = {output: node for node in graph.node for output in node.output}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}

    def constant(self, name: str) -> Array | None:
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        node = self.producer.get(name)
        if node is not None and node.op_type == "Constant" and "value" in _attributes(node):
            return numpy_helper.to_array(_attributes(node)["value"])
        if node is not None and node.op_type == "QuantizeLinear":  # weights that are stored as float32
            values, scale = self.constant(node.input[0]), self.constant(node.input[1])
            if values is not None and scale is not None:
                return _quantized(values, scale, self.zero_point(node), _attributes(node).get("axis", 1))
        return None

    def zero_point(self, node: onnx.NodeProto) -> Array:
        """Return the zero point of a QuantizeLinear or DequantizeLinear; without one the type is uint8, as ONNX defines."""
        value = self.constant(node.input[2]) if len(node.input) > 2 else None
        return np.zeros(1, np.uint8) if value is None else value


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _quantized(values: Array, scale: Array, zero_point: Array, axis: int) -> Array:
    """Quantize an array. Source: ONNX QuantizeLinear, saturate(round(x / scale) + zero point), halves to even."""
    limits = np.iinfo(zero_point.dtype)
    shape = [1] * values.ndim
    shape[axis % values.ndim] = scale.size
    offset = np.broadcast_to(zero_point.ravel(), scale.size).reshape(shape)
    levels: Array = np.rint(values / scale.reshape(shape)) + offset
    return levels.clip(limits.min, limits.max).astype(zero_point.dtype)


def _layer(graph: _Graph, node: onnx.NodeProto) -> _Layer | None:
    """Return a node as an int8 layer, or None if it does not multiply 8-bit activations by signed 8-bit weights."""
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    x, w = (graph.producer.get(name) for name in node.input[:2])
    if x is None or w is None or x.op_type != "DequantizeLinear" or w.op_type != "DequantizeLinear":
        return None
    weight, scale_w, scale_x = graph.constant(w.input[0]), graph.constant(w.input[1]), graph.constant(x.input[1])
    zero_point = graph.zero_point(x)
    if weight is None or weight.dtype != np.int8 or zero_point.dtype not in (np.uint8, np.int8):
        return None  # kernels multiply two activations, or uint8 weights, in 16 bits and add in 32: exact
    attributes, where = _attributes(node), f"portability: layer {node.name or node.output[0]}"
    if node.op_type != "Conv" and weight.ndim != 2:
        raise UserError(f"{where} has weights of {weight.ndim} dimensions, only matrices are read")
    if attributes.get("transA") or attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise UserError(f"{where} has transA or auto_pad set; expected plain rows, and padding written out in pads")
    if node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes.get("transB")):
        weight = weight.T
    if scale_x is None or scale_w is None or scale_x.size != 1 or scale_w.size not in (1, len(weight)):
        raise UserError(f"{where} needs one constant scale for its activations, and one a tensor or output channel for "
                        "its weights")
    scale = np.broadcast_to(scale_w.ravel() * scale_x.ravel() * attributes.get("alpha", 1.0), len(weight))
    return _Layer(node=node, levels=x.input[0], signed=zero_point.dtype == np.int8, zero_point=int(zero_point.item()),
                  scale=scale, weight=weight, groups=attributes.get("group", 1))


def _pairs(layer: _Layer, backend: Backend) -> _Pairs:
    """Return the pairs whose sum exceeds 16 bits for some activations of 0 to 255.

    Adjacent products belong to consecutive input channels of a group at one kernel position. If their number is odd, ONNX
    Runtime pairs the last one with the next position (rows of im2col), and oneDNN, which OpenVINO uses, with a zero.
    """
    outputs, width, *kernel = layer.weight.shape
    if kernel and width == 1 and outputs == layer.groups:  # depthwise kernels multiply one by one
        empty = np.zeros((0, 2), np.int64)
        return _Pairs(output=empty[:, 0], position=empty, channel=empty, weight=empty)
    rows = np.moveaxis(layer.weight.astype(np.int64), 1, -1).reshape(outputs, -1, width)
    stride = width + (width % 2 if backend == "openvino" else 0)
    flat: Array = np.pad(rows, ((0, 0), (0, 0), (0, stride - width))).reshape(outputs, -1)
    flat = np.pad(flat, ((0, 0), (0, flat.shape[1] % 2))).reshape(outputs, -1, 2)
    most, least = (255 * part(flat, 0).sum(2) for part in (np.maximum, np.minimum))
    output, pair = np.nonzero((most > HIGHEST) | (least < LOWEST))
    element = 2 * pair[:, None] + np.arange(2)  # no padding zero is among them: 255 * 128 fits 16 bits
    first_of_group = output // (outputs // layer.groups) * width
    return _Pairs(output=output, position=element // stride, channel=element % stride + first_of_group[:, None],
                  weight=flat[output, pair])


class _Excess:
    """Nodes that compute by how much one layer's pairs exceed 16 bits, and subtract the excess from the layer's output."""

    def __init__(self, layer: _Layer, pairs: _Pairs) -> None:
        self.layer, self.pairs = layer, pairs
        self.prefix = f"{layer.name}.excess"
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.is_conv = layer.node.op_type == "Conv"
        self.axis = 1 if self.is_conv else -1
        self.rank = layer.weight.ndim - 2

    def constant(self, values: Any, dtype: type[np.generic] = np.float32) -> str:
        name = f"{self.prefix}.constant{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def per_channel(self, values: Array) -> str:
        return self.constant(values.reshape(-1, *[1] * self.rank))

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{self.prefix}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def gather(self, tensor: str, indices: Array) -> str:
        return self.node("Gather", tensor, self.constant(indices, np.int64), axis=self.axis)

    def unsigned_levels(self) -> str:
        """Return the layer's padded input as the kernels see it: 0 to 255 in float32, which is exact for these integers."""
        levels = self.node("Cast", self.layer.levels, to=TensorProto.FLOAT)
        if self.layer.signed:  # the kernels shift int8 up by 128
            levels = self.node("Add", levels, self.constant(128))
        pads = _attributes(self.layer.node).get("pads", []) if self.is_conv else []
        if any(pads):
            value = self.constant(self.layer.zero_point + 128 * self.layer.signed)
            pads = [0, 0, *pads[:self.rank], 0, 0, *pads[self.rank:]]
            levels = self.node("Pad", levels, self.constant(pads, np.int64), value)
        return levels

    def at_position(self, levels: str, position: int) -> str:
        """Return the input values under one kernel position, (N, channels, *output size)."""
        kernel, attributes = self.layer.weight.shape[2:], _attributes(self.layer.node)
        dilations, strides = (attributes.get(key, [1] * self.rank) for key in ("dilations", "strides"))
        starts = [index * step for index, step in zip(np.unravel_index(position, kernel), dilations, strict=True)]
        after = [(size - 1) * step - start for size, step, start in zip(kernel, dilations, starts, strict=True)]
        if not any(starts) and not any(after) and set(strides) <= {1}:
            return levels
        ends = [-rest if rest else INT64_END for rest in after]
        axes = list(range(2, 2 + self.rank))
        return self.node("Slice", levels, *(self.constant(values, np.int64) for values in (starts, ends, axes, strides)))

    def rows(self, levels: str) -> tuple[str, Array]:
        """Return the im2col rows that the pairs multiply, and the indices of each pair's two rows, (pairs, 2)."""
        channels = int(self.pairs.channel.max()) + 1
        wanted, index = np.unique(self.pairs.position * channels + self.pairs.channel, return_inverse=True)
        parts = [self.gather(self.at_position(levels, int(position)), wanted[wanted // channels == position] % channels)
                 for position in np.unique(wanted // channels)]
        joined = parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=self.axis)
        return joined, index.reshape(-1, 2)

    def of_outputs(self, rows: str, index: Array, start: int, stop: int) -> str:
        """Return the excess of the output channels from `start` up to `stop`, in units of the accumulator."""
        own = slice(*np.searchsorted(self.pairs.output, [start, stop]))
        count = own.stop - own.start
        total = self.node("Add", *(self.node("Mul", self.gather(rows, index[own, side]),
                                             self.per_channel(self.pairs.weight[own, side])) for side in (0, 1)))
        excess = self.node("Sub", total, self.node("Clip", total, self.constant(LOWEST), self.constant(HIGHEST)))
        belongs = np.zeros((stop - start, count))
        belongs[self.pairs.output[own] - start, np.arange(count)] = 1
        if self.is_conv:
            return self.node("Conv", excess, self.constant(belongs.reshape(stop - start, count, *[1] * self.rank)))
        return self.node("MatMul", excess, self.constant(belongs.T))

    def take_off(self, exact: str, output: str) -> None:
        """Subtract the excess from the layer's exact output; write the result under the name that other nodes read."""
        rows, index = self.rows(self.unsigned_levels())
        bounds = _bounds(self.pairs.output, len(self.layer.weight))
        parts = [self.of_outputs(rows, index, start, stop) for start, stop in pairwise(bounds)]
        joined = parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=self.axis)
        excess = self.node("Mul", joined, self.per_channel(self.layer.scale))
        self.nodes.append(helper.make_node("Sub", [exact, excess], [output], name=self.prefix))


def _bounds(output: Array, outputs: int) -> list[int]:
    """Cut the output channels into ranges of about PAIRS_AT_ONCE pairs, each with at least one pair."""
    before = np.searchsorted(output, np.arange(outputs + 1))  # pairs before each channel
    bounds = [0]
    for channel in range(1, outputs):
        new, rest = before[channel] - before[bounds[-1]], len(output) - before[channel]
        if new and rest and before[channel + 1] - before[bounds[-1]] > PAIRS_AT_ONCE:
            bounds.append(channel)
    return [*bounds, outputs]


def saturating(model: onnx.ModelProto, backend: Backend = "onnxruntime") -> tuple[onnx.ModelProto, dict[str, int]]:
    """Return a model that computes on any CPU what a CPU without VNNI computes, and each layer's pairs that can saturate.

    All layers with int8 weights and 8-bit activations count as integer layers, including a Conv whose output is not
    requantized: ONNX Runtime computes that one in float32, OpenVINO in integers.

    Args:
        model: in QDQ form: DequantizeLinear before the factors of Conv, Gemm and MatMul.
        backend: the runtime whose kernels to emulate; they differ for an odd number of input channels and a kernel of
            several positions.

    Returns:
        The emulating copy, equal to the integers up to float32 rounding, and the number of pairs by layer, 0 where a layer
        is exact.

    Raises:
        UserError: the file has another int8 form, or a layer has a form that is not covered.
    """
    other = next((node for node in model.graph.node if node.op_type in (
        "QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")), None)
    if other is not None:
        raise UserError(f"portability: expected a static int8 file in QDQ form, got one with {other.op_type} "
                        f"({other.name or other.output[0]})")
    copied = onnx.ModelProto.FromString(model.SerializeToString())
    graph, nodes, counts = _Graph(model.graph), [], {}
    for node in copied.graph.node:
        nodes.append(node)
        layer = _layer(graph, node)
        if layer is None:
            continue
        pairs = _pairs(layer, backend)
        counts[layer.name] = len(pairs.output)
        if len(pairs.output):
            output, node.output[0] = node.output[0], f"{layer.name}.exact"
            added = _Excess(layer, pairs)
            added.take_off(node.output[0], output)
            nodes += added.nodes
            copied.graph.initializer.extend(added.initializers)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # the deleted list owns some
    del copied.graph.node[:]
    copied.graph.node.extend(kept)
    return copied, counts
