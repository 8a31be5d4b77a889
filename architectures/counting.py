"""Counting what a model costs: stored numbers and multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def count_parameters(model: nn.Module) -> int:
    """Every stored number but batch counters: parameters, frozen or not, and buffers (int8 weights, BN statistics)."""
    return count_numbers(model.state_dict())


def count_numbers(weights: dict[str, Tensor]) -> int:
    """The numbers of a state dict, without batch counters."""
    return sum(tensor.numel() for name, tensor in weights.items() if not name.endswith("num_batches_tracked"))


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-adds of the convolutions and matrix products for one image, as torch's flop counter sees them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    device = next(iter(model.state_dict().values())).device
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(False), torch.no_grad(), counter:
        model(torch.zeros(1, *input_shape, device=device))
    return int(counter.get_total_flops()) // 2
