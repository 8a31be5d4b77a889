"""The teacher's part of a distillation: its logits for a batch, live or cached once, of one teacher or of several.

The cache is keyed by augmentation view and sample id. A cache keyed by order of arrival would silently give a shuffled
loader the soft targets of other images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.training.data import Data
from compress.training.mixup import Batch
from compress.training.precision import autocast
from compress.training.trackers import Tracker
from loaders.arrays import prefetched
from loaders.images import normalize
from metadata.formats import write_tensors

Targets = Callable[[Batch], Tensor]  # batch -> (N, C) teacher logits


def mean_of_teachers(teachers: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """Return a function of images that gives the mean of the teachers' logits. Source: Hinton et al. 2015, section 2."""
    for teacher in teachers:
        teacher.eval()
    return lambda images: torch.stack([teacher(images).float() for teacher in teachers]).mean(0)


def live_targets(teachers: Sequence[nn.Module], dtype: torch.dtype | None) -> Targets:
    """Return targets that the teachers compute from each batch, in a type (None for float32).

    Of mixed images, they are what the teachers say of the mixture. Source: Beyer et al. 2022, "Knowledge distillation: A
    good teacher is patient and consistent", section 3.1.
    """
    answer = mean_of_teachers(teachers)

    def targets(batch: Batch) -> Tensor:
        with torch.no_grad(), autocast(dtype, batch.images.device):
            return answer(batch.images)

    return targets


@dataclass(frozen=True)
class CachedTargets:
    """Teacher logits by (view, sample id). Of mixed images, the teacher's probabilities are mixed as the images are.

    Args:
        logits: (views, samples, C) float16.
    """

    logits: Tensor

    def __call__(self, batch: Batch) -> Tensor:
        logits = self.logits[batch.view, batch.ids].float()
        if batch.other_ids is None:
            return logits
        others = self.logits[batch.view, batch.other_ids].float()
        mixture = batch.share * logits.softmax(1) + (1 - batch.share) * others.softmax(1)
        return mixture.clamp_min(torch.finfo(torch.float32).tiny).log()


def cached_targets(teachers: Sequence[nn.Module], data: Data, views: int, path: Path, dtype: torch.dtype | None,
                   device: torch.device, tracker: Tracker, batch_size: int = 256) -> CachedTargets:
    """Run the teachers over every view of every training image once, or read the file of an earlier sitting.

    Args:
        teachers: each (N, C, H, W) -> (N, classes), on the device.
        data: what the student will train on, with the same augmenter.
        views: number of augmentations of each sample.
        path: the cache; belongs to one stage folder, so to one set of teachers, data set and seed.
        dtype: type to run the teachers in, None for float32.
        device: where the cache is kept.
        tracker: shows progress.
        batch_size: images per pass.
    """
    if path.is_file():
        return CachedTargets(torch.load(path, map_location=device, weights_only=True))
    answer = mean_of_teachers(teachers)
    samples = len(data.train)
    cache: Tensor | None = None
    with tracker.progress("teacher outputs") as advance, torch.no_grad():
        for view in range(views):
            for ids, images in prefetched(data.train.images, torch.arange(samples).split(batch_size)):
                inputs = normalize(data.augmenter(images.to(device), ids, view), data.preprocessing)
                with autocast(dtype, device):
                    logits = answer(inputs)
                if cache is None:
                    cache = torch.empty(views, samples, logits.shape[1], dtype=torch.float16)
                cache[view, ids] = logits.to("cpu", torch.float16)
                advance(view * samples + int(ids[-1]) + 1, views * samples)
    assert cache is not None
    write_tensors(path, cache)
    return CachedTargets(cache.to(device))
