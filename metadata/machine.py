"""The machine: its CPU, cores and memory, the versions in use, and limits on what a model may take."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from metadata.errors import VerificationError


@contextlib.contextmanager
def memory_limit(megabytes: int) -> Iterator[None]:
    """Inside, this process cannot get more than that much further address space (where the system can tell and limit).

    Raises:
        VerificationError: what runs inside needs more.
    """
    try:
        import resource
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + megabytes * 2**20
    if before[1] != resource.RLIM_INFINITY:
        limit = min(limit, before[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    except (MemoryError, SystemError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise
        raise VerificationError(f"the submission needs more than --memory_limit_mb {megabytes}") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Torch's intra-op thread count inside; put back afterwards."""
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PeakMemory:
    """The most resident memory that this process takes from now on; unknown outside Linux."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        self.before_mb = status_mb("self", "VmRSS")

    def details(self) -> dict[str, float | None]:
        """In units of 2^20 bytes."""
        peak = status_mb("self", "VmHWM")
        return {"evaluator_mb": peak, "above_start_mb": peak - self.before_mb if peak and self.before_mb else None}


def status_mb(process: int | str, key: str) -> float | None:
    """A memory figure of a process in units of 2^20 bytes, from /proc."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":")), None)


def machine() -> dict[str, Any]:
    """The CPU's model, the instruction sets that int8 speed and accuracy hang on, and the number of usable cores."""
    model, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    except OSError:
        pass  # not Linux: the model is what the platform module knows, the flags stay unknown
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
    return {"cpu": model, "flags": [flag for flag in wanted if flag in flags], "cores": usable_cores()}


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of what decides a measurement."""
    import torch
    used: dict[str, str] = {name: sys.modules[name].__version__ for name in ("onnx", "onnxruntime", "openvino")
                            if name in sys.modules}
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, **used}
