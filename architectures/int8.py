"""The int8 layers as PyTorch modules. They define what dynamic int8 computes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Int8Layers:
    """The int8 module classes and the function that they share. Their source also goes into a package's model.py."""

    quantize_activations: Callable[[Tensor], tuple[Tensor, Tensor]]
    Int8Conv2d: type[nn.Module]
    Int8Linear: type[nn.Module]


def int8_modules(model: nn.Module) -> list[Any]:
    """Return a model's int8 layers."""
    kinds = (int8_layers().Int8Conv2d, int8_layers().Int8Linear)
    return [module for module in model.modules() if isinstance(module, kinds)]


@functools.cache
def int8_layers() -> Int8Layers:
    """Return the int8 layers. They are defined on first use because they need torch.

    Weights are int8 with a per-channel scale. Activations are quantized to 8 bits at run time, with one range per image
    (the first dimension), so that a prediction never depends on the other images of its batch. A layer whose activations
    are "float32" is int8 on disk only. These modules define the result, and run where the CPU has no int8 kernels: they
    sum the products in float32, which is exact for integers up to 2^24. `Int8Graph` computes the same on int8 kernels.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", eq. 1-7.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    def quantize_activations(input: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, ...) float as integers held as float, zero point subtracted, and their scale (N, 1, ...)."""
        dims = tuple(range(1, input.dim()))
        low = input.amin(dims, keepdim=True).clamp(max=0).double()
        high = input.amax(dims, keepdim=True).clamp(min=0).double()
        scale = ((high - low) / 255).clamp(min=1e-12)
        zero_point = (-low / scale).round()
        # Both ends of the range must be representable with the rounded zero point.
        scale = scale.maximum(high / (255 - zero_point).clamp(min=1)).maximum(-low / zero_point.clamp(min=1))
        return (input * (1 / scale).to(input.dtype)).round_(), scale.to(input.dtype)

    class Int8Conv2d(nn.Module):
        """Conv2d with int8 weights, a per-channel scale, and activations quantized at run time or kept float."""

        def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int],
                     stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0),
                     dilation: tuple[int, int] = (1, 1), groups: int = 1, activations: str = "int8") -> None:
            super().__init__()
            shape = (out_channels, in_channels // groups, *kernel_size)
            self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
            self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
            self.activations = activations
            self.weight: Tensor  # buffers, not parameters: scoring harnesses read the first parameter's dtype
            self.weight_scale: Tensor
            self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
            self.register_buffer("weight_scale", torch.ones(out_channels))
            self.bias = nn.Parameter(torch.zeros(out_channels))

        def forward(self, input: Tensor) -> Tensor:
            if input.dim() == 3:  # an image without a batch
                image: Tensor = self.forward(input[None])[0]
                return image
            levels, scale = quantize_activations(input) if self.activations == "int8" else (input, 1.0)
            output = F.conv2d(levels, self.weight.to(levels.dtype), None, self.stride, self.padding, self.dilation,
                              self.groups)
            return output * (scale * self.weight_scale.view(-1, 1, 1)) + self.bias.view(-1, 1, 1)

    class Int8Linear(nn.Module):
        """Linear with int8 weights, a scale per output feature, and activations quantized at run time or kept float."""

        def __init__(self, in_features: int, out_features: int, activations: str = "int8") -> None:
            super().__init__()
            self.in_features, self.out_features, self.activations = in_features, out_features, activations
            self.weight: Tensor
            self.weight_scale: Tensor
            self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
            self.register_buffer("weight_scale", torch.ones(out_features))
            self.bias = nn.Parameter(torch.zeros(out_features))

        def forward(self, input: Tensor) -> Tensor:
            levels, scale = quantize_activations(input) if self.activations == "int8" else (input, 1.0)
            return F.linear(levels, self.weight.to(levels.dtype)) * (scale * self.weight_scale) + self.bias

    return Int8Layers(quantize_activations, Int8Conv2d, Int8Linear)
