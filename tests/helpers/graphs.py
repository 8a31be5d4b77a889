"""Models that are built graphs: with batch norms that have statistics, and with residual sums."""

from __future__ import annotations

import warnings

import torch
from torch import fx, nn, Tensor

from architectures.architecture import Architecture
from architectures.build import build
from architectures.describe import describe
from architectures.zoo import make


def graph(name: str = "slim_resnet18", size: int = 32, **options: object) -> tuple[fx.GraphModule, Architecture]:
    """Return a built model whose batch norms have seen data: folding and pruning must handle them correctly."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = make(name, num_classes=5, **options)  # type: ignore[arg-type]
    architecture = describe(module, (3, size, size))
    model = build(architecture)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.3, 0.3)
    for _ in range(3):
        model(torch.randn(8, 3, size, size))
    return model.eval(), architecture


def graph_of(model: nn.Module, shape: tuple[int, int, int] = (3, 16, 16)) -> fx.GraphModule:
    """Return the graph that `build` makes of a model, with the model's weights and in eval mode."""
    graph = build(describe(model.eval(), shape))
    graph.load_state_dict(model.state_dict())
    return graph.eval()


class Residual(nn.Module):
    """A convolution, a sum with the convolution's input, and an activation."""

    def __init__(self, activation: nn.Module, channels: int = 24, squeeze: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.squeeze = nn.AdaptiveAvgPool2d(1) if squeeze else nn.Identity()
        self.activation = activation
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.flatten(self.pool(self.activation(self.conv(x) + self.squeeze(x)))))
