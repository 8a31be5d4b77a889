"""Sums of tables, one for each pair of groups: what a cost of sub-networks must be, so that a MILP can bound it.

A layer's cost depends on the channels of its input and of its output, and is nothing where the layer's block is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from architectures.counting import layer_costs
from architectures.layers.weighted import Convolution
from compress.search.sizes import Form
from compress.search.space import Choice, Space

Table = NDArray[np.float64]
Key = tuple[tuple[str, ...], frozenset[str]]  # groups in the space's order, two at most; blocks
EVEN = (16, 32)  # channels: kernels are slower with other numbers, some several times
PROBES = 8  # sub-networks whose files are made to learn what the layers' bytes are


@dataclass(frozen=True)
class Terms:
    """A sum over sub-networks.

    Args:
        tables: by groups and blocks: what is added for each option of the groups, (), (options,) or (options, options),
            unless one of the blocks is dropped.
        options: the groups' options, by name.
    """

    tables: Mapping[Key, Table]
    options: Mapping[str, tuple[int, ...]]

    def value(self, choice: Choice) -> float:
        """Return the sum for a sub-network."""
        place = {name: self.options[name].index(width) for name, width in choice.widths.items()}
        return sum(float(table[tuple(place[name] for name in groups)]) for (groups, blocks), table in self.tables.items()
                   if blocks.isdisjoint(choice.dropped))

    def largest(self) -> float:
        """Return the sum of the largest numbers of all tables."""
        return sum(float(table.max()) for table in self.tables.values())

    def scaled(self, factor: float) -> Terms:
        """Return the terms times a factor."""
        return Terms({key: factor * table for key, table in self.tables.items()}, self.options)


def total(terms: Iterable[Terms], options: Mapping[str, tuple[int, ...]]) -> Terms:
    """Return the sum of sums."""
    tables: dict[Key, Table] = {}
    for each in terms:
        for key, table in each.tables.items():
            tables[key] = tables[key] + table if key in tables else table
    return Terms(tables, options)


@dataclass(frozen=True)
class Channels:
    """How many channels one side of a layer has: some that stay, and a number for each channel of each group."""

    fixed: float
    of_groups: Mapping[str, float]

    def over(self, other: Channels, options: Mapping[str, tuple[int, ...]], blocks: frozenset[str]) -> Terms:
        """Return the product of two numbers of channels as terms."""
        parts: list[Terms] = []

        def add(groups: tuple[str, ...], factor: float) -> None:
            table = np.array(factor)
            for name in groups:
                table = np.multiply.outer(table, np.array(options[name], float))
            if len(groups) == 2 and groups[0] == groups[1]:
                groups, table = groups[:1], np.diagonal(table).copy()
            elif len(groups) == 2 and order.index(groups[0]) > order.index(groups[1]):
                groups, table = groups[::-1], table.T
            if factor:
                parts.append(Terms({(groups, blocks): table}, options))

        order = list(options)
        add((), self.fixed * other.fixed)
        for name, number in self.of_groups.items():
            add((name,), number * other.fixed)
            for second, times in other.of_groups.items():
                add((name, second), number * times)
        for name, number in other.of_groups.items():
            add((name,), number * self.fixed)
        return total(parts, options)


ONE = Channels(1.0, {})


@dataclass(frozen=True, kw_only=True)
class LayerTerms:
    """What the cost of a layer with weights may depend on. Each is 1, or 2 for the sum, in the whole network.

    Args:
        name: of the layer.
        kind: layers of one kind cost alike: the type, kernel and stride.
        there: 1 unless the layer is dropped.
        ends: the channels of input and output as shares of all; a depthwise layer's input is its output.
        product: the multiply-adds as a share of all.
        outputs: the channels of the output as a share of all.
        uneven: for each side and each of `EVEN`, 1 where its channels are no multiple.
        macs: of the whole network's layer.
        weights: of the whole network's layer, without its bias.
        width: output channels of the whole network's layer.
        values: numbers that the whole network's layer reads and writes.
        pixels: of the layer's output.
    """

    name: str
    kind: str
    there: Terms
    ends: Terms
    product: Terms
    outputs: Terms
    uneven: tuple[Terms, ...]
    macs: int
    weights: int
    width: int
    values: int
    pixels: int


def layer_terms(space: Space) -> list[LayerTerms]:
    """Return the terms of all layers with weights of the whole network."""
    options = space.options
    costs = layer_costs(space.architecture)
    found = []
    for layer in space.architecture.layers:
        if not layer.weighted or layer.channel_axis is None:
            continue
        blocks = frozenset(block.name for block in space.blocks if layer.name in block.layers)
        inputs, outputs = (_shares(space, name, layer.channel_axis) for name in (layer.inputs[0], layer.name))
        depthwise = isinstance(layer, Convolution) and layer.depthwise
        single = outputs.over(ONE, options, blocks)
        ends = single.scaled(2) if depthwise else total([single, inputs.over(ONE, options, blocks)], options)
        kernel = layer.options().get("kernel_size", (1, 1))
        size = math.prod(kernel) * math.prod(layer.options().get("stride", (1, 1)))
        shapes = [space.tensor_shape(name) for name in (layer.inputs[0], layer.name)]
        width = layer.width or 1
        found.append(LayerTerms(
            name=layer.name, kind=f"{layer.type} {'depthwise ' * depthwise}{size}",
            there=ONE.over(ONE, options, blocks), ends=ends,
            product=single if depthwise else inputs.over(outputs, options, blocks), outputs=single,
            uneven=tuple(_uneven(space, name, layer.channel_axis, multiple, blocks)
                         for name in ([layer.name] if depthwise else [layer.inputs[0], layer.name]) for multiple in EVEN),
            macs=costs[layer.name].macs, weights=costs[layer.name].macs * width // math.prod(shapes[1]), width=width,
            values=sum(map(math.prod, shapes)), pixels=math.prod(shapes[1]) // width))
    return found


def _uneven(space: Space, tensor: str, axis: int, multiple: int, blocks: frozenset[str]) -> Terms:
    """Return 1 where a tensor's channels are no multiple of a number; 0 where several groups share them."""
    size, counts = space.channels_of(tensor, axis)
    if not counts:
        return Terms({((), blocks): np.array(float(size % multiple > 0))}, space.options)
    (name, count), *others = counts.items()
    if others or count < size:
        return Terms({}, space.options)
    channels = np.array(space.options[name]) * count // space.options[name][-1]
    return Terms({((name,), blocks): (channels % multiple > 0).astype(float)}, space.options)


def _shares(space: Space, tensor: str, axis: int) -> Channels:
    """Return the channels of a tensor along an axis as shares of all of them."""
    size, counts = space.channels_of(tensor, axis)
    channels = {group.name: group.channels for group in space.groups}
    return Channels(1 - sum(counts.values()) / size, {
        name: count / size / channels[name] for name, count in counts.items()})


def size_terms(space: Space, form: Form) -> Terms:
    """Return the bytes of a weights file, to some ten bytes: the file's exact bytes depend on how it is compressed.

    How many bytes a layer, an output channel and a weight take is learned from the exact files of some sub-networks.
    """
    layers = layer_terms(space)
    options = space.options
    features = [ONE.over(ONE, options, frozenset()), total((layer.there for layer in layers), options),
                total((layer.outputs.scaled(layer.width) for layer in layers), options),
                total((layer.product.scaled(layer.weights) for layer in layers), options)]
    rng = np.random.default_rng(0)
    probes = [space.full(), space.smallest(True), *(space.random(rng, drop=True) for _ in range(PROBES - 2))]
    exact = np.array([space.size_bytes(choice, form) for choice in probes], float)
    rows = np.array([[feature.value(choice) for feature in features] for choice in probes])
    found = np.linalg.lstsq(rows, exact, rcond=None)[0]
    return total((feature.scaled(float(each)) for feature, each in zip(features, found, strict=True)), options)

