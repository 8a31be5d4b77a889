"""Groups of channels that can only be pruned together, across all layers that are coupled."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from compress.pruning.importance import CRITERIA
from compress.pruning.library import tp
from metadata.errors import UserError, first_line

ROOTS = (nn.Conv2d, nn.Linear)  # a group begins at the output channels of one of these


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Channels that can only be pruned together, across all layers of a group.

    Args:
        layer: root of the group, whose output channels are counted.
        name: name of the root in the model.
        function: torch-pruning's pruning function for the root.
        scores: (channels / divisions,) importance; the least important channel has the lowest score.
        divisions: number of convolution groups; the same channels are pruned in each.
    """

    layer: nn.Module
    name: str
    function: Any
    scores: Tensor
    divisions: int


def widths(model: nn.Module) -> dict[str, int]:
    """Return the number of output channels of every convolution and linear layer, by name."""
    return {name: module.weight.shape[0] for name, module in model.named_modules() if isinstance(module, ROOTS)}


def channel_groups(model: fx.GraphModule, example: Tensor, criterion: str) -> tuple[Any, list[ChannelGroup]]:
    """Return torch-pruning's dependency graph, and the prunable groups with their importance.

    Args:
        model: traced with gradients enabled.
        example: (1, C, H, W) input for tracing.
        criterion: a key of `CRITERIA`.

    Raises:
        UserError: the criterion cannot score a group.
    """
    importance = CRITERIA[criterion]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes on unwrapped parameters; what is not pruned shows in the widths
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
            except (RuntimeError, IndexError) as error:  # torch-pruning's FPGM, for one, cannot score grouped convolutions
                raise UserError(f"layer {names[layer]}: prune.criterion {criterion} cannot score its group of layers "
                                f"({first_line(error)}); choose another") from error
            if scores is None:
                raise UserError(f"layer {names[layer]}: prune.criterion {criterion} has no score for its group of "
                                "layers; choose another")
            scores = scores.detach().cpu().view(divisions, -1).mean(0)
            found.append(ChannelGroup(layer=layer, name=names[layer], function=function, scores=scores,
                                      divisions=divisions))
    return pruner.DG, found


def _output_layers(model: fx.GraphModule) -> list[nn.Module]:
    """Return the last layers with weights on every path to the output: their channels are the classes."""
    found: list[nn.Module] = []
    waiting = [node for node in model.graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ROOTS):
            found.append(module)
        else:
            waiting += node.all_input_nodes
    return found
