"""Calls that bring their weights along as arguments."""

from __future__ import annotations

import math
from typing import Any

import torch

from architectures.layers.base import outside, place_of, traced_argument
from architectures.lowering import Lowering, handles, image_shape, rows_are_folded


# ------------------------------------------------------------------------------------------------ weights as arguments


@handles("linear")
def lower_linear(lowering: Lowering, node: Any) -> str:
    weight, bias = traced_argument(node, 1, "weight", None), traced_argument(node, 2, "bias", None)
    outputs, inputs = weight.meta["shapes"][0]
    return lowering.with_weights(node, "Linear", [lowering.source(node.args[0])], {"weight": weight, "bias": bias},
                                 in_features=inputs, out_features=outputs, bias=bias is not None)


@handles("conv2d")
def lower_conv2d(lowering: Lowering, node: Any) -> str:
    weight, bias = traced_argument(node, 1, "weight", None), traced_argument(node, 2, "bias", None)
    stride, padding, dilation = (pair(traced_argument(node, at, key, default)) for at, key, default in
                                 ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1)))
    groups = int(traced_argument(node, 6, "groups", 1))
    outputs, inputs, *kernel = weight.meta["shapes"][0]
    if isinstance(padding, str):
        total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        if padding == "same" and any(amount % 2 for amount in total):
            raise outside(place_of(node), "padding 'same' with an even kernel pads unevenly and")
        padding = tuple(amount // 2 for amount in total) if padding == "same" else (0, 0)
    return lowering.with_weights(
        node, "Conv2d", [lowering.source(node.args[0])], {"weight": weight, "bias": bias}, in_channels=inputs * groups,
        out_channels=outputs, kernel_size=tuple(kernel), stride=stride, padding=padding, dilation=dilation, groups=groups,
        bias=bias is not None)


@handles("conv1d")
def lower_conv1d(lowering: Lowering, node: Any) -> str:
    """A convolution of rows is one of images of one row."""
    weight, bias = traced_argument(node, 1, "weight", None), traced_argument(node, 2, "bias", None)
    stride, padding, dilation = (traced_argument(node, at, key, default) for at, key, default in
                                 ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1)))
    groups = int(traced_argument(node, 6, "groups", 1))
    outputs, inputs, width = weight.meta["shapes"][0]
    channels, length = image_shape(node.args[0])
    stride, padding, dilation = (int(value[0] if isinstance(value, (list, tuple)) else value)
                                 for value in (stride, padding, dilation))
    row = lowering.emit(node, "Reshape", [lowering.source(node.args[0])], shape=[channels, 1, length])
    name = lowering.with_weights(
        node, "Conv2d", [row], {"weight": weight, "bias": bias}, in_channels=inputs * groups, out_channels=outputs,
        kernel_size=(1, width), stride=(1, stride), padding=(0, padding), dilation=(1, dilation), groups=groups,
        bias=bias is not None)
    lowering.weights[f"{name}.weight"] = lowering.weights[f"{name}.weight"].unsqueeze(2)
    return lowering.emit(node, "Reshape", [name], shape=list(image_shape(node)))


@handles("interpolate")
def lower_interpolate(lowering: Lowering, node: Any) -> str:
    mode, corners = traced_argument(node, 3, "mode", "nearest"), traced_argument(node, 4, "align_corners", None)
    factor = traced_argument(node, 2, "scale_factor", None)
    whole = all(float(value).is_integer() for value in (factor if isinstance(factor, (list, tuple)) else [factor or 1]))
    if mode not in ("nearest", "bilinear") or corners or not whole or node.kwargs.get("antialias"):
        raise outside(place_of(node), f"resizing of mode {mode!r}, by a broken factor or with align_corners")
    size = list(image_shape(node)[1:])
    return lowering.emit(node, "Upsample", [lowering.source(node.args[0])], size=size, mode=mode)


def pair(value: Any) -> Any:
    """Return two numbers for one, and what else is given as it is."""
    if isinstance(value, (list, tuple)):
        return tuple(value) * (2 if len(value) == 1 else 1)
    return (value, value) if isinstance(value, int) else value


@handles("batch_norm")
def lower_batch_norm(lowering: Lowering, node: Any) -> str:
    source: Any = node.args[0]
    mean, variance, weight, bias = (traced_argument(node, at, key, None) for at, key in
                                    ((1, "running_mean"), (2, "running_var"), (3, "weight"), (4, "bias")))
    if mean is None or traced_argument(node, 5, "training", False) or (weight is None) != (bias is None):
        raise outside(place_of(node), "a batch norm without stored statistics")
    shape, name = image_shape(source), lowering.source(source)
    channels = mean.meta["shapes"][0][0]
    turned = rows_are_folded(source)
    if turned:
        name = lowering.permuted(node, name, [0, 2, 1])
    tensors = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance}
    name = lowering.with_weights(
        node, "BatchNorm2d" if len(shape) == 3 else "BatchNorm1d", [name], tensors, num_features=channels,
        affine=weight is not None, momentum=traced_argument(node, 6, "momentum", 0.1) or 0.1,
        eps=float(traced_argument(node, 7, "eps", 1e-5)))
    lowering.weights[f"{name}.num_batches_tracked"] = torch.tensor(0)
    return lowering.permuted(node, name, [0, 2, 1]) if turned else name


@handles("layer_norm")
def lower_layer_norm(lowering: Lowering, node: Any) -> str:
    shape = list(traced_argument(node, 1, "normalized_shape", None))
    weight, bias = traced_argument(node, 2, "weight", None), traced_argument(node, 3, "bias", None)
    if weight is None and bias is not None:
        raise outside(place_of(node), "a layer norm with a bias alone")
    return lowering.with_weights(
        node, "LayerNorm", [lowering.source(node.args[0])], {"weight": weight, "bias": bias}, normalized_shape=shape,
        eps=float(traced_argument(node, 4, "eps", 1e-5)), elementwise_affine=weight is not None,
        bias=bias is not None or weight is None)


@handles("group_norm")
def lower_group_norm(lowering: Lowering, node: Any) -> str:
    groups, weight, bias = (traced_argument(node, at, key, None) for at, key in
                            ((1, "num_groups"), (2, "weight"), (3, "bias")))
    if weight is None and bias is not None:
        raise outside(place_of(node), "a group norm with a bias alone")
    if weight is not None and bias is None:  # torch's module has both or none
        normal = lowering.emit(node, "GroupNorm", [lowering.source(node.args[0])], num_groups=int(groups),
                               num_channels=image_shape(node)[0], affine=False,
                               eps=float(traced_argument(node, 4, "eps", 1e-5)))
        scale = lowering.store(weight, (-1, *[1] * (len(image_shape(node)) - 1)))
        return lowering.emit(node, "Multiply", [normal, scale])
    return lowering.with_weights(
        node, "GroupNorm", [lowering.source(node.args[0])], {"weight": weight, "bias": bias}, num_groups=int(groups),
        num_channels=image_shape(node)[0], affine=weight is not None, eps=float(traced_argument(node, 4, "eps", 1e-5)))


@handles("prelu")
def lower_prelu(lowering: Lowering, node: Any) -> str:
    weight = traced_argument(node, 1, "weight", None)
    return lowering.with_weights(node, "PReLU", [lowering.source(node.args[0])], {"weight": weight},
                                 num_parameters=math.prod(weight.meta["shapes"][0]))
