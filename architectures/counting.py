"""Count what a model costs: stored numbers and multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from architectures.architecture import Architecture
from architectures.build import check_shapes
from metadata.errors import VerificationError

if TYPE_CHECKING:
    from torch import Tensor, nn


# What one image may take. RegNet-Y-128GF on 384 pixels takes 4e11 multiply-adds and 1.6e9 other steps, 4e7 in one layer; a
# ResNet-152 takes 1e10 and 2e8. A larger count is an attack or a mistake.
MAX_MACS = 10**12
MAX_WORK = 10**10
MAX_LAYER_WORK = 10**9


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs: the numbers that it stores, its multiply-adds for one image, and its other steps (`work`)."""

    parameters: int
    macs: int
    work: int


def layer_costs(architecture: Architecture) -> dict[str, LayerCost]:
    """Return what each layer costs by the layer table, without allocating any tensor.

    Raises:
        VerificationError: see `check_shapes`.
    """
    shapes = {"input": architecture.input_shape, **check_shapes(architecture)}
    costs = {}
    for layer in architecture.layers:
        inputs, output = [shapes[name] for name in layer.inputs], shapes[layer.name]
        costs[layer.name] = LayerCost(layer.parameters(), layer.macs(inputs, output), layer.work(inputs, output))
    return costs


def architecture_macs(architecture: Architecture) -> int:
    """Return the multiply-adds for one image by the layer table.

    Raises:
        VerificationError: see `check_shapes`.
    """
    return sum(cost.macs for cost in layer_costs(architecture).values())


def check_costs(where: str, macs: int, work: Mapping[str, int]) -> None:
    """Check that one image is answered in a time that people wait for.

    Args:
        where: the file, for the message.
        macs: multiply-adds.
        work: other steps by layer.

    Raises:
        VerificationError: over `MAX_MACS`, `MAX_WORK` or, in one layer, `MAX_LAYER_WORK`.
    """
    if macs > MAX_MACS:
        raise VerificationError(f"{where}: {macs:,} multiply-adds an image are over the limit of {MAX_MACS:,}")
    name = max(work, key=work.__getitem__, default="")
    if name and (work[name] > MAX_LAYER_WORK or sum(work.values()) > MAX_WORK):
        raise VerificationError(f"{where}: layer {name!r} takes {work[name]:,} steps an image beside multiply-adds, all "
                                f"together {sum(work.values()):,}, over the limits of {MAX_LAYER_WORK:,} and {MAX_WORK:,}")


def description_bytes(architecture: Architecture) -> int:
    """Return the bytes of what an architecture could be made to remember beside the weights.

    A layer's type takes 1 byte; an input that is not the layer just before, 2; an option that is not the default, 8 for a
    float and as many as it needs for a whole number. The whole numbers of layers with weights follow from those weights.
    """
    total, before = 0, "input"
    for layer in architecture.layers:
        total += 1 + 2 * (len(layer.inputs) - (before in layer.inputs))
        before = layer.name
        for name, value in layer.options().items():
            if value != type(layer).model_fields[name].default:
                for number in value if isinstance(value, list | tuple) else (value,):
                    if isinstance(number, float):
                        total += 8
                    elif isinstance(number, int) and not layer.width:
                        total += max(1, (number.bit_length() + 7) // 8)
    return total


def count_parameters(model: nn.Module) -> int:
    """Count every stored number but batch counters: parameters, frozen or not, and buffers such as int8 weights."""
    return count_numbers(model.state_dict())


def count_numbers(weights: dict[str, Tensor]) -> int:
    """Count the numbers of a state dict, without batch counters."""
    return sum(tensor.numel() for name, tensor in weights.items() if not name.endswith("num_batches_tracked"))


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Count the multiply-adds of convolutions and matrix products for one image, as torch's flop counter sees them."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    device = next(iter(model.state_dict().values())).device
    counter = FlopCounterMode(display=False)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see into nn.MultiheadAttention's fused kernel
    try:
        with torch.inference_mode(False), torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.zeros(1, *input_shape, device=device))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops()) // 2
