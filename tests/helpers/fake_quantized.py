"""A network for quantization-aware training, and the weights that its prepared form computes with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from architectures.folding import fold_batch_norm
from compress.quantization.aware import FakeQuantizedActivation, FakeQuantizedLayer, Rounding
from compress.quantization.weights import quantize_weight, WeightForm
from tests.helpers.graphs import graph_of

SHAPE = (3, 16, 16)


class Network(nn.Module):
    """The layers that static int8 treats differently: depthwise, ReLU6, a residual sum, a pool, BatchNorm1d, Linear."""

    def __init__(self, norms: bool = True) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, kernel: int, groups: int = 1) -> list[nn.Module]:
            layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=not norms)
            return [layer, nn.BatchNorm2d(outputs)] if norms else [layer]
        self.stem = nn.Sequential(*block(3, 16, 3), nn.ReLU())
        self.depthwise = nn.Sequential(*block(16, 16, 3, groups=16), nn.ReLU6())
        self.pointwise = nn.Sequential(*block(16, 16, 1))
        self.wide = nn.Sequential(nn.MaxPool2d(2), *block(16, 24, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(24, 20), *([nn.BatchNorm1d(20)] if norms else []), nn.ReLU())
        self.fc = nn.Linear(20, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        return self.fc(self.hidden(self.wide(torch.relu(x + self.pointwise(self.depthwise(x))))))


def network(kind: str = "norms") -> fx.GraphModule:
    """Return a network: "norms" has batch norms, "off" switches a third of their channels off, "plain" has none."""
    torch.manual_seed(0)
    model = Network(norms=kind != "plain")
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            if kind == "off":
                module.weight.data[::3] = 0
    return graph_of(model)


def some(batches: int = 4, seed: int = 1) -> list[Tensor]:
    """Return batches of 32 images of noise."""
    return list(torch.randn(batches, 32, *SHAPE, generator=torch.Generator().manual_seed(seed)))


def parts(prepared: nn.Module) -> tuple[list[FakeQuantizedLayer], list[FakeQuantizedActivation]]:
    """Return the layers and the activations of a prepared network, each in the order of its modules."""
    modules = list(prepared.modules())
    return ([module for module in modules if isinstance(module, FakeQuantizedLayer)],
            [module for module in modules if isinstance(module, FakeQuantizedActivation)])


class Weights(TorchFunctionMode):
    """Collects the weights that convolutions and products are computed with, in the order of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv2d, F.linear):
            self.seen.append(args[1].detach())
        return func(*args, **(kwargs or {}))


def four_bits(per_channel: bool) -> Rounding:
    """Return a rounding to 4 bits, with one scale for each output channel or for the layer."""
    def rounding(weight: Tensor, depthwise: bool) -> tuple[Tensor, Tensor]:
        largest = weight.abs().flatten(1).amax(1)
        scale = ((largest if per_channel else largest.max().expand_as(largest)) / 7).clamp(min=1e-12)
        return (weight / scale.view(-1, *[1] * (weight.dim() - 1))).round(), scale
    return rounding


def assert_computes_with_the_weights_of(prepared: fx.GraphModule, model: fx.GraphModule, form: WeightForm = "pair") -> None:
    """Assert that the prepared network computes with the int8 weights of the folded network, bit for bit."""
    folded = fold_batch_norm(model)
    names = [str(node.target) for node in folded.graph.nodes if node.op == "call_module"]
    layers = [layer for name in names if isinstance(layer := folded.get_submodule(name), (nn.Conv2d, nn.Linear))]
    with torch.no_grad(), Weights() as weights:
        prepared(some()[0])
    for got, layer in zip(weights.seen, layers, strict=True):
        depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.out_channels == layer.in_channels
        levels, scale = quantize_weight(layer.weight.detach(), form, depthwise)
        assert torch.equal(got, levels * scale.view(-1, *[1] * (got.dim() - 1)))
