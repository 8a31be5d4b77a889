"""The sub-networks that a search chooses among: how many channels each group keeps, and which residual blocks go."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx

from architectures.architecture import Architecture
from architectures.build import build
from architectures.counting import architecture_macs
from compress.pruning.groups import ChannelGroup, channel_groups
from compress.pruning.labels import Units, find_units
from compress.pruning.prune import restore
from compress.pruning.shrink import shrink
from compress.search.blocks import Block as Block
from compress.search.blocks import find_blocks, without_blocks
from compress.search.sizes import Form, weights_file_bytes
from metadata.errors import UserError

MULTIPLE = 8  # channels: kernels compute eight or more at once
MOST_OPTIONS = 16  # of a group; a wider one is searched in larger steps
DROPPED = 0.25  # the probability that a random sub-network lacks a block
SPREAD = 0.35  # of the widths of half of the random sub-networks about a common level, a fraction of all options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Channels of layers that are coupled, among which pruning chooses.

    Args:
        name: the layer that names it, as in `compress.pruning.groups.ChannelGroup`.
        channels: how many there are.
        options: how many may stay, ascending; all of them come last.
    """

    name: str
    channels: int
    options: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One sub-network.

    Args:
        widths: the channels that stay, by group. Groups inside a dropped block count for nothing.
        dropped: the blocks that go.
    """

    widths: Mapping[str, int]
    dropped: frozenset[str] = frozenset()

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.widths.items())), self.dropped))

    def to_json(self) -> dict[str, Any]:
        """Return the object that is written to disk."""
        return {"widths": dict(self.widths), "dropped": sorted(self.dropped)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Choice:
        """Return the choice that `to_json` wrote."""
        return cls(widths=dict(content["widths"]), dropped=frozenset(content["dropped"]))


class Space:
    """The sub-networks of a network; `of` makes it.

    Args:
        architecture: the network.
        weights: its state dict, on the CPU.
        units: what is removed together or not at all.
        channel_groups: the groups of these units.
        multiple: of channels that stay.

    Attributes:
        groups: in the order of the layers.
        blocks: in the order of the layers.
    """

    def __init__(self, architecture: Architecture, weights: Mapping[str, Tensor], units: Units,
                 channel_groups: Sequence[ChannelGroup], multiple: int) -> None:
        self.architecture = architecture
        self.blocks = find_blocks(architecture)
        self.groups = tuple(Group(name=group.name, channels=int(group.channels.sum()), options=_options(group, multiple))
                            for group in channel_groups)
        self._weights, self._units, self._channel_groups = weights, units, channel_groups
        self._sizes: dict[tuple[Choice, Form], int] = {}

    @classmethod
    def of(cls, architecture: Architecture, weights: Mapping[str, Tensor], multiple: int = MULTIPLE) -> Space:
        """Return the sub-networks of a network.

        Args:
            architecture: the network.
            weights: its state dict.
            multiple: of channels that stay; a group of units of several channels takes the least common multiple.

        Raises:
            UserError: there is nothing to choose.
        """
        weights = {name: tensor.detach().cpu() for name, tensor in weights.items()}
        units = find_units(architecture, weights)
        model = build(architecture)
        model.load_state_dict(weights)
        space = cls(architecture, weights, units, channel_groups(model, architecture, units, "l2"), multiple)
        if not space.blocks and all(len(group.options) == 1 for group in space.groups):
            raise UserError(f"search: {architecture.model_type} has no group of over {multiple} channels that may be "
                            "removed, and no residual block that may be dropped; there is nothing to choose")
        return space

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all shapes that the space holds."""
        content = [self.architecture.to_json()["layers"], self.architecture.input_shape,
                   [dataclasses.astuple(group) for group in self.groups]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    @functools.cached_property
    def options(self) -> dict[str, tuple[int, ...]]:
        """How many channels may stay, by group."""
        return {group.name: group.options for group in self.groups}

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a layer's output, or of "input", for one image, (1, ...), in the whole network."""
        return self._units.shapes[name]

    def channels_of(self, name: str, axis: int) -> tuple[int, dict[str, int]]:
        """Return the size of a tensor of the whole network along an axis, and how much of it each group has.

        Args:
            name: a layer, for its output, or "input".
            axis: of the tensor for one image, (1, ...).
        """
        size = self.tensor_shape(name)[axis]
        labels = np.moveaxis(self._units.of[name], axis, 0)
        units = np.broadcast_to(labels.reshape(len(labels), -1)[:, 0], size)
        counts = {group.name: int(np.isin(units, group.units).sum()) for group in self._channel_groups}
        return size, {name: count for name, count in counts.items() if count}

    # ------------------------------------------------------------------------------------------------------- choices

    def full(self) -> Choice:
        """Return the whole network."""
        return Choice(widths={group.name: group.channels for group in self.groups})

    def smallest(self, drop: bool) -> Choice:
        """Return the sub-network with the fewest channels everywhere, with `drop` without any block that may go."""
        return self.normal(Choice(widths={group.name: group.options[0] for group in self.groups},
                                  dropped=frozenset(block.name for block in self.blocks) if drop else frozenset()))

    def random(self, rng: np.random.Generator, drop: bool) -> Choice:
        """Return a random sub-network: half of them of widths that have nothing in common, half near a common level.

        Args:
            rng: the source of randomness.
            drop: let blocks go, too.
        """
        places = rng.random(len(self.groups))
        if rng.random() < 0.5:
            places = (rng.random() + SPREAD * (2 * places - 1)).clip(0, 1 - 1e-9)
        widths = {group.name: group.options[int(place * len(group.options))]
                  for group, place in zip(self.groups, places, strict=True)}
        gone = rng.random(len(self.blocks)) < DROPPED * drop
        return self.normal(Choice(widths=widths, dropped=frozenset(
            block.name for block, goes in zip(self.blocks, gone, strict=True) if goes)))

    def normal(self, choice: Choice) -> Choice:
        """Return the same sub-network with all channels in the groups that it lacks."""
        lacking = self.lacking(choice.dropped)
        return Choice(dropped=choice.dropped, widths={
            group.name: group.channels if group.name in lacking else choice.widths[group.name] for group in self.groups})

    def lacking(self, dropped: frozenset[str]) -> set[str]:
        """Return the groups of which nothing is left without some blocks."""
        gone = {layer for block in self.blocks if block.name in dropped for layer in block.layers}
        left: set[int] = set()
        for name, labels in self._units.of.items():
            if name not in gone:
                left.update(np.unique(labels).tolist())
        return {group.name for group in self._channel_groups if left.isdisjoint(group.units.tolist())}

    def check(self, choice: Choice) -> None:
        """Check that a choice is one of this space.

        Raises:
            UserError: a group, a width or a block is none of it.
        """
        blocks = {block.name for block in self.blocks}
        if set(choice.widths) != {group.name for group in self.groups} or not choice.dropped <= blocks:
            raise UserError("search: the choice names other groups or blocks than the network has")
        for group in self.groups:
            if choice.widths[group.name] not in group.options:
                raise UserError(f"search: {group.name} keeps {', '.join(map(str, group.options))} channels, not "
                                f"{choice.widths[group.name]}")

    # -------------------------------------------------------------------------------------------------- sub-networks

    def shape(self, choice: Choice) -> Architecture:
        """Return the architecture of a sub-network."""
        return self._shrunk(choice, {})[0]

    def network(self, choice: Choice, scores: Mapping[str, Tensor]) -> fx.GraphModule:
        """Return a sub-network with the weights of the channels that score highest in each group.

        Args:
            choice: the sub-network.
            scores: (units,) by group, as in `compress.pruning.groups.ChannelGroup`; the weights' norms for groups that
                it leaves out.
        """
        architecture, weights = self._shrunk(choice, scores)
        model = build(architecture)
        model.load_state_dict(weights)
        return model.eval()

    def macs(self, choice: Choice) -> int:
        """Return the multiply-adds of a sub-network for one image."""
        return architecture_macs(self.shape(choice))

    def size_bytes(self, choice: Choice, form: Form) -> int:
        """Return the bytes of the weights file that a package of the sub-network would have, see `weights_file_bytes`."""
        key = self.normal(choice), form
        if key not in self._sizes:
            self._sizes[key] = weights_file_bytes(self.shape(choice), form)
        return self._sizes[key]

    def _shrunk(self, choice: Choice, scores: Mapping[str, Tensor]) -> tuple[Architecture, dict[str, Tensor]]:
        self.check(choice)
        groups = [group if group.name not in scores else dataclasses.replace(group, scores=scores[group.name])
                  for group in self._channel_groups]
        removed = np.zeros(self._units.count, bool)
        for group in groups:
            excess = int(group.channels.sum()) - choice.widths[group.name]
            removed[group.units[group.scores.argsort(stable=True)[:excess // group.channels[0]]]] = True
        restore(self._units, groups, removed)
        architecture, left = shrink(self.architecture, self._weights, self._units, removed)
        return without_blocks(architecture, left, [block for block in self.blocks if block.name in choice.dropped])


def _options(group: ChannelGroup, multiple: int) -> tuple[int, ...]:
    """Return how many channels of a group may stay. A group of units of several sizes keeps all."""
    size, count, total = int(group.channels[0]), len(group.units), int(group.channels.sum())
    if (group.channels != size).any():
        return (total,)
    step = multiple // math.gcd(multiple, size)
    coarse = step * -(-count // (step * MOST_OPTIONS))
    return tuple(size * units for units in (*range(coarse, count, coarse), count))
