"""Whether a static int8 ONNX file keeps its accuracy on CPUs without VNNI, by emulating their 16-bit sums exactly.

Such CPUs multiply unsigned 8-bit activations by signed 8-bit weights with vpmaddubsw, which adds two adjacent products in
16 bits and saturates; only then do sums go on in 32 bits. So one file answers differently on two machines. What is lost
is the excess of a pair of products over 16 bits, and few pairs of weights are large enough to exceed them at all: the
emulation computes the excess of those pairs alone and takes it off the layer's exact output.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, PMADDUBSW. Which products are adjacent was measured:
on ONNX Runtime 1.32 with VNNI switched off the emulation is equal bit for bit, and tests/test_portability.py holds it to
oneDNN and OpenVINO capped to AVX2. (Capped to AVX-512, oneDNN differs at borders padded with a zero point other than 0.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from compress.quantization.calibration import session
from metadata.errors import UserError, first_line
from metadata.machine import machine

Array = NDArray[Any]
Backend = Literal["onnxruntime", "openvino"]
LOWEST, HIGHEST = -2**15, 2**15 - 1
PAIRS_AT_ONCE = 256  # of one layer: their products are the emulation's largest tensors
INT64_END = 2**63 - 1
Z = 1.6449  # one-sided 95 %


@dataclass(frozen=True)
class _Layer:
    """An int8 Conv, Gemm or MatMul.

    Args:
        node: the layer in the graph.
        levels: name of the uint8 or int8 tensor that it reads.
        signed: whether that is int8.
        zero_point: of the activations.
        scale: of the accumulator of each output channel, (outputs,).
        weight: levels, (outputs, inputs of its group, *kernel).
        groups: of channels.
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


@dataclass(frozen=True)
class _Pairs:
    """The pairs of products of one layer that can saturate, in the order of their output channels.

    Args:
        output: channel that each belongs to, (pairs,).
        position: of the kernel, (pairs, 2): of the first and of the second product.
        channel: of the layer's input, (pairs, 2).
        weight: levels, (pairs, 2).
    """

    output: Array
    position: Array
    channel: Array
    weight: Array


class _Graph:
    """Who makes a tensor, and the values of those that do not depend on the input."""

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
        """Of a QuantizeLinear or its inverse; one that names none writes uint8, as ONNX defines it."""
        value = self.constant(node.input[2]) if len(node.input) > 2 else None
        return np.zeros(1, np.uint8) if value is None else value


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _quantized(values: Array, scale: Array, zero_point: Array, axis: int) -> Array:
    """Source: ONNX QuantizeLinear, saturate(round(x / scale) + zero point), halves to even."""
    limits = np.iinfo(zero_point.dtype)
    shape = [1] * values.ndim
    shape[axis % values.ndim] = scale.size
    offset = np.broadcast_to(zero_point.ravel(), scale.size).reshape(shape)
    levels: Array = np.rint(values / scale.reshape(shape)) + offset
    return levels.clip(limits.min, limits.max).astype(zero_point.dtype)


def _layer(graph: _Graph, node: onnx.NodeProto) -> _Layer | None:
    """A node as an int8 layer; None where no signed 8-bit weights meet 8-bit activations."""
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    x, w = (graph.producer.get(name) for name in node.input[:2])
    if x is None or w is None or x.op_type != "DequantizeLinear" or w.op_type != "DequantizeLinear":
        return None
    weight, scale_w, scale_x = graph.constant(w.input[0]), graph.constant(w.input[1]), graph.constant(x.input[1])
    zero_point = graph.zero_point(x)
    if weight is None or weight.dtype != np.int8 or zero_point.dtype not in (np.uint8, np.int8):
        return None  # two activations, and uint8 weights, are multiplied in 16 bits and summed in 32: exact
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
    return _Layer(node, x.input[0], zero_point.dtype == np.int8, int(zero_point.item()), scale, weight,
                  attributes.get("group", 1))


def _pairs(layer: _Layer, backend: Backend) -> _Pairs:
    """The pairs whose sum leaves 16 bits for some levels of 0 to 255.

    Adjacent are consecutive input channels of a group at one kernel position, and from an odd count of them ONNX Runtime
    runs on to the next position (rows of im2col), where oneDNN, which OpenVINO uses, fills up with a zero.
    """
    outputs, width, *kernel = layer.weight.shape
    if kernel and width == 1 and outputs == layer.groups:  # depthwise kernels multiply one by one
        empty = np.zeros((0, 2), np.int64)
        return _Pairs(empty[:, 0], empty, empty, empty)
    rows = np.moveaxis(layer.weight.astype(np.int64), 1, -1).reshape(outputs, -1, width)
    stride = width + (width % 2 if backend == "openvino" else 0)
    flat: Array = np.pad(rows, ((0, 0), (0, 0), (0, stride - width))).reshape(outputs, -1)
    flat = np.pad(flat, ((0, 0), (0, flat.shape[1] % 2))).reshape(outputs, -1, 2)
    most, least = (255 * part(flat, 0).sum(2) for part in (np.maximum, np.minimum))
    output, pair = np.nonzero((most > HIGHEST) | (least < LOWEST))
    element = 2 * pair[:, None] + np.arange(2)  # no pair with a filled-up zero is among them: 255 * 128 fits 16 bits
    first_of_group = output // (outputs // layer.groups) * width
    return _Pairs(output, element // stride, element % stride + first_of_group[:, None], flat[output, pair])


class _Excess:
    """Nodes that compute what one layer's pairs exceed 16 bits by, and take it off the layer's output."""

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
        """The layer's input as the kernels see it, padded: 0 to 255 in float32, in which all of this is exact."""
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
        """What one position of the kernel meets, (N, channels, *output size)."""
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
        """The rows of im2col that the pairs multiply, and which of them each pair's two are, (pairs, 2)."""
        channels = int(self.pairs.channel.max()) + 1
        wanted, index = np.unique(self.pairs.position * channels + self.pairs.channel, return_inverse=True)
        parts = [self.gather(self.at_position(levels, int(position)), wanted[wanted // channels == position] % channels)
                 for position in np.unique(wanted // channels)]
        joined = parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=self.axis)
        return joined, index.reshape(-1, 2)

    def of_outputs(self, rows: str, index: Array, start: int, stop: int) -> str:
        """The excess of the output channels from `start` up to `stop`, in units of the accumulator."""
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
        """From the layer's exact output, under the name that the other nodes read."""
        rows, index = self.rows(self.unsigned_levels())
        bounds = _bounds(self.pairs.output, len(self.layer.weight))
        parts = [self.of_outputs(rows, index, start, stop) for start, stop in pairwise(bounds)]
        joined = parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=self.axis)
        excess = self.node("Mul", joined, self.per_channel(self.layer.scale))
        self.nodes.append(helper.make_node("Sub", [exact, excess], [output], name=self.prefix))


def _bounds(output: Array, outputs: int) -> list[int]:
    """Cuts the output channels into ranges of about PAIRS_AT_ONCE pairs, each with one pair at least."""
    before = np.searchsorted(output, np.arange(outputs + 1))  # pairs before each channel
    bounds = [0]
    for channel in range(1, outputs):
        new, rest = before[channel] - before[bounds[-1]], len(output) - before[channel]
        if new and rest and before[channel + 1] - before[bounds[-1]] > PAIRS_AT_ONCE:
            bounds.append(channel)
    return [*bounds, outputs]


def saturating(model: onnx.ModelProto, backend: Backend = "onnxruntime") -> tuple[onnx.ModelProto, dict[str, int]]:
    """The model as a CPU without VNNI computes it, for any runtime and CPU, and how many pairs can saturate in each layer.

    All layers with int8 weights and 8-bit activations count as computed in integers, also a Conv whose output is not
    quantized again, which ONNX Runtime leaves in float32 and OpenVINO does not.

    Args:
        model: in QDQ form: DequantizeLinear before the factors of Conv, Gemm and MatMul.
        backend: whose kernels; they differ where an odd number of input channels meets a kernel of several positions.

    Returns:
        The copy, to float32 rounding what the integers give, and pairs by layer, 0 where a layer is exact.

    Raises:
        UserError: the file is of another int8 form, or a layer has a form that is not covered.
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
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # the list about to go owns some
    del copied.graph.node[:]
    copied.graph.node.extend(kept)
    return copied, counts


def _answers(model: onnx.ModelProto, images: Array, threads: int, batch: int) -> Array:
    """Logits, (N, classes), with exact int8 arithmetic on every CPU."""
    runtime = session(model, threads)
    name = runtime.get_inputs()[0].name
    return np.concatenate([runtime.run(None, {name: images[start:start + batch]})[0]
                           for start in range(0, len(images), batch)])


def drop_bound(lost: int, gained: int, images: int, sign: int = 1) -> float:
    """The greatest drop of accuracy that paired answers leave possible at one-sided 95 %; the least with sign -1.

    Source: Tango 1998, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17: the score interval, which holds for few changes and for none.

    Args:
        lost, gained: images that only the exact, only the other arithmetic answers rightly.
        images: all of them.
    """
    if sign < 0:
        return -drop_bound(gained, lost, images)

    def statistic(drop: float) -> float:
        middle = (2 * images - lost + gained) * drop - lost - gained
        root = math.sqrt(max(middle**2 + 8 * images * gained * drop * (1 - drop), 0.0))
        variance = images * ((root - middle) / (2 * images) + drop * (1 - drop))
        return (lost - gained - images * drop) / math.sqrt(variance) if variance > 0 else -math.inf

    low, high = (lost - gained) / images, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if statistic(middle) > -Z else (low, middle)
    return high


def _verdict(lost: int, gained: int, images: int, tolerated: float) -> tuple[str, bool, bool]:
    """A sentence, whether the accuracy holds, and whether the images are enough to tell."""
    drop, most = (lost - gained) / images, drop_bound(lost, gained, images)
    said = f"{'loses' if drop >= 0 else 'gains'} {abs(drop):.2%} on {images} images"
    if most <= tolerated:
        return f"holds: {said}, and at most {most:.2%} of accuracy at 95 % confidence", True, True
    if drop_bound(lost, gained, images, -1) > tolerated:
        return f"does not hold: {said}, more than the tolerated {tolerated:.2%}", False, True
    needed = images
    while drop < tolerated < drop_bound(lost * needed // images, gained * needed // images, needed):
        needed += needed // 10 + 1
    more = f"; about {needed} images would tell" if needed > images else ""
    return (f"not shown to hold: {said}, which leaves up to {most:.2%} possible, and {tolerated:.2%} is tolerated{more}",
            False, False)


def verify_portability(content: bytes, images: Array | torch.Tensor, labels: Sequence[int] | Array | torch.Tensor,
                       tolerated_drop: float = 0.003, backend: Backend = "onnxruntime", threads: int = 1,
                       batch: int = 8) -> dict[str, Any]:
    """Whether a static int8 file keeps its accuracy on a CPU without VNNI, by proof or by emulation on a sample.

    Args:
        content: the ONNX file, in QDQ form.
        images: the sample, (N, C, H, W) float32, preprocessed; the file's own batch dimension must be free.
        labels: their classes, (N,).
        tolerated_drop: of accuracy, as a fraction.
        backend: whose kernels, see `saturating`; ONNX Runtime computes in either case.
        threads, batch: of the emulation; its memory grows with the batch.

    Returns:
        "verdict" in words, "holds" (false also where the sample is too small to tell), "conclusive", "method",
        "layers_that_can_saturate" (pairs by layer) and "machine"; after an emulation "images", "accuracy" and
        "accuracy_saturating" (fractions), "changed_predictions", "drop_at_most" (one-sided 95 %).

    Raises:
        UserError: images and labels do not match, or the file is not one that `saturating` covers.
    """
    try:
        model = onnx.ModelProto.FromString(content)
    except (DecodeError, TypeError) as error:
        raise UserError(f"portability: not an ONNX file: {first_line(error)}") from error
    emulated, counts = saturating(model, backend)
    some = {name: count for name, count in counts.items() if count}
    found: dict[str, Any] = {"layers_that_can_saturate": some, "machine": machine()}
    if not some:
        return {"verdict": f"holds: no sum of two products can exceed 16 bits in any of the {len(counts)} int8 layers",
                "holds": True, "conclusive": True, "method": "no pair of products can exceed 16 bits", **found}
    images, labels = np.asarray(images, np.float32), np.asarray(labels)
    if not len(images) or labels.shape != (len(images),):
        raise UserError(f"portability: expected images with one label each, got {len(images)} images and labels of shape "
                        f"{labels.shape}")
    exact, other = (_answers(graph, images, threads, batch).argmax(1) for graph in (model, emulated))
    lost, gained = int(((exact == labels) & (other != labels)).sum()), int(((exact != labels) & (other == labels)).sum())
    verdict, holds, conclusive = _verdict(lost, gained, len(images), tolerated_drop)
    return {"verdict": verdict, "holds": holds, "conclusive": conclusive, "method": f"emulated on {len(images)} images",
            **found, "images": len(images), "accuracy": float((exact == labels).mean()),
            "accuracy_saturating": float((other == labels).mean()), "changed_predictions": int((exact != other).sum()),
            "drop_at_most": drop_bound(lost, gained, len(images))}
