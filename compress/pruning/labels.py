"""Which channels of a network go together: what the rows of the layer table write down, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from architectures.architecture import Architecture
from architectures.build import check_shapes
from architectures.layers.base import Layer, Shape
from architectures.layers.channels import Labels


@dataclass(frozen=True)
class Projection:
    """A tensor that a function of each number repeats along axes that have labels in the result.

    Args:
        part: the tensor's labels.
        whole: the result's, which have labels along several axes.
        repeated: the axes along which the tensor is repeated.
    """

    part: Labels
    whole: Labels
    repeated: tuple[int, ...]


class Labelling:
    """A `LabelBook`: labels, the pairs of them that go together, and projections that are decided later.

    Args:
        weights: the network's state dict.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self.count = 1  # the label 0 is never removed
        self.projections: list[Projection] = []
        self._pairs: list[tuple[Labels, Labels]] = []

    def weight(self, layer: Layer, key: str) -> NDArray[Any]:
        return self._weights[f"{layer.name}.{key}"].detach().cpu().numpy()

    def fresh(self, *shape: int) -> Labels:
        labels = np.arange(self.count, self.count + math.prod(shape)).reshape(shape)
        self.count += labels.size
        return labels

    def unite(self, first: Labels, second: Labels) -> None:
        first, second = np.broadcast_arrays(first, second)
        self._pairs.append((first.ravel(), second.ravel()))

    def fix(self, labels: Labels) -> None:
        self.unite(labels, np.zeros(1, np.int64))

    def constant(self, labels: Labels, axes: Sequence[int]) -> Labels:
        first = labels
        for axis in axes:
            first = first.take([0], axis)
        if first.size < labels.size:
            self.unite(labels, first)
        return first

    def reduced(self, labels: Labels, axes: Sequence[int]) -> Labels:
        first = labels
        for axis in axes:
            first = first.take([0], axis)
        return self.constant(labels, axes) if first.size > 1 else np.zeros_like(first)

    def elementwise(self, labels: Sequence[Labels], shapes: Sequence[Shape]) -> Labels:
        dimensions = max(map(len, shapes))
        shapes = [(*[1] * (dimensions - len(shape)), *shape) for shape in shapes]
        arrays = [array.reshape(*[1] * (dimensions - array.ndim), *array.shape) for array in labels]
        # An axis along which one tensor keeps everything keeps everything in all.
        kept = [axis for axis in range(dimensions) if any(
            shape[axis] > 1 and array.shape[axis] == 1 for shape, array in zip(shapes, arrays, strict=True))]
        arrays = [self.constant(array, kept) for array in arrays]
        whole = np.broadcast_shapes(*(array.shape for array in arrays))
        labelled = [axis for axis, size in enumerate(whole) if size > 1]
        full = [array for array in arrays if array.shape == whole]
        result = full[0] if full else self.fresh(*whole)
        for array in full[1:]:
            self.unite(array, result)
        for array in arrays:
            repeated = tuple(axis for axis in labelled if array.shape[axis] == 1)
            if 0 < len(repeated) < len(labelled):
                self.projections.append(Projection(array, result, repeated))
            elif repeated:  # one label for the whole tensor, which is repeated along all labelled axes
                self.fix(array)
        return result

    def reshaped(self, labels: Labels, before: Shape, after: Shape) -> Labels:
        expanded, sizes = [], []
        for old, new in _blocks(before, after):
            has_labels = any(labels.shape[axis] > 1 for axis in old)
            expanded += [before[axis] if has_labels else 1 for axis in old]
            sizes += [after[axis] if has_labels else 1 for axis in new]
        return _small(np.broadcast_to(labels, expanded).reshape(sizes))

    def joined(self, labels: Sequence[Labels], shapes: Sequence[Shape], axis: int) -> Labels:
        others = [at for at in range(len(shapes[0])) if at != axis]
        if any(array.shape[axis] == 1 < shape[axis] and max((array.shape[at] for at in others), default=1) > 1
               for array, shape in zip(labels, shapes, strict=True)):
            # One of them keeps everything along the axis, and has labels along another.
            return self.elementwise([self.constant(array, [axis]) for array in labels],
                                    [(*shape[:axis], 1, *shape[axis + 1:]) for shape in shapes])
        common = np.broadcast_shapes(*((*array.shape[:axis], 1, *array.shape[axis + 1:]) for array in labels))
        return _small(np.concatenate([
            np.broadcast_to(array, (*common[:axis], shape[axis], *common[axis + 1:]))
            for array, shape in zip(labels, shapes, strict=True)], axis))

    def alike(self, labels: Labels, axis: int, groups: int) -> None:
        if groups == 1 or labels.shape[axis] == 1:
            return
        rows = np.moveaxis(labels, axis, 0).reshape(groups, labels.shape[axis] // groups, -1)
        self.unite(rows, rows[:1])

    def units(self) -> Labels:
        """Return for every label the number of the unit that it belongs to; the unit 0 is never removed."""
        first = np.concatenate([np.zeros(1, np.int64), *(pair[0] for pair in self._pairs)])
        second = np.concatenate([np.zeros(1, np.int64), *(pair[1] for pair in self._pairs)])
        graph = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(self.count, self.count))
        _, found = connected_components(graph, directed=False)
        return np.where(found == found[0], 0, found + 1)


def _small(labels: Labels) -> Labels:
    """Return labels of length 1 along every axis along which they are equal."""
    for axis, size in enumerate(labels.shape):
        if size > 1 and (labels == (first := labels.take([0], axis))).all():
            labels = first
    return labels


def _blocks(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Return the smallest runs of axes of two shapes that hold the same numbers, in order."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(old), j + len(new)
        have, want = math.prod(before[axis] for axis in old), math.prod(after[axis] for axis in new)
        while have != want:
            if have < want:
                old.append(i)
                have *= before[i]
                i += 1
            else:
                new.append(j)
                want *= after[j]
                j += 1
        blocks.append((old, new))
    return blocks


@dataclass(frozen=True, kw_only=True)
class Units:
    """The units of a network: what is removed together or not at all.

    Args:
        of: by layer, and for "input", the unit of each number of its output for one image (1, ...); length 1 along an
            axis along which all are equal. The unit 0 is never removed.
        shapes: by layer, and for "input", the shape of the output for one image, (1, ...).
        count: how many there are, with the unit 0.
    """

    of: dict[str, Labels]
    shapes: dict[str, Shape]
    count: int


def find_units(architecture: Architecture, weights: Mapping[str, Tensor]) -> Units:
    """Return what can be removed from a network without leaving a tensor that is no rectangle.

    The input's channels and the network's outputs stay.

    Args:
        architecture: the network.
        weights: its state dict.
    """
    shapes: dict[str, Shape] = {"input": (1, *architecture.input_shape)}
    shapes |= {name: (1, *shape) for name, shape in check_shapes(architecture).items()}
    book = Labelling(weights)
    labels = {"input": np.zeros([1] * len(shapes["input"]), np.int64)}
    for layer in architecture.layers:
        labels[layer.name] = layer.labels(book, [labels[name] for name in layer.inputs],
                                          [shapes[name] for name in layer.inputs])
    book.fix(labels[architecture.layers[-1].name])
    tensors = list({id(array): array for array in labels.values()}.values())
    weighted = np.concatenate([[0], *(labels[layer.name].ravel() for layer in architecture.layers if layer.weighted)])
    while _unite_further(book, book.units(), tensors, weighted):
        pass
    units = book.units()
    used = np.unique(np.concatenate([[0], *(units[array].ravel() for array in tensors)]))
    units = np.searchsorted(used, units)
    return Units(of={name: _small(units[array]) for name, array in labels.items()}, shapes=shapes, count=len(used))


def _unite_further(book: Labelling, units: Labels, tensors: list[Labels], weighted: Labels) -> bool:
    """Unite what must go together besides, and return whether there was anything.

    A unit that is all of a tensor stays. A tensor whose labels differ along several axes keeps those of one: first where
    the channels of weighted layers are among them, for what is left (positions, masks) has to follow.

    Args:
        book: what goes together so far.
        units: the unit of each label.
        tensors: the labels of all tensors.
        weighted: the labels of the outputs of all weighted layers.
    """
    own = [(labels, _small(units[labels])) for labels in tensors]
    whole = [labels for labels, found in own if found.size == 1 and found.any()]
    for labels in whole:
        book.fix(labels)
    decided = [projection for projection in book.projections if len(_axes(units[projection.whole])) < 2]
    for projection in decided:
        book.projections.remove(projection)
        if set(_axes(units[projection.whole])) <= set(projection.repeated):
            book.fix(projection.part)
        else:
            book.unite(projection.part, projection.whole)
    if whole or decided:
        return True
    of_weights = np.zeros(units.max() + 1, bool)
    of_weights[units[weighted]] = True
    of_weights[0] = False
    open_still = [(labels, found) for labels, found in own if len(_axes(found)) > 1]
    first = [(labels, found) for labels, found in open_still if of_weights[found].any()]
    for labels, found in first or open_still:
        axis = _best_axis(found)
        book.constant(labels, [other for other in range(labels.ndim) if other != axis])
    return bool(open_still)


def _axes(units: Labels) -> list[int]:
    """Return the axes along which units differ."""
    return [axis for axis, size in enumerate(_small(units).shape) if size > 1]


def _best_axis(units: Labels) -> int:
    """Return the axis along which most units are left where all that lie at one place of it go together."""
    def left(axis: int) -> int:
        rows = np.moveaxis(units, axis, 0).reshape(units.shape[axis], -1)
        _, dense = np.unique(np.concatenate([[0], rows.ravel()]), return_inverse=True)
        count = int(dense.max()) + 1
        places = np.repeat(np.arange(len(rows)) + count, rows.shape[1])
        graph = coo_array((np.ones(len(places), np.int8), (dense[1:], places)), shape=(count + len(rows),) * 2)
        found = connected_components(graph, directed=False)[1]
        return len(set(found[count:]) - {found[0]})
    return max(range(units.ndim), key=left)
