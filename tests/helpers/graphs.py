"""Built models whose batch norms have statistics."""

from __future__ import annotations

import warnings

import torch
from torch import fx, nn

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
