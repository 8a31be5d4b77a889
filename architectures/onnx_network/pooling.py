"""Operators that take the largest, the mean or the sum of windows or of whole axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from architectures.onnx_network.builder import Known, NetworkBuilder, Traced
from architectures.onnx_network.constants import listed
from architectures.onnx_network.graph import OnnxNode
from architectures.onnx_network.registry import operator
from architectures.onnx_network.weighted import pads

LEAST = float(np.finfo(np.float32).min)  # a window is never all padding


@operator("MaxPool", "AveragePool")
def read_pooling(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write torch's pooling, with a Pad before it where the sides differ."""
    images = build.images(node)
    kernel = tuple(node.number("kernel_shape", ()))
    stride, dilation = tuple(node.number("strides", (1, 1))), tuple(node.number("dilations", (1, 1)))
    if len(kernel) != 2 or len(images.shape) != 4 or len(node.outputs) > 1 or min(*kernel, *stride, *dilation) < 1:
        raise node.refuse("only pooling of images without its places is known here")
    top, left, bottom, right = pads(node, images, kernel, stride, dilation)
    options: dict[str, Any] = {"kernel_size": kernel, "stride": stride, "ceil_mode": bool(node.number("ceil_mode", 0))}
    largest, same = node.op == "MaxPool", (top, left) == (bottom, right)
    fits = same and 2 * top <= kernel[0] and 2 * left <= kernel[1]
    if largest:
        if not fits:
            images = build.call(F.pad, images, (left, right, top, bottom), value=LEAST)
        return build.call(F.max_pool2d, images, **options, padding=(top, left) if fits else (0, 0), dilation=dilation)
    if dilation != (1, 1):
        raise node.refuse("means over windows with gaps")
    counted = bool(node.number("count_include_pad", 0))
    if fits:
        return build.call(F.avg_pool2d, images, **options, padding=(top, left), count_include_pad=counted)
    height, width = images.shape[2:]
    padded = build.call(F.pad, images, (left, right, top, bottom))
    means = build.call(F.avg_pool2d, padded, **options)
    if counted:
        return means
    inside = torch.zeros(1, 1, height + top + bottom, width + left + right)
    inside[..., top:top + height, left:left + width] = 1
    share = F.avg_pool2d(inside, **options)[0].reciprocal().numpy()
    return build.call(torch.mul, means, build.data(node, Known(arrays=(share, share))))


@operator("GlobalAveragePool", "GlobalMaxPool")
def read_whole(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a pooling to one pixel."""
    images = build.images(node)
    if len(images.shape) != 4:
        raise node.refuse("only pooling of images is known here")
    function: Any = F.adaptive_avg_pool2d if node.op == "GlobalAveragePool" else F.adaptive_max_pool2d
    return build.call(function, images, (1, 1))


@operator("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2")
def read_reduction(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a reduction over named axes; a mean over both sides of an image is a pooling."""
    images = build.images(node)
    rank, axes = len(images.shape), listed(node, build.constants(node), "axes", 1)
    if not axes:
        if node.number("noop_with_empty_axes", 0):
            return images
        raise node.refuse("over all images")
    over, keep = sorted(axis % rank for axis in axes), bool(node.number("keepdims", 1))
    if (images.batch() or (-1,))[0] in over:
        raise node.refuse("over all images")
    if node.op == "ReduceMean" and rank == 4 and over == [2, 3] and keep:
        return build.call(F.adaptive_avg_pool2d, images, (1, 1))
    if node.op == "ReduceL2":
        return build.call(torch.linalg.vector_norm, images, dim=over, keepdim=keep)
    functions: dict[str, Any] = {"ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax,
                                 "ReduceMin": torch.amin}
    return build.call(functions[node.op], images, dim=over, keepdim=keep)


@operator("Resize")
def read_resizing(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write torch's interpolation of images to whole multiples of their sides: the nearest pixel, or bilinear."""
    images, at = build.images(node), 1 if node.opset < 11 else 2
    scales, sizes = build.constant(node, at), build.constant(node, 3)
    if len(images.shape) != 4 or (scales is None or scales.size != 4) == (sizes is None or sizes.size != 4):
        raise node.refuse("only images of known scale are resized here")
    if scales is None or scales.size != 4:
        assert sizes is not None
        scales = sizes[2:] / images.shape[2:]  # the first two are those of the batch and the channels
    else:
        scales = scales[2:] if (scales[:2] == 1).all() else np.zeros(2)
    kind = (node.number("mode", "nearest"), node.number("coordinate_transformation_mode",
                                                        "asymmetric" if node.opset < 11 else "half_pixel"))
    floor = node.opset < 11 or node.number("nearest_mode", "round_prefer_floor") == "floor"
    bilinear = kind in (("linear", "half_pixel"), ("linear", "pytorch_half_pixel"))
    if (scales < 1).any() or (scales % 1).any() or node.number("antialias", 0) or not (
            bilinear or (kind == ("nearest", "asymmetric") and floor)):
        raise node.refuse("only whole factors, to the nearest pixel before or between pixels' centres, have a layer")
    size = tuple(int(side * scale) for side, scale in zip(images.shape[2:], scales, strict=True))
    return build.call(F.interpolate, images, size=size, mode="bilinear" if bilinear else "nearest")


@operator("LRN")
def read_local_response(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write torch's local response normalization, whose window is the same where its size is odd."""
    size = node.number("size", 1)
    if size % 2 == 0:
        raise node.refuse("a window of even size")
    return build.call(F.local_response_norm, build.images(node), size, alpha=float(node.number("alpha", 1e-4)),
                      beta=float(node.number("beta", 0.75)), k=float(node.number("bias", 1.0)), like=True)


@operator("Normalize")
def read_unit_length(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write torch's normalize; the operator is a pattern of `architectures/onnx_network/patterns.py`."""
    return build.call(F.normalize, build.images(node), like=True, dim=node.number("axis", -1),
                      eps=float(node.number("epsilon", 1e-12)))
