"""Describe the machine and the versions in use; set threads."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Set torch's intra-op thread count inside the block, and restore the old count after it."""
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PeakMemory:
    """The peak of this process's resident memory from now on. Unknown outside Linux."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        self.before_mb = status_mb("self", "VmRSS")

    def details(self) -> dict[str, float | None]:
        """Return the peak, and the peak above the start, in units of 2^20 bytes."""
        peak = status_mb("self", "VmHWM")
        return {"evaluator_mb": peak, "above_start_mb": peak - self.before_mb if peak and self.before_mb else None}


def status_mb(process: int | str, key: str) -> float | None:
    """Return a memory figure of a process from /proc, in units of 2^20 bytes, or None outside Linux."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(errors="replace").splitlines()  # a name may be of any bytes
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":")), None)


def memory_bytes() -> int:
    """Return the bytes of this machine's memory; a number beyond all memories where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize


def stat_fields(process: int | str) -> list[bytes]:
    """Return the fields of a process's /proc/PID/stat that follow its name: its state comes first, then its parent's id.

    Raises:
        OSError: the process has ended, or the system has no /proc.
    """
    return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()  # a name may be of any bytes, ")" too


def machine(driver: Path = Path("/proc/driver/nvidia")) -> dict[str, Any]:
    """Return the CPU's model, the instruction sets that int8 depends on, the usable cores, and NVIDIA's GPUs if any.

    Args:
        driver: where the driver of NVIDIA's GPUs tells of itself.
    """
    model, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    except OSError:
        pass  # not Linux: the model comes from the platform module, the flags stay unknown
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
    return {"cpu": model, "flags": [flag for flag in wanted if flag in flags], "cores": usable_cores(),
            **accelerators(driver)}


def accelerators(driver: Path) -> dict[str, Any]:
    """Return the GPUs, their driver and CUDA's version, or nothing where there is no GPU.

    A process that uses CUDA asks torch, and learns the memory too. Another one reads the driver's files: asking torch would
    import it, or start CUDA, which takes seconds and memory that an evaluation on the CPU must not pay.
    """
    torch = sys.modules.get("torch")
    found: list[dict[str, Any]] = []
    if torch is not None and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            found.append({"name": card.name, "memory_mb": card.total_memory // 2**20})
    else:
        for path in sorted(driver.glob("gpus/*/information")):
            with contextlib.suppress(OSError):
                found += [{"name": line.partition(":")[2].strip()} for line in path.read_text().splitlines()
                          if line.startswith("Model:")]
    if not found:
        return {}
    told: dict[str, Any] = {"accelerators": found}
    with contextlib.suppress(OSError):
        if version := re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]+)", (driver / "version").read_text()):
            told["driver"] = version[1]
    if torch is not None and torch.version.cuda:
        told["cuda"] = torch.version.cuda
    return told


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect a measurement."""
    import torch
    runtimes = ("onnx", "onnxruntime", "openvino", "ai_edge_litert")
    used: dict[str, str] = {name: sys.modules[name].__version__ for name in runtimes if name in sys.modules}
    if "executorch.extension.pybindings._C" in sys.modules:  # a package without code of its own
        used["executorch"] = importlib.metadata.version("executorch")
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, **used}
