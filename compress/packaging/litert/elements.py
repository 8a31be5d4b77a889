"""Operators of a `.tflite` file that compute element by element: arithmetic and activations."""

from __future__ import annotations

import math

import numpy as np
import onnx

from compress.packaging.litert.graph import attributes
from compress.packaging.litert.layers import aligned
from compress.packaging.litert.model import Grid, Placed
from compress.packaging.litert.writer import LitertWriter

BINARY = {"Add": "ADD", "Sub": "SUB", "Mul": "MUL", "Div": "DIV", "Pow": "POW"}
OPTIONS = {"ADD": "AddOptionsT", "SUB": "SubOptionsT", "MUL": "MulOptionsT", "DIV": "DivOptionsT",
           "MAXIMUM": "MaximumMinimumOptionsT", "MINIMUM": "MaximumMinimumOptionsT", "POW": "PowOptionsT"}
WITH_ACTIVATION = ("ADD", "SUB", "MUL", "DIV")
INTEGER = ("ADD", "SUB", "MUL")


def same_order(writer: LitertWriter, first: Placed, second: Placed) -> tuple[Placed, Placed]:
    """Return two tensors in one order of axes, that of the larger one, with as many axes each."""
    axes = max(len(first.order), len(second.order))
    first, second = aligned(writer, first, axes), aligned(writer, second, axes)
    if math.prod(first.shape) >= math.prod(second.shape):
        return first, writer.reordered(second, first.order)
    return writer.reordered(first, second.order), second


def arithmetic(writer: LitertWriter, kind: str, name: str, first: Placed, second: Placed, grid: Grid | None = None,
               activation: int = 0) -> Placed:
    """Write an operator on two tensors that broadcast, and return its output."""
    first, second = same_order(writer, first, second)
    options = getattr(writer.schema, OPTIONS[kind])()
    if activation:
        options.fusedActivationFunction = activation
    shape = np.broadcast_shapes(first.shape, second.shape)
    return writer.operator(kind, name, [first, second], shape, first.order, grid, options)


def ordered_constant(writer: LitertWriter, name: str, other: Placed) -> Placed:
    """Return a tensor of the network; a constant in the order of axes of another tensor, so that nothing is moved."""
    values = writer.graph.constants.get(name)
    if values is None or values.ndim > len(other.order):
        return writer.value(name)
    axes = len(other.order)
    values = values.reshape((1,) * (axes - values.ndim) + values.shape).transpose(other.order)
    placed = writer.constant(values)
    return Placed(index=placed.index, shape=placed.shape, order=other.order)


def binary(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write an operator on two tensors, with the activation behind it."""
    if len(node.input) != 2:
        raise writer.unable(node, f"with {len(node.input)} inputs")
    kind, graph = BINARY[node.op_type], writer.graph
    name, activation = writer.activated(node.output[0]) if kind in WITH_ACTIVATION else (node.output[0], 0)
    grid = writer.target(name) if kind in INTEGER else None
    whole = [writer.integers(each) for each in node.input]
    if grid is not None and whole[0] is not None and whole[1] is not None:
        writer.give(name, arithmetic(writer, kind, node.name, whole[0], whole[1], grid, activation))
        return
    if all(each in graph.constants for each in node.input):
        raise writer.unable(node, "on two constants")
    if node.input[0] in graph.constants:
        second = writer.value(node.input[1])
        first = ordered_constant(writer, node.input[0], second)
    else:
        first = writer.value(node.input[0])
        second = ordered_constant(writer, node.input[1], first)
    writer.give(name, arithmetic(writer, kind, node.name, first, second, None, activation))


def one_number(writer: LitertWriter, value: float) -> Placed:
    """Return a constant of one number, which broadcasts with everything."""
    return Placed(index=writer.file.constant(np.array(value, np.float32)), shape=(), order=())


def with_number(writer: LitertWriter, kind: str, name: str, given: Placed, value: float, activation: int = 0) -> Placed:
    """Write an operator on a tensor and a number, and return its output."""
    options = getattr(writer.schema, OPTIONS[kind])()
    if activation:
        options.fusedActivationFunction = activation
    return writer.operator(kind, name, [given, one_number(writer, value)], given.shape, given.order, None, options)


PLAIN = {"Relu": ("RELU", ""), "Sigmoid": ("LOGISTIC", ""), "Tanh": ("TANH", ""),
         "HardSwish": ("HARD_SWISH", "HardSwishOptionsT"), "Exp": ("EXP", "ExpOptionsT"), "Sqrt": ("SQRT", "")}


def plain_unary(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write an operator that has a name of its own in both."""
    kind, options = PLAIN[node.op_type]
    writer.unary(node, kind, getattr(writer.schema, options)() if options else None)


def relu(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a Relu. On a grid whose lowest level is zero, rounding to that grid is all that it does."""
    whole, grid = writer.integers(node.input[0]), writer.target(node.output[0])
    if whole is None or grid is None or grid.zero_point != -128:
        plain_unary(writer, node)
    else:
        writer.give(node.output[0], writer.on_grid(whole, grid, node.name))


def clip(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a Clip: RELU6 where that is what it is, else a minimum and a maximum."""
    low, high = writer.limits(node)
    if (low, high) == (0.0, 6.0):
        writer.unary(node, "RELU6")
        return
    placed = writer.value(node.input[0])
    for kind, limit in (("MAXIMUM", low), ("MINIMUM", high)):
        if limit is not None:
            placed = with_number(writer, kind, f"{node.name}.{kind.lower()}", placed, limit)
    writer.give(node.output[0], placed)


def hard_sigmoid(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a HardSigmoid: min(6, max(0, 6 (alpha x + beta))) / 6."""
    options, given = attributes(node), writer.value(node.input[0])
    alpha, beta = 6 * options.get("alpha", 0.2), 6 * options.get("beta", 0.5)
    if abs(alpha - 1) > 1e-6:
        given = with_number(writer, "MUL", f"{node.name}.steep", given, alpha)
    shifted = with_number(writer, "ADD", f"{node.name}.shifted", given, beta, writer.schema.ActivationFunctionType.RELU6)
    writer.give(node.output[0], with_number(writer, "MUL", node.name, shifted, 1 / 6))


def leaky_relu(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a LeakyRelu, integer between two grids."""
    options = writer.schema.LeakyReluOptionsT(alpha=attributes(node).get("alpha", 0.01))
    whole, grid = writer.integers(node.input[0]), writer.target(node.output[0])
    given = writer.value(node.input[0]) if whole is None or grid is None else whole
    writer.give(node.output[0], writer.operator("LEAKY_RELU", node.name, [given], given.shape, given.order,
                                                grid if given.grid else None, options))


def prelu(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a PRelu with constant slopes."""
    given = writer.value(node.input[0])
    if node.input[1] not in writer.graph.constants:
        raise writer.unable(node, "its slopes are not constants")
    slopes = ordered_constant(writer, node.input[1], given)
    writer.give(node.output[0], writer.operator("PRELU", node.name, [given, writer.reshaped(slopes, slopes.shape[1:])],
                                                given.shape, given.order))


def reciprocal(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write a Reciprocal: a division of one."""
    given = writer.value(node.input[0])
    one = one_number(writer, 1.0)
    writer.give(node.output[0], writer.operator("DIV", node.name, [one, given], given.shape, given.order,
                                                options=writer.schema.DivOptionsT()))


def _numbers_in(writer: LitertWriter, node: onnx.NodeProto) -> list[float]:
    """Return the constants of one number among a node's inputs."""
    values = [writer.graph.constants[name] for name in node.input if name in writer.graph.constants]
    return [float(value.reshape(())) for value in values if value.size == 1]


def erf(writer: LitertWriter, node: onnx.NodeProto) -> None:
    """Write the Erf of an exact GELU as one GELU where the nodes around it are that, else by a GELU that stands alone.

    With a = max(|y|, tiny): gelu(a) / a is the normal distribution's Phi(a), and erf(y / sqrt(2)) is (2 Phi(a) - 1) y / a.
    Source: Hendrycks and Gimpel 2016.
    """
    graph, before = writer.graph, None
    for other in graph.nodes:
        if other.output[0] == node.input[0] and other.op_type == "Div" and other.input[1] in graph.constants:
            before = other
    gate = graph.only_consumer(node.output[0])
    gated = graph.only_consumer(gate.output[0]) if gate is not None and gate.op_type == "Add" else None
    halved = graph.only_consumer(gated.output[0]) if gated is not None and gated.op_type == "Mul" else None
    if before and gate and gated and halved and halved.op_type == "Mul" and before.input[0] in gated.input and (
            _numbers_in(writer, gate) == [1.0] and _numbers_in(writer, halved) == [0.5]):
        given = writer.value(before.input[0])
        writer.done |= {gate.output[0], gated.output[0], halved.output[0]}
        writer.give(halved.output[0], writer.operator("GELU", halved.name, [given], given.shape, given.order,
                                                      options=writer.schema.GeluOptionsT(approximate=False)))
        return
    name, given = node.name, with_number(writer, "MUL", f"{node.name}.wide", writer.value(node.input[0]), math.sqrt(2))
    size = writer.operator("ABS", f"{name}.abs", [given], given.shape, given.order, options=writer.schema.AbsOptionsT())
    size = with_number(writer, "MAXIMUM", f"{name}.size", size, 1e-6)
    curve = writer.operator("GELU", f"{name}.gelu", [size], size.shape, size.order,
                            options=writer.schema.GeluOptionsT(approximate=False))
    phi = arithmetic(writer, "DIV", f"{name}.phi", curve, size)
    whole = with_number(writer, "ADD", f"{name}.erf", with_number(writer, "MUL", f"{name}.twice", phi, 2.0), -1.0)
    sign = arithmetic(writer, "DIV", f"{name}.sign", given, size)
    writer.give(node.output[0], arithmetic(writer, "MUL", name, whole, sign))
