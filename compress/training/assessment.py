"""How a model does: mean loss and right answers on a split, and milliseconds beside others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.evaluation.measure import measure_latency
from loaders.arrays import Split
from loaders.images import normalize
from metadata.schemas import Preprocessing

ROUNDS, RUNS = 5, 26  # of a comparison in turns


@dataclass(frozen=True)
class Assessment:
    """How a model does on a split."""

    loss: float  # mean cross-entropy
    correct: int
    images: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.images


def learned_parameters(model: nn.Module) -> int:
    """The numbers that training changes: parameters, without batch norms' statistics and other buffers."""
    return sum(parameter.numel() for parameter in model.parameters())


def precision(autocast: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to a type, or nothing."""
    return torch.autocast(device.type, autocast) if autocast else nullcontext()


def assess(model: nn.Module, split: Split, preprocessing: Preprocessing, autocast: torch.dtype | None = None,
           batch_size: int = 250) -> Assessment:
    """Measures a model in eval mode on every image of a split that is not empty; the model's mode is put back."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    loss, correct = torch.zeros((), device=device, dtype=torch.float64), torch.zeros((), device=device, dtype=torch.int64)
    with torch.inference_mode(), precision(autocast, device):
        for images, labels in split.batches(batch_size):
            labels = labels.to(device)
            logits = model(normalize(images.to(device), preprocessing)).float()
            loss += F.cross_entropy(logits, labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
    model.train(training)
    return Assessment(float(loss) / len(split), int(correct), len(split))


def accuracy_of(model: nn.Module, split: Split, preprocessing: Preprocessing) -> float:
    """The share of a split that the model classifies rightly, in eval mode."""
    return assess(model, split, preprocessing).accuracy


def times_in_turns(answers: Sequence[Callable[[Tensor], Tensor]], input_shape: tuple[int, int, int]) -> list[float]:
    """Milliseconds of each model at batch 1 on one CPU thread, in turns, so that a slow moment of the machine hits all.

    Of each turn the median; of a model's turns the median again.
    """
    taken = [[measure_latency(answer, input_shape, runs=RUNS).median_ms for answer in answers] for _ in range(ROUNDS)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]
