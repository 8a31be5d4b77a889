"""Structured pruning: remove whole channels, in groups of coupled layers.

The dependency graph and the importance of a group's channels are torch-pruning's. Which channels go is decided here,
because torch-pruning only rounds down: at a ratio of 0.3 and a multiple of 8 it would leave 16 of 32 channels, not 24.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from compress.pruning.groups import ChannelGroup, channel_groups, widths
from metadata.errors import UserError


class NothingRemovedError(UserError):
    """Every width rounds back to itself."""


def prune(model: fx.GraphModule, example: Tensor, *, ratio: float, multiple: int, criterion: str, scope: str,
          original: dict[str, int] | None = None, gradients: Callable[[nn.Module], None] | None = None) -> fx.GraphModule:
    """Return a copy of the model with channels removed; the output layer keeps its width.

    Args:
        model: as `architectures.build.build` makes them; the model stays as it is.
        example: (1, C, H, W) input for tracing.
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
    pruned = copy.deepcopy(model).eval().to(memory_format=torch.contiguous_format)  # channels last may be unsafe
    for parameter in pruned.parameters():
        parameter.requires_grad_(True)
    if gradients is not None:
        gradients(pruned)
    before = widths(pruned)
    original = original or before
    graph, groups = channel_groups(pruned, example, criterion)
    if scope == "uniform":
        keep = [original[group.name] * (1 - ratio) for group in groups]
    else:
        keep = [max(float(multiple), target) for target in _global(groups, ratio, original)]
    for group, target in zip(groups, keep, strict=True):
        kept = min(len(group.scores), _nearest_multiple(target / group.divisions, multiple, group.divisions))
        if kept < 1:
            raise UserError(f"layer {group.name}: a ratio of {ratio} leaves none of its "
                            f"{len(group.scores) * group.divisions} channels (rounded to multiples of {multiple}); lower "
                            "prune.ratio or prune.multiple")
        least = group.scores.argsort()[:len(group.scores) - kept]
        indices = [int(i) + division * len(group.scores) for division in range(group.divisions) for i in least]
        if indices:
            graph.get_pruning_group(group.layer, group.function, sorted(indices)).prune()
    if widths(pruned) == before:
        raise NothingRemovedError(f"pruning removed nothing: at a ratio of {ratio} every width rounds back to itself in "
                                  f"multiples of {multiple} (widths {sorted(set(before.values()))}); raise prune.ratio or "
                                  "lower prune.multiple")
    pruned.zero_grad(set_to_none=True)
    return pruned


def _nearest_multiple(value: float, multiple: int, divisions: int) -> int:
    """Return the number of channels a division, nearest to `value`, whose product with `divisions` is a multiple."""
    step = multiple // math.gcd(multiple, divisions)
    return int(value / step + 0.5) * step


def _global(groups: list[ChannelGroup], ratio: float, original: dict[str, int]) -> list[float]:
    """Return the number of channels to keep in each group, where the whole network's channels are ranked together.

    A channel's rank is its importance relative to the mean of its own group.
    """
    relative = [group.scores / group.scores.mean().clamp(min=1e-12) for group in groups]
    everything = torch.cat(relative)
    total = sum(original[group.name] // group.divisions for group in groups)
    keep = max(1, round(total * (1 - ratio)))
    if keep >= len(everything):
        return [float(len(group.scores) * group.divisions) for group in groups]
    kept = torch.zeros(len(everything))
    kept[everything.topk(keep).indices] = 1  # exactly `keep` of them, whatever the ties
    return [float(part.sum()) * group.divisions
            for part, group in zip(kept.split([len(scores) for scores in relative]), groups, strict=True)]
