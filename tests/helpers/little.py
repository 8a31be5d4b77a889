"""A network of a few layers that runtimes differ in, as ONNX in float and in int8."""

from __future__ import annotations

import functools

import onnx
import torch
from torch import nn

from compress.quantization.static import Calibration, quantize_static, StaticSettings
from tests.helpers.static_int8 import float_file, images

SHAPE = (3, 32, 32)


class Little(nn.Module):
    """A sum, a depthwise convolution, a padded pool, a concatenation and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.pool, self.fc = nn.MaxPool2d(3, 2, padding=1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stem(x))
        y = self.depthwise(x) + x
        return self.fc(torch.cat([y * self.gate(y), x], 1).mean((2, 3)))


@functools.cache
def little(int8: bool = False) -> onnx.ModelProto:
    """The network as the stage export writes it, or as quantize_static does. Do not change the result."""
    if int8:
        return quantize_static(Calibration(little(), images()), StaticSettings(operators="weighted")).model
    torch.manual_seed(0)
    return float_file(Little())[0]
