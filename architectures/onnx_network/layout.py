"""Reshapes and permutations that keep the images first, whatever the file does with them.

A file may have (sequence, N, features), (N * heads, ...) or even (sequence * N, features). Layers of an architecture have
the images first. A value whose images are elsewhere is kept in both forms, and what nobody reads is left out in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from architectures.onnx_network.builder import Front, NetworkBuilder, Traced
from architectures.onnx_network.network import ImageCount

Groups = Sequence[Sequence[int]]


def front_of(build: NetworkBuilder, images: Traced) -> Front:
    """Return a value with the images first, and the axes of the file in terms of its axes."""
    if images.front:
        return images.front
    batch = images.batch()
    assert batch is not None
    axis, times = batch
    if times > 1:  # N * times becomes two axes
        sizes: list[int | ImageCount] = list(images.shape)
        sizes[axis:axis + 1] = [ImageCount(), times]
        images = build.call(torch.reshape, images, sizes)
    rank = len(images.shape)
    order = [axis, *(at for at in range(rank) if at != axis)]
    first = build.permuted_call(images, order)
    places = [order.index(at) for at in range(rank)]
    groups: list[tuple[int, ...]] = [(place,) for place in places]
    if times > 1:
        groups[axis:axis + 2] = [(places[axis], places[axis + 1])]
    return Front(first, tuple(groups))


def in_file(build: NetworkBuilder, value: Traced, groups: Groups) -> Traced:
    """Return a value of the shape (N, ...) as the file has it: with the axes of each group in one axis."""
    sequence = [place for group in groups for place in group]
    found = build.permuted_call(value, sequence)
    if any(len(group) != 1 for group in groups):
        found = build.call(torch.reshape, found, [_size(value, group) for group in groups])
    if groups[0][0] == 0:
        return found
    return replace(found, front=Front(value, tuple(map(tuple, groups))))


def permute(build: NetworkBuilder, images: Traced, order: Sequence[int]) -> Traced:
    """Return a value with its axes in another order."""
    first = front_of(build, images) if images.front or order[0] != 0 else None
    if first is None:
        return build.permuted_call(images, order)
    groups = [first.groups[axis] for axis in order]
    places = [0, *(place for group in groups for place in group if place)]
    value = build.permuted_call(first.value, places)
    moved = tuple(tuple(places.index(place) for place in group) for group in groups)
    if images.front is None and moved[0][0] != 0:
        return replace(build.permuted_call(images, order), front=Front(value, moved))
    return in_file(build, value, moved)


def reshape_to(build: NetworkBuilder, images: Traced, sizes: Sequence[int], axis: int, times: int, outside: int) -> Traced:
    """Return a value with other sizes; its images go to `axis`, whose size is N * times with `outside` outside of them.

    Args:
        build: the network.
        images: the value.
        sizes: all sizes; the one of `axis` does not matter.
        axis, times, outside: see `architectures/onnx_network/batch.py`.
    """
    if images.front is None and (images.batch() or (-1, 0))[0] == 0 and axis == 0 and outside == 1:
        return build.call(torch.reshape, images, [ImageCount(times), *sizes[1:]])
    first = front_of(build, images).value
    digits: list[int] = []
    groups: list[list[int]] = []
    for at, size in enumerate(sizes):
        parts = [size] if at != axis else [part for part in (outside,) if part > 1]
        group = [len(digits) + number + 1 for number in range(len(parts))]
        digits += parts
        if at == axis:
            group.append(0)
            if times // outside > 1:
                digits.append(times // outside)
                group.append(len(digits))
        groups.append(group)
    if list(first.shape[1:]) != digits:
        first = build.call(torch.reshape, first, [ImageCount(), *digits])
    return in_file(build, first, groups)


def outside_of_images(images: Traced) -> int:
    """Return the product of the sizes that lie outside of the images."""
    if images.front is None:
        return math.prod(images.shape[:(images.batch() or (0, 0))[0]])
    sequence = [place for group in images.front.groups for place in group]
    return math.prod(images.front.value.shape[place] for place in sequence[:sequence.index(0)])


def along_last(build: NetworkBuilder, images: Traced, layer: Callable[[Traced], Traced]) -> Traced:
    """Return the result of a layer that treats the last axis alone, computed with the images first."""
    first = images.front
    if first is None or len(first.groups[-1]) != 1 or first.groups[-1][0] != len(first.value.shape) - 1:
        return layer(images)
    return in_file(build, layer(first.value), first.groups)


def _size(value: Traced, group: Sequence[int]) -> int | ImageCount:
    product = math.prod(value.shape[place] for place in group if place)
    return ImageCount(product) if 0 in group else product
