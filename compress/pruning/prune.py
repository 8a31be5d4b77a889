"""Structured pruning: whole channels go, over torch-pruning's dependency graph, in groups that belong together.

The graph and the importance of a group's channels are torch-pruning's. Which channels go is decided here, because its
own rounding only ever rounds down: at a ratio of 0.3 and a multiple of 8 it would leave 16 of 32 channels, not 24.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, fx, nn

from metadata.errors import UserError, first_line

# name -> importance of a group's channels. Sources: L1/L2 Li et al. 2017; BN scale Liu et al. 2017 (network slimming);
# FPGM He et al. 2019; Taylor Molchanov et al. 2019, first order.
CRITERIA: dict[str, Callable[[], Any]] = {
    "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "bn_scale": lambda: tp.importance.BNScaleImportance(),
    "fpgm": lambda: tp.importance.FPGMImportance(p=2),
    "taylor": lambda: tp.importance.GroupTaylorImportance(),
    "random": lambda: tp.importance.RandomImportance(),
}
NEEDS_GRADIENTS = {"taylor"}


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only go together, across all layers of a group."""

    layer: nn.Module  # the group's root; its output channels are counted
    name: str
    function: Any  # torch-pruning's pruning function for the root
    scores: Tensor  # (channels / divisions,) importance, least important lowest
    divisions: int  # convolution groups: the same channels go in each


def widths(model: nn.Module) -> dict[str, int]:
    """Output channels of every convolution and linear layer, by name."""
    return {name: module.weight.shape[0] for name, module in model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))}


def prune(model: fx.GraphModule, example: Tensor, *, ratio: float, multiple: int, criterion: str, scope: str,
          original: dict[str, int] | None = None, gradients: Callable[[nn.Module], None] | None = None) -> fx.GraphModule:
    """Returns a copy of the model with channels removed; the output layer keeps its width.

    Args:
        model: as `architectures.build.build` makes them; it stays as it is.
        example: (1, C, H, W) input for tracing.
        ratio: share of channels to remove, in (0, 1), of the `original` widths.
        multiple: what remains of a layer is rounded to a multiple of this, to the nearest; odd widths are slow.
        criterion: of CRITERIA.
        scope: "uniform" takes the same share of every group, "global" ranks all channels of the network together.
        original: widths before any pruning, where this is a later step of several; the model's own unless given.
        gradients: fills the copy's gradients, for criteria that need them.

    Raises:
        UserError: a layer would be left without channels, or nothing could be removed.
    """
    pruned = copy.deepcopy(model).eval()
    for parameter in pruned.parameters():
        parameter.requires_grad_(True)
    if gradients is not None:
        gradients(pruned)
    before = widths(pruned)
    original = original or before
    graph, groups = _groups(pruned, example, criterion)
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
        raise UserError(f"pruning removed nothing: at a ratio of {ratio} every width rounds back to itself in multiples "
                        f"of {multiple} (widths {sorted(set(before.values()))}); raise prune.ratio or lower "
                        "prune.multiple")
    pruned.zero_grad(set_to_none=True)
    return pruned


def _nearest_multiple(value: float, multiple: int, divisions: int) -> int:
    """Channels a division, nearest to `value`, of which `divisions` times as many are a multiple."""
    step = multiple // math.gcd(multiple, divisions)
    return int(value / step + 0.5) * step


def _groups(model: fx.GraphModule, example: Tensor, criterion: str) -> tuple[Any, list[ChannelGroup]]:
    """The dependency graph, and the prunable groups with their importance."""
    importance = CRITERIA[criterion]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its notes on unwrapped parameters; what is not pruned shows in the widths
        # The two dicts are passed because torch-pruning's defaults are shared between all pruners of a process.
        pruner = tp.pruner.BasePruner(model, example, importance, ignored_layers=_output_layers(model),
                                      in_channel_groups={}, out_channel_groups={})
        found = []
        names = {module: name for name, module in model.named_modules()}
        for group in pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers,
                                              root_module_types=pruner.root_module_types):
            divisions = pruner._get_channel_groups(group)
            layer, function = group[0].dep.target.module, group[0].dep.handler
            try:
                scores = importance(group)
            except (RuntimeError, IndexError) as error:  # its FPGM, for one, cannot score grouped convolutions
                raise UserError(f"layer {names[layer]}: prune.criterion {criterion} cannot score its group of layers "
                                f"({first_line(error)}); choose another") from error
            if scores is None:
                raise UserError(f"layer {names[layer]}: prune.criterion {criterion} has no score for its group of "
                                "layers; choose another")
            scores = scores.detach().cpu().view(divisions, -1).mean(0)
            found.append(ChannelGroup(layer, names[layer], function, scores, divisions))
    return pruner.DG, found


def _output_layers(model: fx.GraphModule) -> list[nn.Module]:
    """The last layers with weights on every way to the output: their channels are the classes."""
    found: list[nn.Module] = []
    waiting = [node for node in model.graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            found.append(module)
        else:
            waiting += node.all_input_nodes
    return found


def _global(groups: list[ChannelGroup], ratio: float, original: dict[str, int]) -> list[float]:
    """Keeps the channels whose importance, relative to their own group's mean, is highest in the whole network."""
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


def accumulate_gradients(loss: Callable[[nn.Module], Iterable[Tensor]]) -> Callable[[nn.Module], None]:
    """A `gradients` function for `prune`: the sum of the gradients of the losses that `loss(model)` yields."""
    def fill(model: nn.Module) -> None:
        model.zero_grad()
        for value in loss(model):
            value.backward()
    return fill
