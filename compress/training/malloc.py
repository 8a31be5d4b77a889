"""glibc's allocator in training: what was freed is kept for the next step."""

from __future__ import annotations

import ctypes
import sys

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
