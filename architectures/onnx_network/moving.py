"""Operators that move, cut and join tensors."""

from __future__ import annotations

import math
import operator as python
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from architectures.onnx_network.batch import place_images, with_images
from architectures.onnx_network.builder import COUNTS, Known, NetworkBuilder, Traced
from architectures.onnx_network.constants import listed, reshaped, cuts_of, split_sizes
from architectures.onnx_network.graph import OnnxNode
from architectures.onnx_network.layout import outside_of_images, permute, reshape_to
from architectures.onnx_network.network import ImageCount, KeptTensor, expand_to
from architectures.onnx_network.registry import operator


@operator("Reshape")
def read_reshape(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a reshape for any number of images, see `architectures/onnx_network/batch.py`."""
    images, target = build.images(node), build.value(node.inputs[1])
    if not isinstance(target, Known):
        raise node.refuse("a shape that is computed from the images")
    zeros = bool(node.number("allowzero", 0))
    try:
        if target.fixed:
            return _to_fixed(build, images, target.arrays[0].tolist(), zeros)
        shapes = [reshaped(probe.shape, array.tolist(), zeros)
                  for probe, array in zip(images.probes, target.arrays, strict=True)]
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise node.refuse(f"from {list(images.shape)}: {error}") from error
    return _to_sizes(node, build, images, shapes)


@operator("Flatten")
def read_flatten(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write torch's flatten behind the batch, another one as a reshape."""
    images = build.images(node)
    at = node.number("axis", 1)
    at = at + len(images.shape) if at < 0 else at
    if at == 1:
        return _flat(build, images)
    return _to_fixed(build, images, [math.prod(_in_file(build, images)[:at]), -1], False)


@operator("Squeeze", "Unsqueeze")
def read_squeeze(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a reshape that leaves out or adds axes of size one. The batch is no such axis, even where the file fixes it."""
    images = build.images(node)
    axes, shape = listed(node, build.constants(node), "axes", 1), _in_file(build, images)
    if node.op == "Squeeze":
        gone = {axis % len(shape) for axis in axes} if axes is not None else {
            axis for axis, size in enumerate(shape) if size == 1 and (images.batch() or (-1,))[0] != axis}
        target = [size for axis, size in enumerate(shape) if axis not in gone]
    else:
        new = {axis % (len(shape) + len(axes or ())) for axis in axes or ()}
        rest = iter(shape)
        target = [1 if axis in new else next(rest) for axis in range(len(shape) + len(new))]
    return _to_fixed(build, images, target, True)


@operator("Transpose")
def read_transpose(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a permutation; several in a row are one."""
    images = build.images(node)
    return permute(build, images, node.number("perm", list(range(len(images.shape)))[::-1]))


@operator("Concat")
def read_concatenation(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a concatenation; constants among the parts are expanded to the number of images."""
    values = [build.value(name) for name in node.inputs]
    like = next(value for value in values if isinstance(value, Traced))
    rank = len(like.shape)
    batch, at = like.batch(), node.number("axis", 0) % rank
    parts: list[Any] = []
    for value in values:
        if isinstance(value, Traced):
            parts.append(value)
            continue
        part = build.data(node, value, learned=True)
        if isinstance(part, float):
            raise node.refuse("one number among the parts")
        if isinstance(part, KeptTensor):
            sizes: list[int | ImageCount] = list(value.arrays[0].shape)
            if batch and batch[0] != at and sizes[batch[0]] == batch[1] * build.file_batch:
                sizes = with_images(value.arrays[0].shape, *batch)
                part = build.call(expand_to, part, sizes)
        parts.append(part)
    return parts[0] if len(parts) == 1 else build.call(torch.cat, parts, dim=at)


@operator("Expand")
def read_expansion(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write an expand, or nothing where the tensor has the sizes already."""
    images, target = build.images(node), build.value(node.inputs[1])
    if not isinstance(target, Known):
        raise node.refuse("a shape that is computed from the images")
    batch, sizes = images.batch(), target.arrays[0].tolist()
    more = len(sizes) - len(images.shape)
    if batch and more >= 0 and target.fixed and sizes[batch[0] + more] in (1, batch[1] * build.file_batch):
        sizes[batch[0] + more] = 2 * batch[1]  # the file's number of images
    whole = np.broadcast_shapes(images.shape, sizes)
    if whole == images.shape:
        return images
    at = batch[0] + len(whole) - len(images.shape) if batch else -1
    return build.call(expand_to, images, with_images(whole, at, batch[1] if batch else 1))


@operator("Tile")
def read_tiling(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write nothing where nothing is repeated."""
    times = build.constant(node, 1)
    if times is None or any(times != 1):
        raise node.refuse("repeated tensors")
    return build.images(node)


@operator("Slice")
def read_cutting(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a slice of each axis that is not taken whole."""
    images = build.images(node)
    rank, batch = len(images.shape), images.batch()
    cuts = [slice(None)] * rank
    for at, cut in _slices(node, build, rank):
        if cut.step is not None and cut.step < 1:
            raise node.refuse("a negative step")
        size = images.shape[at]
        start, stop, step = cut.indices(size)
        if batch and at == batch[0]:
            if start or (cut.stop is not None and 0 <= cut.stop < batch[1] * build.file_batch) or step != 1:
                raise node.refuse("some of the images")
            continue
        if (start, stop, step) != (0, size, 1):
            cuts[at] = slice(start, stop, step)
    if all(cut == slice(None) for cut in cuts):
        return images
    while cuts[-1] == slice(None):
        cuts.pop()
    return build.call(python.getitem, images, tuple(cuts))


@operator("Split")
def read_splitting(node: OnnxNode, build: NetworkBuilder) -> list[Traced]:
    """Write a split, and a call for each of its parts."""
    images = build.images(node)
    at = node.number("axis", 0) % len(images.shape)
    sizes = split_sizes(node, build.constants(node), images.shape[at])
    if (images.batch() or (-1,))[0] == at or min(sizes) < 1:
        raise node.refuse("some of the images, or parts of no size")
    parts = build.call(torch.split, images, sizes, dim=at)
    return [build.call(python.getitem, parts, number) for number in range(len(node.outputs))]


@operator("Gather")
def read_gathering(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a selection by number, a slice, or a gather with stored numbers."""
    images, numbers = build.images(node), build.value(node.inputs[1])
    at = node.number("axis", 0) % len(images.shape)
    if isinstance(numbers, Known) and not numbers.fixed and len(images.shape) == 1 and all(
            np.array_equal(array.reshape(-1), np.arange(probe.numel()))
            for array, probe in zip(numbers.arrays, images.probes, strict=True)):
        return _to_sizes(node, build, images, [array.shape for array in numbers.arrays])  # torch's as_strided, in order
    if isinstance(numbers, Known) and numbers.fixed and len(images.shape) == 1 and np.array_equal(
            numbers.arrays[0].reshape(-1), np.arange(math.prod(_in_file(build, images)))):
        return _to_fixed(build, images, list(numbers.arrays[0].shape), True)
    return _gathered(node, build, images, at)


def _gathered(node: OnnxNode, build: NetworkBuilder, images: Traced, at: int) -> Traced:
    indices = build.constant(node, 1)
    if indices is None or (images.batch() or (-1,))[0] == at or indices.ndim > 1:
        raise node.refuse("some of the images, or a table of numbers")
    size = images.shape[at]
    if indices.ndim == 0:
        return build.call(torch.select, images, at, int(indices) % size)
    numbers = indices % size
    start, stop = int(numbers[0]), int(numbers[-1]) + 1
    if np.array_equal(numbers, np.arange(start, stop)):
        if (start, stop) == (0, size):
            return images
        return build.call(python.getitem, images, (slice(None),) * at + (slice(start, stop, 1),))
    stored = build.data(node, Known(arrays=(numbers.astype(np.int64),) * 2))
    return build.call(torch.index_select, images, at, stored)


@operator("Pad")
def read_padding(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a constant padding of the last axes."""
    images, given = build.images(node), build.constants(node)
    rank = len(images.shape)
    sides, axes = listed(node, given, "pads", 1) or [], listed(node, given, "axes", 3) or list(range(rank))
    if node.number("mode", "constant") != "constant" or len(sides) != 2 * len(axes):
        raise node.refuse(f"padding of the mode {node.number('mode', 'constant')}")
    by_axis = [[0, 0] for _ in range(rank)]
    for axis, before, after in zip(axes, sides[:len(axes)], sides[len(axes):], strict=True):
        by_axis[axis % rank] = [before, after]
    if by_axis[(images.batch() or (0,))[0]] != [0, 0] or min(sides, default=0) < 0:
        raise node.refuse("padding of the batch, or a negative one")
    while by_axis and by_axis[0] == [0, 0]:
        by_axis.pop(0)
    if not by_axis:
        return images
    value = given[2] if len(given) > 2 else None
    number = float(node.number("value", 0.0) if value is None or value.size == 0 else value.reshape(-1)[0])
    return build.call(F.pad, images, tuple(size for pair in by_axis[::-1] for size in pair), value=number)


@operator("DepthToSpace", "SpaceToDepth")
def read_blocks(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write a reshape, a permutation and a reshape."""
    images, size = build.images(node), node.number("blocksize", 1)
    _, channels, height, width = images.shape
    if node.op == "SpaceToDepth":
        parts = _per_image(build, images, [channels, height // size, size, width // size, size])
        moved = permute(build, parts, (0, 3, 5, 1, 2, 4))
        return _per_image(build, moved, [channels * size * size, height // size, width // size])
    few, depth_first = channels // size**2, node.number("mode", "DCR") == "DCR"
    parts = _per_image(build, images, [*([size, size, few] if depth_first else [few, size, size]), height, width])
    moved = permute(build, parts, (0, 3, 4, 1, 5, 2) if depth_first else (0, 1, 4, 2, 5, 3))
    return _per_image(build, moved, [few, height * size, width * size])


@operator("Einsum")
def read_einsum(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write torch's einsum; the equation names the axes in the same way."""
    values = [build.value(name) for name in node.inputs]
    tensors = [build.data(node, value) if isinstance(value, Known) else value for value in values]
    return build.call(torch.einsum, node.number("equation", ""), *tensors)


@operator("Where")
def read_choice(node: OnnxNode, build: NetworkBuilder) -> Traced:
    """Write nothing where a constant condition chooses one of the tensors everywhere."""
    condition = build.constant(node, 0)
    for at, chosen in ((1, True), (2, False)):
        if condition is not None and (condition == chosen).all():
            return build.images(node, at)
    raise node.refuse("a choice between values of images")


def flat_logits(build: NetworkBuilder, images: Traced) -> Traced:
    """Return logits as (N, classes): the axes behind have the size one."""
    return images if len(images.shape) == 2 else _flat(build, images)


def _slices(node: OnnxNode, build: NetworkBuilder, rank: int) -> list[tuple[int, slice]]:
    """Return the cuts of a Slice. An end that is the number of images, or another size of it, may be computed."""
    inputs: list[Any] = [None]
    for at in range(1, len(node.inputs)):
        value = build.value(node.inputs[at]) if node.has(at) else None
        if isinstance(value, Traced):
            raise node.refuse("ends that are computed from the images")
        inputs.append(value.arrays[0] if value else None)
    return cuts_of(node, inputs, rank)


def _in_file(build: NetworkBuilder, images: Traced) -> list[int]:
    """Return the shape that a tensor has in the file, for the number of images that the file fixes."""
    shape, batch = list(images.shape), images.batch()
    if batch:
        shape[batch[0]] = batch[1] * build.file_batch
    return shape


def _to_fixed(build: NetworkBuilder, images: Traced, target: list[int], allow_zero: bool) -> Traced:
    """Reshape to a shape of the file that has no sizes for the number of images."""
    batch = images.batch()
    shape = _in_file(build, images)
    whole = reshaped(shape, target, allow_zero)
    if not batch:
        return build.call(torch.reshape, images, whole)
    return _placed(build, images, whole, *place_images(whole, outside_of_images(images), build.file_batch))


def _to_sizes(node: OnnxNode, build: NetworkBuilder, images: Traced, shapes: Sequence[Sequence[int]]) -> Traced:
    """Reshape to sizes that the file computes from the number of images."""
    differing = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if sizes[0] != sizes[1]]
    batch = images.batch()
    if len(differing) != 1 or batch is None or shapes[0][differing[0]] % COUNTS[0]:
        raise node.refuse(f"shapes {[list(shape) for shape in shapes]} for two and three images")
    axis = differing[0]
    outside = outside_of_images(images) // math.prod(shapes[0][:axis])
    return _placed(build, images, shapes[0], axis, shapes[0][axis] // COUNTS[0], max(1, outside))


def _placed(build: NetworkBuilder, images: Traced, sizes: Sequence[int], axis: int, times: int, outside: int) -> Traced:
    """Reshape, or do nothing where the sizes and the place of the images are the same; join all of an image by flatten."""
    batch, first = images.batch(), images.front is None
    wanted = [size for at, size in enumerate(sizes) if at != axis]
    if first and batch == (axis, times) and outside == 1 and wanted == [
            size for at, size in enumerate(images.shape) if at != axis]:
        return images
    if first and batch == (0, 1) and (axis, times) == (0, 1) and len(sizes) == 2:
        return _flat(build, images)
    return reshape_to(build, images, sizes, axis, times, outside)


def _flat(build: NetworkBuilder, images: Traced) -> Traced:
    return images if len(images.shape) == 2 else build.call(torch.flatten, images, 1)


def _per_image(build: NetworkBuilder, images: Traced, shape: list[int]) -> Traced:
    return build.call(torch.reshape, images, [ImageCount(), *shape])
