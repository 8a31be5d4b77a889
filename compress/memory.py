"""How memory is used: what was freed is kept for the next step, and images and kernels lie in the faster order."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import nn

# Of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tells glibc's allocator to keep what is freed; returns whether it listened.

    By default each tensor above 128 kB to 32 MB comes from the kernel anew, page by page and zeroed, in every step of a
    training: on the machine of `benchmarks/results/training_speed.json` a tenth to a third of a step's time. Peak
    memory is what it was; it is only not returned between the peaks.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return all(mallopt(option, value) for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1),
                                                            (M_TOP_PAD, 64 << 20)))


def suits_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Whether a network's convolutions are faster with channels last in memory.

    All but the narrowest are: on several CPU threads, oneDNN's kernels for that layout do not share the work of fewer
    than 32 channels, and two threads were slower than one (by a tenth) where the plain layout gained a third.
    """
    widths = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    return bool(widths) and (max(widths) >= 32 or device.type != "cpu" or torch.get_num_threads() == 1)
