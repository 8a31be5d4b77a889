"""Fold batch norms into the convolutions and linear layers before them: in evaluation the two are one layer."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval


def fold_batch_norm(model: fx.GraphModule) -> fx.GraphModule:
    """Return a copy in eval mode with each BatchNorm folded into the convolution or linear layer directly before it.

    Source: Jacob et al. 2018, section 3.2.
    """
    folded = copy.deepcopy(model).eval()
    modules = dict(folded.named_modules())
    for node in list(folded.graph.nodes):
        found = norm_behind(node, modules)
        if found is None:
            continue
        norm_node, norm = found
        layer = modules[str(node.target)]
        fused = fuse_conv_bn_eval(layer, norm) if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval(layer, norm)
        folded.set_submodule(str(node.target), fused)
        modules[str(node.target)] = fused
        norm_node.replace_all_uses_with(node)
        folded.graph.erase_node(norm_node)
        folded.delete_submodule(str(norm_node.target))
    folded.recompile()
    return folded


def norm_behind(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, nn.BatchNorm1d | nn.BatchNorm2d] | None:
    """Return the BatchNorm that can be folded into a convolution or linear layer, and its node.

    The BatchNorm must be the only reader of the layer's output.

    Args:
        node: any node of the graph.
        modules: the graph's modules by name.
    """
    layer = modules.get(str(node.target)) if node.op == "call_module" else None
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if not isinstance(layer, (nn.Conv2d, nn.Linear)) or user is None or user.op != "call_module":
        return None
    norm = modules[str(user.target)]
    if isinstance(layer, nn.Conv2d):
        return (user, norm) if isinstance(norm, nn.BatchNorm2d) else None
    # torch's fusion of a linear layer needs a norm with weights
    return (user, norm) if isinstance(norm, nn.BatchNorm1d) and norm.affine and _takes_rows(node, modules) else None


def _takes_rows(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether a linear layer certainly reads rows, (N, features). On planes, a norm works along another axis."""
    source: Any = node
    while isinstance(source, fx.Node) and source.op == "call_module":
        module = modules[str(source.target)]
        if isinstance(module, nn.Flatten):
            return module.start_dim == 1 and module.end_dim == -1
        source = source.args[0]
    return False  # unknown: the norm stays a layer of its own
