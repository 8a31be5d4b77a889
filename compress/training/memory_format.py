"""Memory format of a network and its images during training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

NARROW = 8  # input channels


def chosen_memory_format(model: nn.Module, channels_last: bool | None, device: torch.device,
                         warn: Callable[[str], None]) -> torch.memory_format:
    """Return the memory format to train in.

    Args:
        model: what to train.
        channels_last: as asked for; None decides by the network.
        device: where to train.
        warn: takes the reason if channels last was asked for and could crash the process.
    """
    if not (suits_channels_last(model, device) if channels_last is None else channels_last):
        return torch.contiguous_format
    if reason := unsafe_channels_last(model, device):
        if channels_last:
            warn(f"channels_last is left out; {reason}")
        return torch.contiguous_format
    return torch.channels_last


def suits_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Return whether a network's convolutions are faster with channels last in memory.

    All but the narrowest are. On several CPU threads, oneDNN's kernels for that layout do not share the work of fewer than
    32 channels: two threads were slower than one (by a tenth), where the plain layout gained a third.
    """
    widths = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    return bool(widths) and (max(widths) >= 32 or device.type != "cpu" or torch.get_num_threads() == 1)


def unsafe_channels_last(model: nn.Module, device: torch.device) -> str:
    """Return why training with channels last in memory could crash the process, or an empty text.

    oneDNN's backward pass of a 1x1 convolution with a stride and fewer than 8 input channels writes past its buffers on
    CPUs without AVX512 (torch 2.14 with oneDNN 3.12, one thread: 4 -> 8 channels, stride 2, 8x8 images, batch 32 ends in
    "double free or corruption"). The rule goes by layer widths and the CPU's capability, not by a trial: a trial would
    pass if it corrupted the heap in silence.
    """
    if device.type != "cpu" or "AVX512" in torch.backends.cpu.get_cpu_capability():
        return ""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) == 1 and max(module.stride) > 1 \
                and module.in_channels // module.groups < NARROW:
            return (f"layer {name}: the backward pass of a 1x1 convolution with a stride and fewer than {NARROW} input "
                    "channels corrupts memory on this CPU (no AVX512)")
    return ""
