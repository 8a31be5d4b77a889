"""Calibration: histograms of a float ONNX network's tensors, and the ranges that int8 should cover.

Calibration takes two passes over the images and keeps one histogram for each tensor, so that memory does not grow with the
number of images. Every method of choosing ranges works on the same histograms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from architectures.onnx_files import may_saturate
from architectures.onnx_sessions import onnxruntime_options
from metadata.errors import UserError

BINS = 2048
MEMORY_BYTES = 256 * 2**20
PERCENTILE = 0.9999  # share of the values below the upper end, and above the lower end
LEVELS = 256
CLIPPED = np.linspace(0.1, 1, 91)  # shares of the full range that "mse" and "entropy" try

Array = NDArray[np.float64]
Images = NDArray[np.float32]
Method = Literal["min-max", "percentile", "mse", "entropy"]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """One tensor's values over all images.

    Args:
        low, high: the minimum and the maximum.
        counts: number of values in each of BINS bins of equal width between them, (BINS,).
        channel_means: mean over images and positions, (C,).
        shape: of the tensor for one image, without the batch.
    """

    low: float
    high: float
    counts: Array
    channel_means: Array
    shape: tuple[int, ...]


def session(model: onnx.ModelProto, threads: int) -> Any:
    """Load a model on ONNX Runtime's CPU provider."""
    return onnxruntime.InferenceSession(model.SerializeToString(), onnxruntime_options(
        threads, may_saturate(model.graph)), ["CPUExecutionProvider"])


def watched(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """Return a copy whose outputs are the named tensors."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    del copied.graph.output[:]
    copied.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copied


def histograms(model: onnx.ModelProto, images: Images, threads: int = 1,
               memory_bytes: int = MEMORY_BYTES) -> dict[str, Histogram]:
    """Return the histogram of the input and of every node's float output, by tensor name.

    Args:
        model: float, as `compress.packaging.export.export` writes it.
        images: (N, C, H, W), preprocessed.
        threads: number of ONNX Runtime's threads.
        memory_bytes: bound on the tensors of one call, which sets the batch; at least one image runs at a time.

    Raises:
        UserError: there are no images, or a tensor is not finite on them.
    """
    if not len(images):
        raise UserError("calibration: there are no images")
    names = [name for node in model.graph.node for name in node.output]
    runtime = session(watched(model, names), threads)
    input_name = model.graph.input[0].name

    def passes() -> Iterator[dict[str, Images]]:
        first = runtime.run(None, {input_name: images[:1]})
        chunk = max(1, memory_bytes // sum(tensor.nbytes for tensor in first))
        for start in range(0, len(images), chunk):
            part = images[start:start + chunk]
            found = zip(names, runtime.run(None, {input_name: part}), strict=True)
            yield {input_name: part} | {name: tensor for name, tensor in found if tensor.dtype == np.float32}  # no sizes

    bounds: dict[str, tuple[float, float]] = {}
    sums: dict[str, Array] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for tensors in passes():
        for name, tensor in tensors.items():
            low, high = bounds.get(name, (math.inf, -math.inf))
            least, greatest = float(tensor.min()), float(tensor.max())
            if not math.isfinite(greatest - least):
                raise UserError(f"calibration: tensor {name} holds NaN or infinite values on the calibration images; the "
                                "network or its preprocessing is broken")
            bounds[name] = min(low, least), max(high, greatest)
            own = tensor.reshape(len(tensor), *tensor.shape[1:2], -1).mean(axis=2, dtype=np.float64).sum(axis=0)
            sums[name] = sums.get(name, 0) + own
            shapes[name] = tensor.shape[1:]
    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in bounds}
    for tensors in passes():
        for name, tensor in tensors.items():
            low, high = bounds[name]
            if low < high:
                counts[name] += torch.histc(torch.from_numpy(tensor), BINS, low, high)
            else:
                counts[name][0] += tensor.size
    return {name: Histogram(low=low, high=high, counts=counts[name].numpy(), channel_means=sums[name] / len(images),
                            shape=shapes[name]) for name, (low, high) in bounds.items()}


# -------------------------------------------------------------------------------------------------------- ranges


def range_of(histogram: Histogram, method: Method) -> tuple[float, float]:
    """Return the least and the greatest value that 8 bits should cover; values outside are clipped.

    The range contains 0, because padding must be exact. For a tensor of zeros the range is 0 to 1: a dead ReLU's output
    must not become negative, and (0, 0) has no scale.
    """
    if histogram.low == histogram.high == 0:
        return 0.0, 1.0
    if histogram.low == histogram.high:
        return min(histogram.low, 0.0), max(histogram.high, 0.0)
    low, high = RANGES[method](histogram)
    return min(low, 0.0), max(high, 0.0)


def _centres(histogram: Histogram) -> Array:
    edges = np.linspace(histogram.low, histogram.high, BINS + 1)
    return (edges[:-1] + edges[1:]) / 2


def _min_max(histogram: Histogram) -> tuple[float, float]:
    return histogram.low, histogram.high


def _percentile(histogram: Histogram) -> tuple[float, float]:
    """Leave at most 1 - PERCENTILE of the values outside on either side, to the width of a bin."""
    edges = np.linspace(histogram.low, histogram.high, BINS + 1)
    below = np.concatenate([[0.0], np.cumsum(histogram.counts)]) / histogram.counts.sum()
    first = int(np.searchsorted(below, 1 - PERCENTILE, side="right")) - 1
    last = int(np.searchsorted(below, PERCENTILE, side="left"))
    return float(edges[first]), float(edges[last])


def _least_squares(histogram: Histogram) -> tuple[float, float]:
    """Take the share of the range with the least expected squared error: rounding inside, clipping outside.

    Source: Banner et al. 2019, "Post training 4-bit quantization of convolutional networks for rapid-deployment", eq. 1:
    step^2 / 12 for each value inside, the squared distance to the range for each outside.
    """
    centres, counts = _centres(histogram), histogram.counts
    bottom, top = min(histogram.low, 0.0), max(histogram.high, 0.0)

    def error(share: float) -> float:
        low, high = share * bottom, share * top
        distance = np.maximum(np.maximum(low - centres, centres - high), 0)
        rounding = ((high - low) / (LEVELS - 1))**2 / 12
        return float((counts * np.where(distance > 0, distance**2, rounding)).sum())

    share = min(CLIPPED, key=error)
    return share * bottom, share * top


def _entropy(histogram: Histogram) -> tuple[float, float]:
    """Take the share of the range with the least Kullback-Leibler divergence of the quantized from the true distribution.

    Source: Migacz 2017, "8-bit inference with TensorRT": the reference distribution counts values outside the range to the
    last level inside; a level's count is spread evenly over its bins that are not empty.
    """
    centres, counts = _centres(histogram), histogram.counts.copy()
    bottom, top = min(histogram.low, 0.0), max(histogram.high, 0.0)
    # A ReLU's many zeros are exact in any range. Spread over a level, they would outweigh all other values.
    zero = int(np.abs(centres).argmin())
    counts[zero] = np.mean([counts[index] for index in (zero - 1, zero + 1) if 0 <= index < BINS])

    def divergence(share: float) -> float:
        low, high = share * bottom, share * top
        inside = (centres >= low) & (centres <= high)
        if inside.sum() < LEVELS:  # fewer bins than levels: there is nothing to compare
            return math.inf
        own = counts[inside]
        reference = own.copy()
        reference[0] += counts[centres < low].sum()
        reference[-1] += counts[centres > high].sum()
        level = np.round((centres[inside] - low) / ((high - low) / (LEVELS - 1))).astype(int)
        filled = own > 0
        share_of_level = np.bincount(level, own, LEVELS) / np.maximum(np.bincount(level, filled, LEVELS), 1)
        spread = np.where(filled, share_of_level[level], 0.0)
        both = (reference > 0) & (spread > 0)
        if not both.any():
            return math.inf
        p, q = reference / reference.sum(), spread / spread.sum()
        lost = float(p[~both].sum())  # mass where the grid has none; smoothed, so that the divergence stays finite
        return float((p[both] * np.log(p[both] / q[both])).sum()) + lost * math.log(1e6)

    share = min(reversed(CLIPPED), key=divergence)
    return share * bottom, share * top


RANGES: dict[Method, Callable[[Histogram], tuple[float, float]]] = {
    "min-max": _min_max, "percentile": _percentile, "mse": _least_squares, "entropy": _entropy}
