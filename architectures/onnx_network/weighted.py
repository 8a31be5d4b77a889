"""Operators with weights: convolutions, matrix products, normalizations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from architectures.onnx_network.builder import Known, NetworkBuilder, Traced
from architectures.onnx_network.graph import Array, OnnxNode
from architectures.onnx_network.layout import along_last
from architectures.onnx_network.registry import operator


@operator("Conv")
def read_convolution(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a Conv2d, with a bias that an Add behind it holds, and a Pad before it where the sides differ."""
    images, weight, bias = build.images(node), build.constant(node, 1), build.constant(node, 2)
    if weight is None or weight.ndim != 4 or len(images.shape) != 4:
        raise node.refuse("only convolutions of images are known here")
    stride, dilation = _pair(node, "strides"), _pair(node, "dilations")
    padding = pads(node, images, weight.shape[2:], stride, dilation)
    symmetric = padding[0] == padding[2] and padding[1] == padding[3]
    if not symmetric:
        images = build.call(F.pad, images, (padding[1], padding[3], padding[0], padding[2]))
    groups = node.number("group", 1)
    bias, last = _added(node, build, bias, weight.shape[0], channels_at=1)
    found = build.layer(
        node, nn.Conv2d, {"weight": weight, "bias": bias}, images, in_channels=weight.shape[1] * groups,
        out_channels=weight.shape[0], kernel_size=weight.shape[2:], stride=stride,
        padding=padding[:2] if symmetric else (0, 0), dilation=dilation, groups=groups, bias=bias is not None,
        named_by=_name_of(last, node))
    return _instead(last, build, found)


@operator("Gemm")
def read_general_product(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a Linear; alpha and beta go into its weights."""
    images, weight = build.images(node), build.constant(node, 1)
    if weight is None or node.number("transA", 0) or len(images.shape) != 2:
        raise node.refuse("a product of two constants, or of the transposed images")
    bias = build.constant(node, 2)
    weight = (weight if node.number("transB", 0) else weight.T) * np.float32(node.number("alpha", 1.0))
    if bias is not None:
        bias = bias * np.float32(node.number("beta", 1.0))
    return _linear(node, build, images, weight, bias)


@operator("MatMul")
def read_matrix_product(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a Linear where the second factor is a stored matrix, else a product of tensors."""
    first, second = build.value(node.inputs[0]), build.value(node.inputs[1])
    if isinstance(first, Traced) and isinstance(second, Known) and second.fixed and second.arrays[0].ndim == 2:
        return _linear(node, build, first, second.arrays[0].T, None)
    factors = [build.data(node, value) if isinstance(value, Known) else value for value in (first, second)]
    return build.call(torch.matmul, *factors)


@operator("BatchNormalization")
def read_batch_normalization(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a batch norm with the stored statistics."""
    images = build.images(node)
    names = ("weight", "bias", "running_mean", "running_var")
    weights = {name: build.constant(node, at + 1) for at, name in enumerate(names)}
    if node.number("training_mode", 0) or len(images.shape) not in (2, 3, 4):
        raise node.refuse("a batch norm in training mode, or of other dimensions than an image's")
    kind = nn.BatchNorm2d if len(images.shape) == 4 else nn.BatchNorm1d
    return build.layer(node, kind, weights, images, like=True, num_features=images.shape[1],
                       eps=_float(node.number("epsilon", 1e-5)), momentum=round(1 - node.number("momentum", 0.9), 6))


@operator("LayerNormalization")
def read_layer_normalization(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a LayerNorm over the last axes."""
    images, weight, bias = build.images(node), build.constant(node, 1), build.constant(node, 2)
    at = node.number("axis", -1) % len(images.shape)
    shape = images.shape[at:]
    scales = {"weight": weight, "bias": bias}
    whole: dict[str, Array | None] = {name: None if array is None else np.broadcast_to(array, shape)
                                      for name, array in scales.items()}
    if weight is None and bias is not None:
        whole["weight"] = np.ones(shape, np.float32)
    options: dict[str, Any] = {"normalized_shape": shape, "eps": _float(node.number("epsilon", 1e-5)),
                               "elementwise_affine": whole["weight"] is not None, "bias": bias is not None}
    if len(shape) > 1:
        return build.layer(node, nn.LayerNorm, whole, images, like=True, **options)
    return along_last(build, images, lambda first: build.layer(node, nn.LayerNorm, whole, first, like=True, **options))


@operator("GroupNormalization")
def read_group_normalization(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a GroupNorm. Before opset 21 the scales are those of groups, after it those of channels."""
    images, groups = build.images(node), node.number("num_groups", 1)
    weights = {"weight": build.constant(node, 1), "bias": build.constant(node, 2)}
    weights = {name: np.repeat(array, images.shape[1] // groups) if array is not None and array.size == groups else array
               for name, array in weights.items()}
    return build.layer(node, nn.GroupNorm, weights, images, like=True, num_groups=groups, num_channels=images.shape[1],
                       eps=_float(node.number("epsilon", 1e-5)))


@operator("InstanceNormalization")
def read_instance_normalization(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a GroupNorm with one channel a group."""
    images = build.images(node)
    weights = {"weight": build.constant(node, 1), "bias": build.constant(node, 2)}
    return build.layer(node, nn.GroupNorm, weights, images, like=True, num_groups=images.shape[1],
                       num_channels=images.shape[1], eps=_float(node.number("epsilon", 1e-5)))


@operator("PRelu")
def read_parametric_relu(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a PReLU with one slope, or one a channel."""
    images, slope = build.images(node), build.constant(node, 1)
    if slope is None or slope.size not in (1, images.shape[1]) or (slope.size > 1 and slope.shape[0] == 1):
        raise node.refuse("its slopes are neither one number nor one a channel")
    return build.layer(node, nn.PReLU, {"weight": slope.reshape(-1)}, images, like=True, num_parameters=slope.size)


def _linear(node: OnnxNode, build: NetworkBuilder, images: Traced, weight: Array, bias: Array | None) -> Traced:
    bias = None if bias is None else np.broadcast_to(bias.reshape(-1), (weight.shape[0],))
    bias, last = _added(node, build, bias, weight.shape[0], channels_at=-1)
    found = along_last(build, images, lambda first: build.layer(
        node, nn.Linear, {"weight": weight, "bias": bias}, first, in_features=weight.shape[1],
        out_features=weight.shape[0], bias=bias is not None, named_by=_name_of(last, node)))
    return _instead(last, build, found)


def _added(node: OnnxNode, build: NetworkBuilder, bias: Array | None, width: int, channels_at: int,
           ) -> tuple[Array | None, OnnxNode]:
    """Return the bias with the constant of an Add that alone reads the node, and the last node that is dealt with."""
    reader = build.only_reader(node.outputs[0])
    if reader is None or reader.op != "Add" or len(set(reader.inputs)) < 2:
        return bias, node
    other = next(name for name in reader.inputs if name != node.outputs[0])
    array = build.graph.constants.get(other)
    at = channels_at if channels_at < 0 else channels_at - 4
    if array is None or array.dtype.kind != "f" or array.ndim > (4 if channels_at > 0 else 3):
        return bias, node
    if array.size != width or (width > 1 and (array.ndim < -at or array.shape[at] != width)):
        return bias, node
    array = array.reshape(-1)
    return (array if bias is None else bias + array), reader


def _name_of(last: OnnxNode, node: OnnxNode) -> str:
    """Return the name of the constant that an Add behind a node adds."""
    return "" if last is node else next(name for name in last.inputs if name != node.outputs[0])


def _instead(last: OnnxNode, build: NetworkBuilder, found: Traced) -> Traced:
    """Let the result stand for that of the last node, too, which need not be walked then."""
    build.values[last.outputs[0]] = found
    return found


def pads(node: OnnxNode, images: Traced, kernel: Any, stride: Any, dilation: Any) -> tuple[int, int, int, int]:
    """Return the padding at the top, left, bottom and right, also where the file states how to compute it."""
    how = node.number("auto_pad", "NOTSET")
    if how == "VALID":
        return 0, 0, 0, 0
    if how in ("NOTSET", ""):
        top, left, bottom, right = node.number("pads", [0, 0, 0, 0])
        if min(top, left, bottom, right) < 0:
            raise node.refuse("negative padding")
        return top, left, bottom, right
    sides = []
    for size, width, step, apart in zip(images.shape[2:], kernel, stride, dilation, strict=True):
        missing = max(0, (-(-size // step) - 1) * step + (width - 1) * apart + 1 - size)
        small = missing // 2
        sides.append((small, missing - small) if how == "SAME_UPPER" else (missing - small, small))
    return sides[0][0], sides[1][0], sides[0][1], sides[1][1]


def _pair(node: OnnxNode, key: str) -> tuple[int, int]:
    given = node.number(key, [1, 1])
    if len(given) != 2 or min(given) < 1:
        raise node.refuse(f"{key} {given}")
    return given[0], given[1]


def _float(value: float) -> float:
    """Return a float of the file, which holds 32 bits, with as few digits as they need."""
    return float(str(np.float32(value)))
