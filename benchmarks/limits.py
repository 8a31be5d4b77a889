"""The limits of a CPU: the highest rates of multiply-adds in float32 and int8 that oneDNN's convolutions reach.

    python -m benchmarks.limits [--threads 1]

A network takes at least the time of its multiply-adds at this rate, unless an algorithm needs fewer of them. So the rates
tell how far a runtime is from the limit, and their ratio is the largest possible gain of int8.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from architectures.kernels import no_int8_kernels
from metadata.machine import torch_threads

SHAPES = ((256, 1, 56), (512, 1, 28), (256, 3, 14), (128, 3, 28))  # channels, kernel, size: 0.1 to 0.2 G multiply-adds
TURNS, WARMUP = 25, 3


def limits(threads: int = 1) -> dict[str, float]:
    """Return the highest rates over some layers that suit the kernels, in 10^9 multiply-adds a second.

    Returns:
        "float32" and, where there are oneDNN's int8 kernels, "int8": levels in, levels out, nothing quantized on the way.
    """
    found = {"float32": 0.0, "int8": 0.0}
    with torch.inference_mode(), torch_threads(threads):
        for channels, kernel, size in SHAPES:
            macs = channels * channels * (kernel * size) ** 2
            calls = {"float32": _float_convolution(channels, kernel, size)}
            if not no_int8_kernels():
                calls["int8"] = _int8_convolution(channels, kernel, size)
            for dtype, seconds in _medians(calls).items():
                found[dtype] = max(found[dtype], macs / seconds / 1e9)
    return {dtype: round(rate, 1) for dtype, rate in found.items() if rate}


def _medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the seconds of each, interleaved."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-WARMUP, TURNS):
        for name, call in calls.items():
            start = time.perf_counter_ns()
            call()
            if turn >= 0:
                taken[name].append((time.perf_counter_ns() - start) / 1e9)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _float_convolution(channels: int, kernel: int, size: int) -> Callable[[], object]:
    image = torch.randn(1, channels, size, size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, kernel, kernel).contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(image, weight, padding=kernel // 2)


def _int8_convolution(channels: int, kernel: int, size: int) -> Callable[[], object]:
    ops, one, padding = torch.ops.onednn, [1, 1], [kernel // 2] * 2
    levels = torch.randint(0, 256, (1, channels, size, size), dtype=torch.uint8).contiguous(
        memory_format=torch.channels_last)
    weight = torch.randint(-127, 128, (channels, channels, kernel, kernel), dtype=torch.int8)
    scale, zeros = torch.full((channels,), 1e-4), torch.zeros(channels, dtype=torch.int32)
    packed = ops.qconv_prepack(weight, scale, 1.0, 0, one, padding, one, 1, list(levels.shape))
    return lambda: ops.qconv2d_pointwise(levels, 1.0, 0, packed, scale, zeros, None, one, padding, one, 1, 1.0, 128,
                                         torch.uint8, "none", [], "")


def main() -> int:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    rates = limits(parser.parse_args().threads)
    for dtype, rate in rates.items():
        print(f"{dtype:8} {rate:8.1f} G multiply-adds a second, {rate / rates['float32']:.2f} of float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
