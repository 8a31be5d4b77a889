"""Residual blocks that may be dropped: what a sum adds to its input is left out, and the block is the identity."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from architectures.architecture import Architecture
from architectures.build import check_shapes
from architectures.layers.activations import ReLU
from architectures.layers.base import Layer
from architectures.layers.tensors import Add


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A residual block whose body may be removed because its shortcut is the identity.

    Args:
        name: what the names of its layers begin with, or the sum's name where they have nothing in common.
        layers: the layers that go, the sum among them.
        add: the sum.
        source: the layer, or "input", that is the block's input; readers of the sum read it when the block is dropped.
    """

    name: str
    layers: tuple[str, ...]
    add: str
    source: str


def find_blocks(architecture: Architecture) -> tuple[Block, ...]:
    """Return the residual blocks that may be dropped, in the order of their sums."""
    layers = {layer.name: layer for layer in architecture.layers}
    shapes = {"input": architecture.input_shape, **check_shapes(architecture)}
    readers: dict[str, list[str]] = {}
    for layer in architecture.layers:
        for source in layer.inputs:
            readers.setdefault(source, []).append(layer.name)
    found: dict[str, Block] = {}
    for layer in architecture.layers[:-1]:
        if not isinstance(layer, Add) or len(layer.inputs) != 2:
            continue
        for shortcut, end in (layer.inputs, layer.inputs[::-1]):
            source = _beyond_identities(shortcut, layers)
            body = _body(source, end, layers)
            if not body or shapes[source] != shapes[layer.name] or shapes[end] != shapes[layer.name]:
                continue
            if all(reader in body or reader == layer.name for name in body for reader in readers[name]):
                ordered = [name for name in layers if name in body]
                name = _common_name(ordered)
                block = Block(name=name if name and name not in found else layer.name, layers=(*ordered, layer.name),
                              add=layer.name, source=source)
                found[block.name] = block
                break
    return tuple(found.values())


def _beyond_identities(name: str, layers: Mapping[str, Layer]) -> str:
    """Return the tensor that a chain of layers without effect hands on."""
    while name in layers and layers[name].identity:
        name = layers[name].inputs[0]
    return name


def _body(source: str, end: str, layers: Mapping[str, Layer]) -> set[str]:
    """Return the layers between a tensor and a later one, or nothing where the later one depends on others besides."""
    body: set[str] = set()
    waiting = [end]
    while waiting:
        name = waiting.pop()
        if name == source or name in body:
            continue
        if name not in layers or not layers[name].inputs:
            return set()
        body.add(name)
        waiting += layers[name].inputs
    return body


def _common_name(names: Sequence[str]) -> str:
    """Return what dotted names begin with: "layer1.0" for "layer1.0.conv1" and "layer1.0.bn1"."""
    common = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def without_blocks(architecture: Architecture, weights: Mapping[str, Tensor], blocks: Sequence[Block],
                   ) -> tuple[Architecture, dict[str, Tensor]]:
    """Return the network with some blocks dropped, and its state dict. A ReLU that then has no effect goes, too.

    Args:
        architecture: the network.
        weights: its state dict.
        blocks: of `find_blocks`, of this network or of one with more channels.
    """
    if not blocks:
        return architecture, dict(weights)
    gone = {name for block in blocks for name in block.layers}
    stands_for = {block.add: block.source for block in blocks}

    def resolved(name: str) -> str:
        while name in stands_for:
            name = stands_for[name]
        return name

    layers: list[Layer] = []
    nonnegative: dict[str, bool] = {}
    for layer in architecture.layers:
        inputs = [resolved(name) for name in layer.inputs]
        if layer.name in gone:
            continue
        if isinstance(layer, ReLU) and inputs != list(layer.inputs) and nonnegative.get(inputs[0], False):
            stands_for[layer.name] = inputs[0]
        else:
            nonnegative[layer.name] = layer.nonnegative or (layer.keeps_sign and all(
                nonnegative.get(name, False) for name in inputs))
            layers.append(layer.model_copy(update={"inputs": inputs}))
    layers = _read(layers)
    rows = [layer.model_dump(by_alias=True) for layer in layers]
    smaller = Architecture.model_validate(architecture.to_json() | {"layers": rows})
    kept = {layer.name for layer in layers}
    return smaller, {key: tensor for key, tensor in weights.items() if key.rpartition(".")[0] in kept}


def _read(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers that the last one depends on: an identity on a shortcut may have lost its reader."""
    needed = {layers[-1].name}
    for layer in reversed(layers):
        if layer.name in needed:
            needed.update(layer.inputs)
    return [layer for layer in layers if layer.name in needed]
