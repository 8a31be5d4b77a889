"""oneDNN's int8 kernels, called directly: integers in, exact sums out, unless the CPU saturates."""

from __future__ import annotations

import torch
from torch import Tensor


def convolved(levels: Tensor, weight: Tensor, groups: int = 1, stride: int = 1) -> Tensor:
    """Convolve uint8 (N, C, H, W) with int8 (out, in of a group, k, k), padded by k // 2: (N, out, H', W') float32."""
    steps, around, dilation = [stride, stride], [weight.shape[2] // 2] * 2, [1, 1]
    levels = levels.contiguous(memory_format=torch.channels_last)
    scale, zero_points = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.long)
    packed = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 0, steps, around, dilation, groups, list(levels.shape))
    output: Tensor = torch.ops.onednn.qconv2d_pointwise(levels, 1.0, 0, packed, scale, zero_points, None, steps, around,
                                                        dilation, groups, 1.0, 0, torch.float32, "none", [], "")
    return output


def multiplied(levels: Tensor, weight: Tensor) -> Tensor:
    """Multiply uint8 (N, in) by int8 (out, in): (N, out) float32."""
    scale, zero_points = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.long)
    packed = torch.ops.onednn.qlinear_prepack(weight, list(levels.shape))
    output: Tensor = torch.ops.onednn.qlinear_pointwise(levels, 1.0, 0, packed, scale, zero_points, None, 1.0, 0,
                                                        torch.float32, "none", [], "")
    return output
