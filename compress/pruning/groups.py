"""Groups of units among which pruning chooses, and how important each unit is: torch-pruning's importance."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from architectures.architecture import Architecture
from architectures.layers.channels import Labels
from architectures.layers.weighted import Convolution
from compress.pruning.importance import CRITERIA
from compress.pruning.labels import Units
from compress.pruning.library import tp
from metadata.errors import UserError, first_line

COUNTED = (nn.Conv2d, nn.Linear)  # the layers whose output channels are counted


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """The units of a layer's output channels that no earlier layer has.

    Args:
        name: the layer.
        units: (units,) their numbers.
        channels: (units,) how many of the layer's channels each has: one, or all of a head, or one of each group of a
            grouped convolution.
        scores: (units,) importance; the least important unit has the lowest score.
    """

    name: str
    units: Labels
    channels: Labels
    scores: Tensor


@dataclass(frozen=True)
class Coupling:
    """The channels of one side of a layer with weights.

    Args:
        module: the layer's module.
        function: torch-pruning's function that removes them; the importance tells by it what weights they have.
        units: (channels,) the unit of each channel.
    """

    module: nn.Module
    function: Any
    units: Labels


def widths(model: nn.Module) -> dict[str, int]:
    """Return the number of output channels of every convolution and linear layer, by name."""
    return {name: module.weight.shape[0] for name, module in model.named_modules() if isinstance(module, COUNTED)}


def channel_groups(model: fx.GraphModule, architecture: Architecture, units: Units, criterion: str) -> list[ChannelGroup]:
    """Return the groups of a network's units with their importance, in the order of its layers.

    Args:
        model: the network.
        architecture: the network as layers.
        units: the network's.
        criterion: a key of `CRITERIA`.

    Raises:
        UserError: the criterion cannot score a group.
    """
    importance = CRITERIA[criterion]()
    couplings, outputs = _couplings(model, architecture, units)
    by_unit: dict[int, list[int]] = {}
    for index, coupling in enumerate(couplings):
        for unit in np.unique(coupling.units):
            by_unit.setdefault(int(unit), []).append(index)
    groups: list[ChannelGroup] = []
    found = np.zeros(units.count, bool)
    found[0] = True
    for first in outputs:
        channels = couplings[first].units
        while (unfound := np.flatnonzero(~found[channels])).size:
            # A head is many channels of most layers, but one of a layer that gives each head a number.
            own = np.unique(channels[unfound])
            root = max({index for unit in own for index in by_unit[int(unit)] if index in outputs},
                       key=lambda index: (np.isin(couplings[index].units, own).sum(), -index))
            counts = np.bincount(couplings[root].units, minlength=units.count)
            own = own[counts[own] > 0]
            found[own] = True
            members = sorted({index for unit in own for index in by_unit[int(unit)]} - {root})
            group = _importance_group([couplings[index] for index in (root, *members)], own, units.count)
            scores = _scores(importance, group, outputs[root], criterion)[:len(own)] / torch.from_numpy(counts[own])
            groups.append(ChannelGroup(name=outputs[root], units=own, channels=counts[own], scores=scores))
    return groups


def _couplings(model: fx.GraphModule, architecture: Architecture, units: Units) -> tuple[list[Coupling], dict[int, str]]:
    """Return all couplings, and by place among them the weighted layers whose outputs they are."""
    couplings: list[Coupling] = []
    outputs: dict[int, str] = {}
    for layer in architecture.layers:
        if layer.channel_axis is None:
            continue
        module = model.get_submodule(layer.name)
        functions = tp.pruner.function.PrunerBox.get(tp.ops.module2type(module))
        if functions is None:
            continue
        sides = [(layer.name, functions.prune_out_channels)]
        own_inputs = not (isinstance(layer, Convolution) and layer.depthwise)  # else the inputs' channels are the outputs'
        if own_inputs and functions.prune_in_channels != functions.prune_out_channels:
            sides.append((layer.inputs[0], functions.prune_in_channels))
        for name, function in sides:
            own = units.of[name]
            if own.shape[layer.channel_axis] > 1:
                if layer.weighted and name == layer.name:
                    outputs[len(couplings)] = name
                couplings.append(Coupling(module, function, own.ravel()))
    return couplings, outputs


def _importance_group(couplings: list[Coupling], own: Labels, count: int) -> list[Any]:
    """Return what torch-pruning's importance takes for a group: channels of layers, and the place of each one's unit."""
    place = np.full(count, -1)
    place[own] = np.arange(len(own))
    group = []
    for coupling in couplings:
        places = place[coupling.units]
        channels = np.flatnonzero(places >= 0)
        dependency = SimpleNamespace(layer=coupling.module, target=SimpleNamespace(module=coupling.module),
                                     pruning_fn=coupling.function, handler=coupling.function)
        item = tp._helpers.GroupItem(dep=dependency, idxs=channels.tolist())
        item.root_idxs = places[channels].tolist()
        group.append(item)
    return group


def _scores(importance: Any, group: list[Any], name: str, criterion: str) -> Tensor:
    """Return the importance of each unit of a group.

    Raises:
        UserError: the criterion cannot score the group.
    """
    if criterion == "fpgm":  # torch-pruning's fails on the inputs of grouped convolutions; their outputs are scored
        group = [item for item in group if item.dep.pruning_fn != tp.prune_conv_in_channels or item.dep.layer.groups == 1]
    try:
        scores = importance(group)
    except (RuntimeError, IndexError) as error:  # of torch-pruning's own
        raise UserError(f"layer {name}: prune.criterion {criterion} cannot score its group of layers "
                        f"({first_line(error)}); choose another") from error
    if scores is None:
        raise UserError(f"layer {name}: prune.criterion {criterion} has no score for its group of layers; choose another")
    return scores.detach().cpu()  # type: ignore[no-any-return]
