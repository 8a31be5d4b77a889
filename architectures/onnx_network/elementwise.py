"""Operators that treat each value for itself: activations and arithmetic."""

from __future__ import annotations

import math
import operator as python
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from architectures.onnx_network.builder import Known, NetworkBuilder, Traced, Value
from architectures.onnx_network.constants import limits
from architectures.onnx_network.graph import OnnxNode
from architectures.onnx_network.registry import operator

FLOATS = {1, 10, 11, 16}  # of ONNX's types: float, float16, double, bfloat16
SLOPE = 1 / 6  # of torch's hard sigmoid


@operator("Relu", "Sigmoid", "Tanh", "Erf", "Exp", "Log", "Sqrt", "Abs", "Reciprocal", "Softplus", "Softsign", "HardSwish",
          "Mish", "Silu", "Floor", "Ceil", "Round", "Sin", "Cos")
def read_activation(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a function of one tensor without options."""
    functions: dict[str, Callable[..., Any]] = {
        "Relu": F.relu, "Softplus": F.softplus, "Softsign": F.softsign, "HardSwish": F.hardswish, "Mish": F.mish,
        "Silu": F.silu}
    return build.call(functions.get(node.op) or getattr(torch, node.op.lower()), build.images(node), like=True)


@operator("LeakyRelu", "Elu", "Celu", "Gelu")
def read_sloped(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write an activation with an option."""
    images = build.images(node)
    if node.op == "LeakyRelu":
        return build.call(F.leaky_relu, images, like=True, negative_slope=float(node.number("alpha", 0.01)))
    if node.op == "Gelu":
        return build.call(F.gelu, images, like=True, approximate=node.number("approximate", "none"))
    function = F.elu if node.op == "Elu" else F.celu
    return build.call(function, images, like=True, alpha=float(node.number("alpha", 1.0)))


@operator("Selu")
def read_scaled_elu(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a SELU with the paper's two numbers."""
    if any(abs(node.number(key, value) - value) > 1e-4 for key, value in (("alpha", 1.67326), ("gamma", 1.0507))):
        raise node.refuse("other numbers than torch's")
    return build.call(F.selu, build.images(node), like=True)


@operator("HardSigmoid")
def read_hard_sigmoid(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a hard sigmoid, or with another slope than torch's what it is made of."""
    images, slope, shift = build.images(node), node.number("alpha", 0.2), node.number("beta", 0.5)
    if math.isclose(slope, SLOPE, rel_tol=1e-3) and math.isclose(shift, 0.5, rel_tol=1e-6):
        return build.call(F.hardsigmoid, images, like=True)
    line = build.call(python.add, build.call(python.mul, images, _short(slope), like=True), _short(shift), like=True)
    return build.call(torch.clamp, line, like=True, min=0.0, max=1.0)


@operator("Clip")
def read_clip(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a ReLU6, a ReLU or a clamp."""
    images = build.images(node)
    low, high = limits(node, build.constants(node))
    if (low, high) == (0, 6):
        return build.call(F.relu6, images, like=True)
    if (low, high) == (0, None):
        return build.call(F.relu, images, like=True)
    if low is None and high is None:
        return images
    return build.call(torch.clamp, images, like=True, min=low, max=high)


@operator("Softmax", "LogSoftmax")
def read_softmax(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a softmax over one axis. Before opset 13 it goes over all axes from that one on: one may be longer than 1."""
    images = build.images(node)
    at = node.number("axis", -1 if node.opset >= 13 else 1) % len(images.shape)
    if node.opset < 13:
        long = [axis for axis in range(at, len(images.shape)) if images.shape[axis] != 1]
        if len(long) > 1:
            raise node.refuse("a softmax over several axes")
        at = long[0] if long else at
    if at == (images.batch() or (-1, 0))[0]:
        raise node.refuse("a softmax over all images")
    function = F.softmax if node.op == "Softmax" else F.log_softmax
    return build.call(function, images, like=True, dim=at)


@operator("Identity", "Dropout")
def read_unchanged(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write nothing: the operator does nothing in evaluation."""
    if node.op == "Dropout" and node.has(2) and bool(build.constant(node, 2)):
        raise node.refuse("a dropout in training mode")
    return build.images(node)


@operator("Cast")
def read_cast(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write nothing between floats: the network computes in float32."""
    if node.number("to", 1) not in FLOATS:
        raise node.refuse("values of images become whole numbers")
    return build.images(node)


@operator("Neg")
def read_negative(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a product with -1."""
    return build.call(python.mul, build.images(node), -1.0, like=True)


@operator("Add", "Mul", "Sum")
def read_commutative(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write sums or products of two tensors each, constants behind."""
    function = python.mul if node.op == "Mul" else python.add
    values = sorted((build.value(name) for name in node.inputs), key=lambda value: isinstance(value, Known))
    found = values[0]
    for other in values[1:]:
        found = _of_two(node, build, function, found, other)
    assert isinstance(found, Traced)
    return found


@operator("Sub")
def read_difference(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a difference. A constant behind is added with the other sign, and one before is added to the negative."""
    first, second = (build.value(name) for name in node.inputs)
    if isinstance(second, Known):
        return _of_two(node, build, python.add, first, _changed(second, np.negative))
    if isinstance(first, Known):
        return _of_two(node, build, python.add, build.call(python.mul, second, -1.0, like=True), first)
    return build.call(python.sub, first, second)


@operator("Div")
def read_quotient(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a quotient. A constant below is a factor."""
    first, second = (build.value(name) for name in node.inputs)
    if isinstance(second, Known):
        return _of_two(node, build, python.mul, first, _changed(second, np.reciprocal))
    if isinstance(first, Known):
        return build.call(python.truediv, build.data(node, first), second)
    return build.call(python.truediv, first, second)


@operator("Pow")
def read_power(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a power with a fixed exponent, a square as a product."""
    images, exponent = build.images(node), build.constant(node, 1)
    if exponent is None or exponent.size != 1:
        raise node.refuse("exponents that differ")
    value = float(exponent.reshape(-1)[0])
    if value == 2:
        return build.call(python.mul, images, images, like=True)
    return build.call(torch.sqrt if value == 0.5 else torch.pow, images, *([] if value == 0.5 else [value]), like=True)


@operator("Min", "Max")
def read_extreme(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a clamp with one number."""
    values = sorted((build.value(name) for name in node.inputs), key=lambda value: isinstance(value, Known))
    first, *others = values
    if not isinstance(first, Traced):
        raise node.refuse("constants alone")
    for other in others:
        if isinstance(other, Traced) or not other.fixed or other.arrays[0].size != 1:
            raise node.refuse("the larger or smaller of two tensors")
        number = float(other.arrays[0].reshape(-1)[0])
        if node.op == "Max" and number == 0:
            first = build.call(F.relu, first, like=True)
        else:
            first = build.call(torch.clamp, first, like=True, **{"min" if node.op == "Max" else "max": number})
    return first


def _of_two(node: OnnxNode, build: NetworkBuilder, function: Callable[..., Any], first: Value, second: Value) -> Traced:
    assert isinstance(first, Traced)
    other = build.data(node, second) if isinstance(second, Known) else second
    if isinstance(other, float):
        neutral = 1.0 if function is python.mul else 0.0
        return first if _short(other) == neutral else build.call(function, first, _short(other), like=True)
    return build.call(function, first, other)


def _changed(known: Known, function: Callable[..., Any]) -> Known:
    first, second = (function(array.astype(np.float32)) for array in known.arrays)
    return Known(arrays=(first, first if known.fixed else second), name=known.name)


def _short(value: float) -> float:
    """Return a float of 32 bits as the shortest decimal that means it."""
    return float(str(np.float32(value)))
