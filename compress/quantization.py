"""Dynamic int8: BatchNorm is folded, then every Conv2d and Linear gets int8 weights and quantizes its input as it runs.

PyTorch's own dynamic quantization skips every Conv2d without a word. Here a coverage table says for each layer whether
it is int8 and why, and a layer that was asked for and stayed float is an error.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from model_loader import UserError, int8_layers


@dataclass(frozen=True)
class Coverage:
    """What became of one layer."""

    layer: str
    kind: str
    dtype: str  # "int8" or "float32"
    reason: str
    weights: int


def fold_batch_norm(model: fx.GraphModule) -> fx.GraphModule:
    """A copy in eval mode where each BatchNorm that directly follows a convolution or linear layer is folded into it.

    Source: Jacob et al. 2018, section 3.2.
    """
    folded = copy.deepcopy(model).eval()
    modules = dict(folded.named_modules())
    for node in list(folded.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        source = node.args[0] if norm is not None else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        layer = modules[str(source.target)]
        if isinstance(norm, nn.BatchNorm2d) and isinstance(layer, nn.Conv2d):
            fused: nn.Module = fuse_conv_bn_eval(layer, norm)
        elif isinstance(norm, nn.BatchNorm1d) and isinstance(layer, nn.Linear):
            fused = fuse_linear_bn_eval(layer, norm)
        else:
            continue
        folded.set_submodule(str(source.target), fused)
        modules[str(source.target)] = fused
        node.replace_all_uses_with(source)
        folded.graph.erase_node(node)
        folded.delete_submodule(str(node.target))
    folded.recompile()
    return folded


def quantize_dynamic(model: fx.GraphModule, exclude: Collection[str] = ()) -> tuple[fx.GraphModule, list[Coverage]]:
    """A folded copy of the model with int8 layers, and the coverage table.

    Args:
        model: as `model_loader.build` makes them; it stays as it is.
        exclude: names of layers that keep float weights.

    Raises:
        UserError: an excluded name is no such layer; a layer cannot be quantized and is not excluded; or there was
            nothing to quantize.
    """
    quantized = fold_batch_norm(model)
    called = [str(node.target) for node in quantized.graph.nodes if node.op == "call_module"]
    layers = {name: layer for name in called
              if isinstance(layer := quantized.get_submodule(name), (nn.Conv2d, nn.Linear))}
    for name in exclude:
        if name not in layers:
            raise UserError(f"quantize_dynamic.exclude: {name!r} is no Conv2d or Linear layer of the model "
                            f"({', '.join(layers)})")
    coverage = []
    for name, layer in layers.items():
        if name in exclude:
            coverage.append(Coverage(name, type(layer).__name__, "float32", "excluded by the recipe",
                                     layer.weight.numel()))
            continue
        quantized.set_submodule(name, _int8_module(layer, name))
        coverage.append(Coverage(name, type(layer).__name__, "int8", "dynamic, per channel", layer.weight.numel()))
    if not any(row.dtype == "int8" for row in coverage):
        raise UserError("quantize_dynamic: nothing became int8; the model has no Conv2d or Linear that is not excluded")
    return quantized, coverage


def quantize_weight(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Symmetric int8 weights with a scale an output channel: (out, ...) float -> (out, ...) int8, (out,) float.

    Raises:
        UserError: the weights are not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise UserError(f"layer {name}: its weights hold NaN or infinite values and cannot be quantized")
    scale = (weight.abs().flatten(1).amax(1) / 127).clamp(min=1e-12)
    levels = (weight / scale.view(-1, *[1] * (weight.dim() - 1))).round().clamp(-127, 127)
    return levels.to(torch.int8).contiguous(), scale


@torch.no_grad()
def _int8_module(layer: nn.Conv2d | nn.Linear, name: str) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise UserError(f"layer {name}: padding {layer.padding!r}, mode {layer.padding_mode!r} has no int8 form; list "
                            "it in quantize_dynamic.exclude")
        module = int8_layers().Int8Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride,
                                      layer.padding, layer.dilation, layer.groups)
    else:
        module = int8_layers().Int8Linear(layer.in_features, layer.out_features)
    weight, scale = quantize_weight(layer.weight.detach().float().cpu(), name)
    state = {"weight": weight, "weight_scale": scale,
             "bias": torch.zeros(len(scale)) if layer.bias is None else layer.bias.detach().float().cpu()}
    module.load_state_dict(state)
    return module.eval()
