"""Quantization-aware training: train a float network that computes as its static int8 form will compute.

`prepare_aware` returns a copy that rounds to a grid and back every tensor that a static int8 model (QDQ: quantize and
dequantize around each operator) holds in 8 bits. Gradients pass through the rounding unchanged (the straight-through
estimator). `restored` copies the trained weights into a plain float network of the original architecture. Without
training, a prepared network in eval mode is post-training quantization with min-max calibration.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
section 3; Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference: A whitepaper", section 3.2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from architectures.folding import norm_behind
from architectures.int8 import int8_modules
from architectures.layers.table import row_of_node
from compress.quantization.weights import DEFAULT_FORM, rounded, SMALLEST_SCALE, WeightForm
from metadata.errors import UserError

RANGES = "activation_ranges"  # the submodule of a prepared network that holds its activations' quantizers
AVERAGING = 0.01  # share of a batch's range in the moving average, as in torch.ao's MovingAverageMinMaxObserver
Rounding = Callable[[Tensor, bool], tuple[Tensor, Tensor]]


class FakeQuantizedActivation(nn.Module):
    """Round a tensor of any shape to uint8 and back, with one scale and one zero point.

    For the first `freeze_after` training passes the range is a moving average of the batches' minimum and maximum; then the
    range is frozen. The range always contains 0, so that padding is exact.

    Args:
        freeze_after: number of training passes.
    """

    def __init__(self, freeze_after: int) -> None:
        super().__init__()
        self.freeze_after, self.calibrating = freeze_after, False
        self.low: Tensor
        self.high: Tensor
        self.seen: Tensor
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, input: Tensor) -> Tensor:
        if self.calibrating:
            self.low.copy_(torch.minimum(self.low, input.amin()))
            self.high.copy_(torch.maximum(self.high, input.amax()))
            return input
        if self.training:
            self._follow(input.detach())
        scale = ((self.high - self.low) / 255).clamp(min=SMALLEST_SCALE)
        zero_point = (-self.low / scale).round().to(torch.int32).clamp(0, 255)
        return torch.fake_quantize_per_tensor_affine(input, scale, zero_point, 0, 255)

    @torch.no_grad()
    def _follow(self, input: Tensor) -> None:
        # No branch on a tensor's value: that would wait for the device, and break a compiled network in two.
        # The first batches count in full: the calibrated range is of other batch norm statistics than a batch's own.
        share = (1 / (self.seen + 1)).clamp(min=AVERAGING) * (self.seen < self.freeze_after)
        self.low.lerp_(input.amin().clamp(max=0), share)
        self.high.lerp_(input.amax().clamp(min=0), share)
        self.seen += 1


class FakeQuantizedLayer(nn.Module):
    """A Conv2d or Linear with its batch norm folded in, whose weights are rounded to integers and back.

    The layer scales its weights as the folded network does, by gamma / sqrt(running variance + eps), and rounds them. For
    the first `freeze_after` training passes the layer then normalizes its output by the batch's own mean and variance, and
    updates the running statistics as a batch norm does: training is as stable as with the batch norm itself, and the
    rounding does not jitter with each batch's variance. After that the layer uses the running statistics, as in eval mode,
    so that the remaining passes train what the folded network will compute. Of the forms in Krishnamoorthi 2018, section
    3.2.2 (correction, then freezing), this one needs one convolution instead of two.

    A channel whose weights all round to 0, because gamma is 0 or the other channels' weights are much larger, says nothing
    about its statistics: the channel uses its running statistics and does not update them.

    Args:
        layer: the layer, which stays trainable.
        norm: its batch norm, which stays trainable, or None.
        norm_name: the batch norm's name in the original network.
        freeze_after: number of training passes.
        rounding: see `prepare_aware`.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm1d | nn.BatchNorm2d | None, norm_name: str,
                 freeze_after: int, rounding: Rounding) -> None:
        super().__init__()
        self.layer, self.norm, self.norm_name = layer, norm, norm_name
        self.freeze_after, self.rounding, self.calibrating = freeze_after, rounding, False
        self.depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, input: Tensor) -> Tensor:
        """(N, in, ...) -> (N, out, ...), normalized."""
        weight, norm = self.layer.weight, self.norm
        if norm is None:
            return self._compute(input, self.rounded(weight), self.layer.bias)
        assert norm.running_mean is not None and norm.running_var is not None
        gamma = norm.weight if norm.affine else torch.ones_like(norm.running_var)
        beta = norm.bias if norm.affine else torch.zeros_like(norm.running_var)
        bias = torch.zeros_like(norm.running_var) if self.layer.bias is None else self.layer.bias
        reciprocal = torch.rsqrt(norm.running_var + norm.eps)
        factor = gamma * reciprocal  # not gamma / deviation: the folded weights must have the same bits
        shift = beta + factor * (bias - norm.running_mean)
        folded = self.rounded(weight * factor.view(-1, *[1] * (weight.dim() - 1)))
        if not self.training:
            return self._compute(input, folded, shift)
        output = self._compute(input, folded, None)
        dims = [0, *range(2, output.dim())]
        variance, mean = torch.var_mean(output, dims, correction=0)  # of factor * (the convolution without its bias)
        shows, following = folded.detach().flatten(1).any(1), self.seen < self.freeze_after
        divisor = torch.where(shows, factor, 1.0)
        variance = variance / divisor / divisor  # the divisor's square could underflow
        live = shows & following
        self._remember(mean / divisor + bias, variance, output.numel() // output.shape[1], live, following)
        ratio = torch.rsqrt(variance + norm.eps) / reciprocal
        shape = (1, -1, *[1] * (output.dim() - 2))
        return torch.addcmul(torch.where(live, beta - mean * ratio, shift).view(shape), output,
                             torch.where(live, ratio, 1.0).view(shape))

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int, live: Tensor, following: Tensor) -> None:
        """Update the running statistics of the live channels: (out,) each, over `count` values a channel."""
        norm = self.norm
        assert norm is not None and norm.running_mean is not None and norm.running_var is not None
        self.seen += 1
        if not norm.track_running_stats:  # see compress.training.optimizers.frozen_statistics
            return
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += following
        share = live * (norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked.clamp(min=1))
        norm.running_mean.lerp_(mean, share)
        norm.running_var.lerp_(variance * (count / max(count - 1, 1)), share)

    def rounded(self, weight: Tensor) -> Tensor:
        """Round folded weights, (out, ...), to their grid; the gradient passes unchanged."""
        if self.calibrating:
            return weight
        levels, scale = self.rounding(weight.detach(), self.depthwise)
        return levels * scale.view(-1, *[1] * (weight.dim() - 1)) + (weight - weight.detach())

    def _compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(input, weight, bias)
        return F.conv2d(input, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def prepare_aware(model: fx.GraphModule, batches: Iterable[Tensor], *, freeze_after: int = 0,
                  weights: WeightForm | Rounding = DEFAULT_FORM) -> fx.GraphModule:
    """Return a calibrated copy with fake-quantized weights and activations, in eval mode.

    Quantize the network's input, its logits, and every tensor between operators, once for all readers (both inputs of an
    addition, the output of a pool). As in a static int8 model, quantize a convolution or sum that only a ReLU or ReLU6
    reads behind that activation. Biases stay float: a static int8 model holds them in 32 bits.

    Args:
        model: a float graph from `architectures.build.build`, which is not changed.
        batches: (N, C, H, W) normalised images, one batch or more, to calibrate with: each tensor's range is its minimum
            and maximum in the float network.
        freeze_after: number of training passes after which ranges and batch norm statistics are frozen. A batch norm that
            is folded into no layer is not frozen: no weight's rounding depends on its statistics.
        weights: the form of the weights, or a function that rounds folded weights in any other way: (out, ...) float and
            whether the layer is depthwise -> (out, ...) levels in the same type, (out,) scales.

    Raises:
        UserError: the model is int8 already, it has no Conv2d or Linear, or there are no batches.
    """
    if int8_modules(model):
        raise UserError("quantization-aware training: the model is int8 already; it needs the float model")
    rounding = partial(_round_to, weights) if isinstance(weights, str) else weights
    prepared = copy.deepcopy(model).eval()
    if not _wrap_layers(prepared, freeze_after, rounding):
        raise UserError("quantization-aware training: the model has no Conv2d or Linear to quantize")
    _insert_quantizers(prepared, freeze_after)
    prepared.graph.lint()
    prepared.recompile()
    _calibrate(prepared, batches)
    return prepared


def _round_to(form: WeightForm, weight: Tensor, depthwise: bool) -> tuple[Tensor, Tensor]:
    return rounded(weight, form, depthwise)


def _wrap_layers(model: fx.GraphModule, freeze_after: int, rounding: Rounding) -> int:
    """Replace the layers by fake-quantized ones, fold in the batch norms behind them, and return the number of layers."""
    modules, count = dict(model.named_modules()), 0
    for node in list(model.graph.nodes):
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        norm, norm_name = None, ""
        if found := norm_behind(node, modules):
            norm_node, norm = found
            norm_name = str(norm_node.target)
            norm_node.replace_all_uses_with(node)
            model.graph.erase_node(norm_node)
            model.delete_submodule(norm_name)
        wrapped = FakeQuantizedLayer(layer, norm, norm_name, freeze_after, rounding)
        model.set_submodule(str(node.target), wrapped.eval().to(layer.weight.device))
        count += 1
    return count


def _insert_quantizers(model: fx.GraphModule, freeze_after: int) -> None:
    """Quantize every tensor of the graph that is not on a grid already."""
    modules, raw, device = dict(model.named_modules()), set[fx.Node](), next(model.parameters()).device

    for node in list(model.graph.nodes):
        on_grid = row_of_node(node, modules).keeps_grid and not raw.intersection(node.all_input_nodes)
        if on_grid or node.op == "output":
            continue
        if len(node.users) == 1 and row_of_node(next(iter(node.users)), modules).merges():
            raw.add(node)
            continue
        name = f"{RANGES}.{node.name}"
        model.add_submodule(name, FakeQuantizedActivation(freeze_after).eval().to(device))
        with model.graph.inserting_after(node):
            quantizer = model.graph.call_module(name)
        node.replace_all_uses_with(quantizer)
        quantizer.args = (node,)


@torch.no_grad()
def _calibrate(prepared: fx.GraphModule, batches: Iterable[Tensor]) -> None:
    """Set each range to the float network's minimum and maximum on some images."""
    parts = [module for module in prepared.modules() if isinstance(module, (FakeQuantizedActivation, FakeQuantizedLayer))]
    device, count = next(prepared.parameters()).device, 0
    for part in parts:
        part.calibrating = True
    for images in batches:
        prepared(images.to(device))
        count += 1
    for part in parts:
        part.calibrating = False
    if not count:
        raise UserError("quantization-aware training: there are no images to calibrate with")


def restored(prepared: fx.GraphModule, original: fx.GraphModule) -> fx.GraphModule:
    """Return a float network of the original's architecture with the trained weights and statistics, in eval mode.

    Folding its batch norms and rounding its weights gives the weights of the prepared network in eval mode. The activation
    ranges are dropped: quantizing the network calibrates it again, or measures the ranges at run time.

    Args:
        prepared: the result of `prepare_aware` for a network of the original's architecture, trained.
        original: the network that `prepare_aware` was called with, which is not changed.
    """
    state = prepared.state_dict()
    for name, module in prepared.named_modules():
        if isinstance(module, FakeQuantizedLayer):
            for key, tensor in module.layer.state_dict().items():
                state[f"{name}.{key}"] = tensor
            for key, tensor in module.norm.state_dict().items() if module.norm is not None else ():
                state[f"{module.norm_name}.{key}"] = tensor
    result = copy.deepcopy(original).to(next(prepared.parameters()).device)
    result.load_state_dict({key: state[key] for key in result.state_dict()})
    return result.eval()
