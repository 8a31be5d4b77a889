"""Structured pruning: remove whole channels, in units of all that is coupled.

What is coupled follows from the network's own layers (`labels.py`), how important a unit is from torch-pruning
(`groups.py`). Which units go is decided here, and the network without them is made from its layers (`shrink.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from architectures.build import build
from architectures.describe import describe
from compress.pruning.groups import ChannelGroup, channel_groups, widths
from compress.pruning.labels import Units, find_units
from compress.pruning.shrink import empty_tensors, shrink
from metadata.errors import UserError


class NothingRemovedError(UserError):
    """Every width rounds back to itself."""


def prune(model: fx.GraphModule, example: Tensor, *, ratio: float, multiple: int, criterion: str, scope: str,
          original: dict[str, int] | None = None, gradients: Callable[[nn.Module], None] | None = None) -> fx.GraphModule:
    """Return a copy of the model with channels removed; the output layer keeps its width.

    Args:
        model: as `architectures.build.build` makes them; the model stays as it is.
        example: (1, C, H, W) input, for its shape.
        ratio: share of channels to remove, in (0, 1), of the `original` widths.
        multiple: round the number of channels that remain in a layer to the nearest multiple; odd widths are slow.
        criterion: a key of `compress.pruning.importance.CRITERIA`.
        scope: "uniform" takes the same share of every group, "global" ranks all channels of the network together.
        original: widths before any pruning, where this is a later step of several; the model's own unless given.
        gradients: fills the copy's gradients, for criteria that need them.

    Raises:
        NothingRemovedError: every width rounds back to itself.
        UserError: a layer would be left without channels.
    """
    whole = copy.deepcopy(model).eval().to(memory_format=torch.contiguous_format)  # channels last may be unsafe
    for parameter in whole.parameters():
        parameter.requires_grad_(True)
    if gradients is not None:
        gradients(whole)
    before = widths(whole)
    architecture = describe(whole, (example.shape[1], example.shape[2], example.shape[3]))
    units = find_units(architecture, whole.state_dict())
    groups = channel_groups(whole, architecture, units, criterion)
    if not groups:
        raise NothingRemovedError("pruning removed nothing: every channel is tied to the network's input or output")
    targets = _targets(groups, ratio, multiple, scope, before, original or before)
    removed = np.zeros(units.count, bool)
    for group, target in zip(groups, targets, strict=True):
        kept = _kept_units(group, target, multiple)
        if kept < 1:
            raise UserError(f"layer {group.name}: a ratio of {ratio} leaves none of its {group.channels.sum()} channels "
                            f"(rounded to multiples of {multiple}); lower prune.ratio or prune.multiple")
        removed[group.units[group.scores.argsort()[:len(group.units) - kept]]] = True
    restore(units, groups, removed)
    if not removed.any():
        raise NothingRemovedError(f"pruning removed nothing: at a ratio of {ratio} every width rounds back to itself in "
                                  f"multiples of {multiple} (widths {sorted(set(before.values()))}); raise prune.ratio or "
                                  "lower prune.multiple")
    smaller, weights = shrink(architecture, whole.state_dict(), units, removed)
    pruned = build(smaller)
    pruned.load_state_dict(weights)
    return pruned.to(next(whole.parameters()).device).eval()


def _targets(groups: list[ChannelGroup], ratio: float, multiple: int, scope: str, widths_now: dict[str, int],
             original: dict[str, int]) -> list[float]:
    """Return how many channels each group should keep, before rounding."""
    # Channels of a layer that are another group's, or stay, do not count.
    share = [original[group.name] * group.channels.sum() / widths_now[group.name] for group in groups]
    if scope == "uniform":
        return [width * (1 - ratio) for width in share]
    return [max(float(multiple), target) for target in _global(groups, ratio, share)]


def _kept_units(group: ChannelGroup, target: float, multiple: int) -> int:
    """Return how many units of a group stay so that the channels are nearest to `target` and a multiple.

    Heads are seldom multiples: where units have several channels each, one stays at least. A layer narrower than two
    multiples keeps one of them, or all of its channels.
    """
    count, largest, total = len(group.units), int(group.channels.max()), int(group.channels.sum())
    if (group.channels == largest).all():
        step = multiple // math.gcd(multiple, largest)
        kept = min(count, int(target / largest / step + 0.5) * step)
    else:
        goal = int(target / multiple + 0.5) * multiple
        kept = int(np.abs(group.channels[group.scores.argsort(descending=True)].cumsum() - goal).argmin()) + 1
    if total < 2 * multiple:
        kept = max(kept, min(count, multiple // largest))
    return max(kept, 1) if largest > 1 else kept


def _global(groups: list[ChannelGroup], ratio: float, original: list[float]) -> list[float]:
    """Return the number of channels to keep in each group, where the whole network's units are ranked together.

    A unit's rank is its importance relative to the mean of its own group.
    """
    relative = [group.scores / group.scores.mean().clamp(min=1e-12) for group in groups]
    everything = torch.cat(relative)
    total = sum(round(width / group.channels.mean()) for width, group in zip(original, groups, strict=True))
    keep = max(1, round(total * (1 - ratio)))
    if keep >= len(everything):
        return [float(group.channels.sum()) for group in groups]
    kept = torch.zeros(len(everything))
    kept[everything.topk(keep).indices] = 1  # exactly `keep` of them, whatever the ties
    return [float(part.sum() * group.channels.mean())
            for part, group in zip(kept.split([len(scores) for scores in relative]), groups, strict=True)]


def restore(units: Units, groups: list[ChannelGroup], removed: NDArray[np.bool_]) -> None:
    """Put back the most important unit of every tensor of which nothing would be left, such as a slice of few channels."""
    scores = np.zeros(units.count)
    for group in groups:
        scores[group.units] = group.scores.numpy()
    while names := empty_tensors(units, removed):
        own = np.unique(units.of[names[0]])
        removed[own[scores[own].argmax()]] = False
