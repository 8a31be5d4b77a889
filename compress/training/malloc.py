"""glibc's allocator in training: freed memory is kept for the next step."""

from __future__ import annotations

import ctypes
import sys

# From glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep freed memory; return whether the allocator accepted that.

    By default each tensor above 128 kB to 32 MB is mapped anew by the kernel, page by page and zeroed, in every step of a
    training: a tenth to a third of a step's time on the machine of `benchmarks/results/training_speed.json`. Peak memory
    does not change; the process only keeps it between the peaks.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return all(mallopt(option, value) for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1),
                                                            (M_TOP_PAD, 64 << 20)))
