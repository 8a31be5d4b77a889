"""Portability: verify that a static int8 ONNX file keeps its accuracy on CPUs without VNNI, whose 16-bit sums saturate.

Where no pair of weights can saturate, the file's integer sums are the same on every CPU: that is proof enough. Else the
sums are emulated; the logits are those of such a CPU but for its rounding, see compress/quantization/saturation.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from compress.quantization.calibration import session
from compress.quantization.saturation import Backend, saturating
from metadata.errors import UserError, first_line
from metadata.machine import machine

Array = NDArray[Any]
Z = 1.6449  # one-sided 95 %


def _answers(model: onnx.ModelProto, images: Array, threads: int, batch: int) -> Array:
    """Return logits, (N, classes), computed with exact int8 arithmetic on every CPU."""
    runtime = session(model, threads)
    name = runtime.get_inputs()[0].name
    return np.concatenate([runtime.run(None, {name: images[start:start + batch]})[0]
                           for start in range(0, len(images), batch)])


def drop_bound(lost: int, gained: int, images: int, sign: int = 1) -> float:
    """Return the upper bound of the accuracy drop from paired answers, one-sided 95 %; with sign -1 the lower bound.

    Source: Tango 1998, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17: the score interval, which holds for few changes and for none.

    Args:
        lost: number of images that only the exact arithmetic classifies correctly.
        gained: number of images that only the saturating arithmetic classifies correctly.
        images: number of all images.
    """
    if sign < 0:
        return -drop_bound(gained, lost, images)

    def statistic(drop: float) -> float:
        middle = (2 * images - lost + gained) * drop - lost - gained
        root = math.sqrt(max(middle**2 + 8 * images * gained * drop * (1 - drop), 0.0))
        variance = images * ((root - middle) / (2 * images) + drop * (1 - drop))
        return (lost - gained - images * drop) / math.sqrt(variance) if variance > 0 else -math.inf

    low, high = (lost - gained) / images, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if statistic(middle) > -Z else (low, middle)
    return high


def _verdict(lost: int, gained: int, images: int, tolerated: float) -> tuple[str, bool, bool]:
    """Return a sentence, whether the accuracy holds, and whether the images are enough to tell."""
    drop, most = (lost - gained) / images, drop_bound(lost, gained, images)
    said = f"{'loses' if drop >= 0 else 'gains'} {abs(drop):.2%} on {images} images"
    if most <= tolerated:
        return f"holds: {said}, and at most {most:.2%} of accuracy at 95 % confidence", True, True
    if drop_bound(lost, gained, images, -1) > tolerated:
        return f"does not hold: {said}, more than the tolerated {tolerated:.2%}", False, True
    needed = images
    while drop < tolerated < drop_bound(lost * needed // images, gained * needed // images, needed):
        needed += needed // 10 + 1
    more = f"; about {needed} images would tell" if needed > images else ""
    return (f"not shown to hold: {said}, which leaves up to {most:.2%} possible, and {tolerated:.2%} is tolerated{more}",
            False, False)


def verify_portability(content: bytes, images: Array | torch.Tensor, labels: Sequence[int] | Array | torch.Tensor,
                       tolerated_drop: float = 0.003, backend: Backend = "onnxruntime", threads: int = 1,
                       batch: int = 8) -> dict[str, Any]:
    """Verify that a static int8 file keeps its accuracy on a CPU without VNNI, by proof or by emulation on a sample.

    Args:
        content: the ONNX file, in QDQ form, with a free batch dimension.
        images: the sample, (N, C, H, W) float32, preprocessed.
        labels: their classes, (N,).
        tolerated_drop: of accuracy, a fraction.
        backend: the runtime whose kernels to emulate, see `saturating`; ONNX Runtime runs the emulation in either case.
        threads: of the emulation.
        batch: of the emulation; its memory grows with the batch.

    Returns:
        "verdict" in words, "holds" (also false if the sample is too small to tell), "conclusive", "method",
        "layers_that_can_saturate" (pairs by layer) and "machine"; after an emulation "images", "accuracy" and
        "accuracy_saturating" (fractions), "changed_predictions", "drop_at_most" (one-sided 95 %).

    Raises:
        UserError: images and labels do not match, or `saturating` does not cover the file.
    """
    try:
        model = onnx.ModelProto.FromString(content)
    except (DecodeError, TypeError) as error:
        raise UserError(f"portability: not an ONNX file: {first_line(error)}") from error
    emulated, counts = saturating(model, backend)
    some = {name: count for name, count in counts.items() if count}
    found: dict[str, Any] = {"layers_that_can_saturate": some, "machine": machine()}
    if not some:
        return {"verdict": f"holds: no sum of two products can exceed 16 bits in any of the {len(counts)} int8 layers",
                "holds": True, "conclusive": True, "method": "no pair of products can exceed 16 bits", **found}
    images, labels = np.asarray(images, np.float32), np.asarray(labels)
    if not len(images) or labels.shape != (len(images),):
        raise UserError(f"portability: expected images with one label each, got {len(images)} images and labels of shape "
                        f"{labels.shape}")
    exact, other = (_answers(graph, images, threads, batch).argmax(1) for graph in (model, emulated))
    lost, gained = int(((exact == labels) & (other != labels)).sum()), int(((exact != labels) & (other == labels)).sum())
    verdict, holds, conclusive = _verdict(lost, gained, len(images), tolerated_drop)
    return {"verdict": verdict, "holds": holds, "conclusive": conclusive, "method": f"emulated on {len(images)} images",
            **found, "images": len(images), "accuracy": float((exact == labels).mean()),
            "accuracy_saturating": float((other == labels).mean()), "changed_predictions": int((exact != other).sum()),
            "drop_at_most": drop_bound(lost, gained, len(images))}
