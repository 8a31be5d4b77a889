"""A network without some of its units: the layers' options, and their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from architectures.architecture import Architecture
from architectures.layers.channels import Indices, Kept
from compress.pruning.labels import Units


def empty_tensors(units: Units, removed: NDArray[np.bool_]) -> list[str]:
    """Return the layers of whose output nothing would be left.

    Args:
        units: of the network.
        removed: for each unit, whether it goes.
    """
    return [name for name, own in units.of.items() if removed[own].all()]


def shrink(architecture: Architecture, weights: Mapping[str, Tensor], units: Units, removed: NDArray[np.bool_],
           ) -> tuple[Architecture, dict[str, Tensor]]:
    """Return the network without the removed units, and its state dict.

    Args:
        architecture: the network.
        weights: its state dict.
        units: its units.
        removed: for each unit, whether it goes.
    """
    kept = {name: kept_indices(own, units.shapes[name], removed) for name, own in units.of.items()}
    layers, state = [], dict(weights)
    of_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        name, _, own = key.rpartition(".")
        of_layer.setdefault(name, {})[own] = tensor.detach()
    for layer in architecture.layers:
        options: dict[str, Any] = {}
        if any(removed[units.of[name]].any() for name in (layer.name, *layer.inputs)):
            options, changed = layer.pruned(Kept([kept[name] for name in layer.inputs], kept[layer.name]),
                                            of_layer.get(layer.name, {}))
            state |= {f"{layer.name}.{key}": tensor.clone(memory_format=torch.contiguous_format)
                      for key, tensor in changed.items()}
        layers.append({**layer.model_dump(by_alias=True), **options, "pruning_info": None})
    smaller = architecture.to_json() | {"layers": layers}
    return Architecture.model_validate(smaller), state


def kept_indices(own: NDArray[np.int64], shape: tuple[int, ...], removed: NDArray[np.bool_]) -> list[Indices]:
    """Return for each axis of a tensor the indices that stay.

    Args:
        own: the unit of each number.
        shape: the tensor's, (1, ...).
        removed: for each unit, whether it goes.
    """
    stays = ~removed[own]
    indices = []
    for axis, size in enumerate(shape):
        others = tuple(other for other in range(own.ndim) if other != axis)
        indices.append(np.arange(size) if own.shape[axis] == 1 else np.flatnonzero(stays.any(axis=others)))
    return indices
