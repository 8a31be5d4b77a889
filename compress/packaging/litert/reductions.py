"""Operators of a `.tflite` file over whole axes: means and sums, norms, softmax."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from compress.packaging.litert.elements import arithmetic, ordered_constant, with_number
from compress.packaging.litert.graph import attributes
from compress.packaging.litert.model import Placed
from compress.packaging.litert.writer import LitertWriter


def reduced_axes(writer: LitertWriter, node: onnx.NodeProto, given: Placed) -> list[int]:
    """Return the axes, in the file, that a node names; all where it names none."""
    axes = attributes(node).get("axes")
    if axes is None and len(node.input) > 1 and node.input[1]:
        if node.input[1] not in writer.graph.constants:
            raise writer.unable(node, "its axes are not constants")
        axes = writer.graph.constants[node.input[1]].reshape(-1).tolist()
    count = len(given.order)
    return [given.order.index(axis % count) for axis in (range(count) if axes is None else axes)]


def reduced(writer: LitertWriter, kind: str, name: str, given: Placed, places: Sequence[int], keep: bool) -> Placed:
    """Write an operator over whole axes of the file, and return its output."""
    kept = [place for place in range(len(given.order)) if place not in places]
    shape = [1 if place in places else size for place, size in enumerate(given.shape)]
    order: Sequence[int] = given.order
    if not keep:
        rest = sorted(given.order[place] for place in kept)
        shape, order = [given.shape[place] for place in kept], [rest.index(given.order[place]) for place in kept]
    return writer.operator(kind, name, [given, writer.numbers(sorted(places))], shape, order,
                           options=writer.schema.ReducerOptionsT(keepDims=keep))


REDUCTIONS = {"ReduceMean": "MEAN", "ReduceSum": "SUM", "ReduceMax": "REDUCE_MAX"}


def reduction(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a mean, sum or maximum over axes."""
    given = writer.value(node.input[0])
    places, keep = reduced_axes(writer, node, given), bool(attributes(node).get("keepdims", 1))
    writer.give(node.output[0], reduced(writer, REDUCTIONS[node.op_type], node.name, given, places, keep))


def length(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a ReduceL2: the root of the sum of squares."""
    given = writer.value(node.input[0])
    squares = writer.operator("SQUARE", f"{node.name}.squares", [given], given.shape, given.order)
    total = reduced(writer, "SUM", f"{node.name}.sum", squares, reduced_axes(writer, node, given),
                    bool(attributes(node).get("keepdims", 1)))
    writer.give(node.output[0], writer.operator("SQRT", node.name, [total], total.shape, total.order))


def standardized(writer: LitertWriter, name: str, given: Placed, places: Sequence[int], epsilon: float) -> Placed:
    """Write (x - mean) / sqrt(variance + epsilon) over axes of the file, and return it. Source: Ba et al. 2016, eq. 3."""
    mean = reduced(writer, "MEAN", f"{name}.mean", given, places, True)
    centred = arithmetic(writer, "SUB", f"{name}.centred", given, mean)
    squares = writer.operator("SQUARE", f"{name}.squares", [centred], centred.shape, centred.order)
    variance = reduced(writer, "MEAN", f"{name}.variance", squares, places, True)
    safe = with_number(writer, "ADD", f"{name}.safe", variance, epsilon)
    root = writer.operator("RSQRT", f"{name}.root", [safe], safe.shape, safe.order)
    return arithmetic(writer, "MUL", f"{name}.normal", centred, root)


def layer_norm(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a LayerNormalization."""
    options, given = attributes(node), writer.value(node.input[0])
    count = len(given.order)
    places = [given.order.index(axis) for axis in range(options.get("axis", -1) % count, count)]
    placed = standardized(writer, node.name, given, places, options.get("epsilon", 1e-5))
    for kind, name in zip(("MUL", "ADD"), node.input[1:], strict=False):
        if name:
            placed = arithmetic(writer, kind, f"{node.name}.{kind.lower()}", placed, ordered_constant(writer, name, placed))
    writer.give(node.output[0], placed)


def channel_norm(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write an InstanceNormalization, or a BatchNormalization that was not folded."""
    options, constants, given = attributes(node), writer.graph.constants, writer.value(node.input[0])
    if any(name not in constants for name in node.input[1:]):
        raise writer.unable(node, "its factors are not constants")
    scale, offset = (constants[name].astype(np.float64) for name in node.input[1:3])
    if node.op_type == "BatchNormalization":
        mean, variance = (constants[name].astype(np.float64) for name in node.input[3:5])
        scale = scale / np.sqrt(variance + options.get("epsilon", 1e-5))
        offset = offset - mean * scale
    else:
        places = [place for place, axis in enumerate(given.order) if axis > 1]
        given = standardized(writer, node.name, given, places, options.get("epsilon", 1e-5))
    shape = [len(scale) if axis == 1 else 1 for axis in given.order]
    for kind, values, neutral in (("MUL", scale, 1), ("ADD", offset, 0)):
        if (values != neutral).any():
            constant = writer.constant(values.reshape(shape).astype(np.float32))
            given = arithmetic(writer, kind, f"{node.name}.{kind.lower()}", given,
                               Placed(index=constant.index, shape=constant.shape, order=given.order))
    writer.give(node.output[0], given)


def softmax(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a Softmax; the runtime's is over the last axis."""
    given = writer.value(node.input[0])
    axis = attributes(node).get("axis", -1) % len(given.order)
    given = writer.reordered(given, [*(other for other in given.order if other != axis), axis])
    options = writer.schema.SoftmaxOptionsT(beta=1.0)
    writer.give(node.output[0], writer.operator("SOFTMAX", node.name, [given], given.shape, given.order, options=options))
