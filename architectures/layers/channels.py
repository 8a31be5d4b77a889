"""What a row of the layer table says to pruning, and with what: labels of a tensor's channels, and the channels kept.

Every tensor of a network has an array of labels, one label for each of its numbers. Numbers of equal labels, in whatever
tensors, are removed together or not at all; the label 0 is never removed. The array is small: it has the tensor's number
of dimensions, and length 1 along every axis along which all labels are equal. Shapes here are those of one image, (1, ...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Sizes: TypeAlias = tuple[int, ...]
Labels: TypeAlias = NDArray[np.int64]
Indices: TypeAlias = NDArray[np.int64]


class LabelBook(Protocol):
    """What a row writes down with which labels go together."""

    def weight(self, layer: Any, key: str) -> NDArray[Any]:
        """Return a weight of a layer, for those whose weights say where numbers go."""

    def fresh(self, *shape: int) -> Labels:
        """Return labels that no other tensor has."""

    def unite(self, first: Labels, second: Labels) -> None:
        """State that the labels at equal places of two arrays, broadcast against each other, go together."""

    def fix(self, labels: Labels) -> None:
        """State that nothing with these labels may be removed."""

    def constant(self, labels: Labels, axes: Sequence[int]) -> Labels:
        """Unite all labels along some axes. Return the labels, of length 1 there."""

    def reduced(self, labels: Labels, axes: Sequence[int]) -> Labels:
        """Return the labels of a sum or a mean over some axes, of length 1 there.

        Where other axes have labels, too, those along the summed axes go together. Else each may go by itself, and
        nothing of the result does.
        """

    def elementwise(self, labels: Sequence[Labels], shapes: Sequence[Sizes]) -> Labels:
        """Return the labels of a function of each number for itself, of tensors that are broadcast against each other."""

    def reshaped(self, labels: Labels, before: Sizes, after: Sizes) -> Labels:
        """Return the labels of a tensor whose shape changes, with its numbers in the same order."""

    def joined(self, labels: Sequence[Labels], shapes: Sequence[Sizes], axis: int) -> Labels:
        """Return the labels of tensors that are joined along an axis."""

    def alike(self, labels: Labels, axis: int, groups: int) -> None:
        """Unite the labels at equal places of consecutive groups of equal size along an axis."""


@dataclass(frozen=True)
class Kept:
    """What pruning leaves of a layer's tensors.

    Args:
        inputs: for each input and each of its axes, the indices that stay, ascending. The first axis is the batch's.
        output: the same for the output.
    """

    inputs: list[list[Indices]]
    output: list[Indices]


class Labelled:
    """The part of a row that pruning asks."""

    def output_shape(self, inputs: list[Sizes]) -> Sizes:
        """Return the shape of the output for inputs of these shapes."""
        raise NotImplementedError

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Sizes]) -> Labels:
        """Return the labels of the output's channels, and write down which labels of the inputs go together.

        The default lets nothing be removed from what the layer takes and gives.

        Args:
            book: what goes together.
            inputs: the labels of the inputs.
            shapes: the inputs' shapes for one image, (1, ...).
        """
        for labels in inputs:
            book.fix(labels)
        return np.zeros([1] * len(self.output_shape(shapes)), np.int64)

    def pruned(self, kept: Kept, weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the options that change where only some channels stay, and the weights that do.

        Args:
            kept: the indices that stay, of each axis of the inputs and of the output.
            weights: the layer's tensors by their names in its module; arrays of NumPy index them.
        """
        return {}, {}
