"""Count what a model costs: stored numbers and multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from architectures.architecture import Architecture
from architectures.build import check_shapes

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs: the numbers that it stores, and its multiply-adds for one image."""

    parameters: int
    macs: int


def layer_costs(architecture: Architecture) -> dict[str, LayerCost]:
    """Return what each layer costs by the layer table, without allocating any tensor.

    Raises:
        VerificationError: see `check_shapes`.
    """
    shapes = check_shapes(architecture)
    return {layer.name: LayerCost(layer.parameters(), layer.macs(shapes[layer.name])) for layer in architecture.layers}


def architecture_macs(architecture: Architecture) -> int:
    """Return the multiply-adds for one image by the layer table.

    Raises:
        VerificationError: see `check_shapes`.
    """
    return sum(cost.macs for cost in layer_costs(architecture).values())


def count_parameters(model: nn.Module) -> int:
    """Count every stored number but batch counters: parameters, frozen or not, and buffers such as int8 weights."""
    return count_numbers(model.state_dict())


def count_numbers(weights: dict[str, Tensor]) -> int:
    """Count the numbers of a state dict, without batch counters."""
    return sum(tensor.numel() for name, tensor in weights.items() if not name.endswith("num_batches_tracked"))


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Count the multiply-adds of convolutions and matrix products for one image, as torch's flop counter sees them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    device = next(iter(model.state_dict().values())).device
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(False), torch.no_grad(), counter:
        model(torch.zeros(1, *input_shape, device=device))
    return int(counter.get_total_flops()) // 2
