"""Memory format of a network and its images during training."""

from __future__ import annotations

import os
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
    """Return why a backward pass with channels last in memory could crash the process, or an empty text.

    oneDNN's AVX2 kernel for the weight gradient of a 1x1 convolution with a stride and 2 to 7 input channels writes up to
    6 kB past its scratch memory when the images lie channels last, whatever the layout of the weights (torch 2.14 with
    oneDNN 3.12). The process dies of it at once, later, or never. One and eight or more input channels, groups, 3x3
    kernels, forward passes and the plain layout are free of it; `tests/training/test_memory_format.py` runs the grid with
    guards around each block of memory. The rule covers groups and single channels all the same: they lose nothing.

    The rule goes by layer widths and the CPU's capability, not by a trial in a child process: a trial passes if it
    corrupts memory in silence, which is the usual case, and costs seconds at every start.
    """
    if device.type != "cpu" or avx512_kernels():
        return ""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) == 1 and max(module.stride) > 1 \
                and module.in_channels // module.groups < NARROW:
            return (f"layer {name}: the backward pass of a 1x1 convolution with a stride and fewer than {NARROW} input "
                    "channels corrupts memory on this CPU (no AVX512 kernels)")
    return ""


def avx512_kernels() -> bool:
    """Return whether both torch's and oneDNN's kernels are those for AVX512.

    Each has a cap of its own: `ATEN_CPU_CAPABILITY` holds for torch, `ONEDNN_MAX_CPU_ISA` (formerly `DNNL_MAX_CPU_ISA`) for
    oneDNN, which does not ask torch. A cap below AVX512, or an unknown one, counts as no AVX512.
    """
    cap = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL").upper()
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and (cap in ("ALL", "DEFAULT") or cap.startswith(
        ("AVX512", "AVX10")))
