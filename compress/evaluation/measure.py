"""Accuracy in batches and latency on a fixed input, as the pipeline's ledger measures them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from compress.evaluation.runtimes import EvaluationSettings
from loaders.images import normalize
from metadata.errors import VerificationError
from metadata.machine import torch_threads
from metadata.schemas import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]  # called with the number of items done and their total


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Counts, and the predicted class of every image in order."""

    correct: int
    total: int
    predictions: list[int]

    @property
    def fraction(self) -> float:
        return self.correct / self.total if self.total else 0.0


def measure_accuracy(model: Callable[[Tensor], Tensor], batches: Iterator[tuple[Tensor, Tensor]],
                     preprocessing: Preprocessing, total: int, progress: Progress | None = None) -> Accuracy:
    """Classify uint8 batches with the model and count the correct answers.

    Args:
        model: (N, C, H, W) float32 -> (N, classes) logits. A module runs on the device of its tensors.
        batches: (N, C, H, W) uint8 images and (N,) labels.
        preprocessing: how images become the model's input.
        total: the number of images, for `progress`.
        progress: called with the number of images done and their total.

    Raises:
        VerificationError: the model's output is not (N, classes), or not finite.
    """
    import torch
    device = next(iter(model.state_dict().values())).device if isinstance(model, torch.nn.Module) else torch.device("cpu")
    correct, predictions = 0, []
    with torch.inference_mode():
        for images, labels in batches:
            logits = model(normalize(images.to(device), preprocessing))
            if logits.dim() != 2 or len(logits) != len(labels) or not bool(torch.isfinite(logits).all()):
                raise VerificationError(f"the model's output for {len(labels)} images is {list(logits.shape)}, "
                                        "expected finite logits (N, classes)")
            predicted = logits.argmax(1).cpu()
            correct += int((predicted == labels.cpu()).sum())
            predictions += predicted.tolist()
            if progress:
                progress(len(predictions), total)
    return Accuracy(correct, len(predictions), predictions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds a call at batch 1; percentiles by linear interpolation over `runs` timed calls."""

    mean_ms: float
    median_ms: float
    p5_ms: float
    p95_ms: float
    runs: int
    warmup: int
    threads: int


def measure_latency(model: Callable[[Tensor], Tensor], input_shape: Sequence[int], runs: int = EvaluationSettings.runs,
                    warmup: int = EvaluationSettings.warmup, threads: int = 1) -> Latency:
    """Time the model on the CPU at batch 1, on a fixed random input (C, H, W), one call after another."""
    import torch
    image = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0))
    durations = []
    with torch.inference_mode(), torch_threads(threads):
        for run in range(warmup + runs):
            start = time.perf_counter_ns()
            model(image)
            if run >= warmup:
                durations.append((time.perf_counter_ns() - start) / 1e6)
    p5, median, p95 = np.percentile(durations, [5, 50, 95])
    return Latency(mean_ms=float(np.mean(durations)), median_ms=float(median), p5_ms=float(p5), p95_ms=float(p95),
                   runs=runs, warmup=warmup, threads=threads)
