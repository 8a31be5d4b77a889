"""Loss, accuracy and interleaved latency of models."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.evaluation.measure import measure_latency
from compress.training.precision import autocast
from loaders.images import normalize
from loaders.splits import Split
from metadata.schemas import Preprocessing

ROUNDS, RUNS = 5, 26  # of an interleaved comparison


@dataclass(frozen=True)
class Assessment:
    """How a model does on a split."""

    loss: float  # mean cross-entropy
    correct: int
    images: int

    @property
    def accuracy(self) -> float:
        """Share of the images that are classified correctly."""
        return self.correct / self.images


def learned_parameters(model: nn.Module) -> int:
    """Return the number of parameters, without batch norm statistics and other buffers."""
    return sum(parameter.numel() for parameter in model.parameters())


def assess(model: nn.Module, split: Split, preprocessing: Preprocessing, dtype: torch.dtype | None = None,
           batch_size: int = 250) -> Assessment:
    """Measure a model in eval mode on every image of a split, and restore the model's mode.

    Args:
        model: (N, C, H, W) -> (N, classes).
        split: one image or more.
        preprocessing: of the images.
        dtype: type to compute in, None for float32.
        batch_size: images per pass.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    loss, correct = torch.zeros((), device=device, dtype=torch.float64), torch.zeros((), device=device, dtype=torch.int64)
    with torch.inference_mode(), autocast(dtype, device):
        for images, labels in split.batches(batch_size):
            labels = labels.to(device)
            logits = model(normalize(images.to(device), preprocessing)).float()
            loss += F.cross_entropy(logits, labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
    model.train(training)
    return Assessment(float(loss) / len(split), int(correct), len(split))


def accuracy_of(model: nn.Module, split: Split, preprocessing: Preprocessing) -> float:
    """Return the share of a split that the model classifies correctly, in eval mode."""
    return assess(model, split, preprocessing).accuracy


def interleaved_times(answers: Sequence[Callable[[Tensor], Tensor]], input_shape: tuple[int, int, int]) -> list[float]:
    """Return the milliseconds of each model at batch 1 on one CPU thread, interleaved so that a slow moment hits all.

    Each round gives the median of its runs; the result is the median over the rounds.
    """
    taken = [[measure_latency(answer, input_shape, runs=RUNS).median_ms for answer in answers] for _ in range(ROUNDS)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]
