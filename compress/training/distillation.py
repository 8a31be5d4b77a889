"""Teacher outputs, live or cached once, for distillation.

The cache is keyed by augmentation view and sample id. A cache that is matched by order of arrival to a shuffled loader
hands out soft targets of other images without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.training.assessment import precision
from compress.training.loop import Data, Loss
from compress.training.losses import distillation_loss
from compress.training.mixup import Batch
from compress.training.trackers import Tracker
from loaders.arrays import prefetched
from loaders.images import normalize
from metadata.formats import write_tensors

Targets = Callable[[Batch], Tensor]  # batch -> (N, C) teacher logits


def live_targets(teacher: nn.Module, autocast: torch.dtype | None) -> Targets:
    """The teacher looks at each batch as the student does."""
    teacher.eval()

    def targets(batch: Batch) -> Tensor:
        with torch.no_grad(), precision(autocast, batch.images.device):
            logits: Tensor = teacher(batch.images)
        return logits.float()

    return targets


@dataclass(frozen=True)
class CachedTargets:
    """Teacher logits by (view, sample id).

    Args:
        logits: (views, samples, C) float16.
    """

    logits: Tensor

    def __call__(self, batch: Batch) -> Tensor:
        return self.logits[batch.view, batch.ids].float()


def cached_targets(teacher: nn.Module, data: Data, views: int, path: Path,
                   autocast: torch.dtype | None, device: torch.device, tracker: Tracker,
                   batch_size: int = 256) -> CachedTargets:
    """Runs the teacher over every view of every training image once, or reads the file of an earlier sitting.

    Args:
        teacher: (N, C, H, W) -> (N, classes), on the device.
        data: what the student will train on, with the same augmenter.
        views: how many augmentations of each sample.
        path: the cache; belongs to one stage folder, so to one teacher, data set and seed.
        autocast: run the teacher in this type.
        device: where the cache is kept.
        tracker: shows progress.
        batch_size: images a pass.
    """
    if path.is_file():
        return CachedTargets(torch.load(path, map_location=device, weights_only=True))
    teacher.eval()
    samples = len(data.train)
    cache: Tensor | None = None
    with tracker.progress("teacher outputs") as advance, torch.no_grad():
        for view in range(views):
            for ids, images in prefetched(data.train.images, torch.arange(samples).split(batch_size)):
                inputs = normalize(data.augmenter(images.to(device), ids, view), data.preprocessing)
                with precision(autocast, device):
                    logits = teacher(inputs)
                if cache is None:
                    cache = torch.empty(views, samples, logits.shape[1], dtype=torch.float16)
                cache[view, ids] = logits.to("cpu", torch.float16)
                advance(view * samples + int(ids[-1]) + 1, views * samples)
    assert cache is not None
    write_tensors(path, cache)
    return CachedTargets(cache.to(device))


def distill(targets: Targets, temperature: float, alpha: float, label_smoothing: float) -> Loss:
    """The loss function of a training that listens to a teacher."""
    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.images)
        return distillation_loss(logits, targets(batch), batch.labels, temperature, alpha, label_smoothing), logits
    return loss


def cross_entropy(label_smoothing: float) -> Loss:
    """The loss function of a training on labels alone."""
    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.images)
        value = nn.functional.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)
        if batch.other_labels is not None:
            other = nn.functional.cross_entropy(logits, batch.other_labels, label_smoothing=label_smoothing)
            value = batch.share * value + (1 - batch.share) * other
        return value, logits
    return loss
