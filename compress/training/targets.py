"""The teacher's part of a distillation: its logits for a batch, live or cached once, of one teacher or of several.

The cache is keyed by augmentation view and sample id. A cache keyed by order of arrival would silently give a shuffled
loader the soft targets of other images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
NOTHING_LOST = 1e-4  # nats between the softened distributions of all logits and of the largest ones, the mean of a batch


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


@dataclass(frozen=True, kw_only=True)
class TopLogits:
    """The largest logits of each output; the other classes share what is left of the softened distribution.

    Args:
        values: (views, samples, K) float16.
        classes: (views, samples, K) int16 or int32, whose logits they are.
        rest: (views, samples) float16, the logit that each other class gets.
        num_classes: C.
    """

    values: Tensor
    classes: Tensor
    rest: Tensor
    num_classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(views, samples, C) of the logits that it stands for."""
        return *self.rest.shape, self.num_classes

    def __getitem__(self, key: Any) -> Tensor:
        """Return the logits (N, C) of a view and sample ids (N,)."""
        rest = self.rest[key]
        logits = rest[..., None].expand(*rest.shape, self.num_classes).clone()
        return logits.scatter_(-1, self.classes[key].long(), self.values[key])

    def to(self, device: torch.device) -> TopLogits:
        """Return the same on a device."""
        return TopLogits(values=self.values.to(device), classes=self.classes.to(device), rest=self.rest.to(device),
                         num_classes=self.num_classes)


def top_logits(logits: Tensor, count: int, temperature: float) -> TopLogits:
    """Return the `count` largest of each row of (..., C) logits; the others' softened probabilities sum up as before."""
    values, classes = logits.topk(count, -1)
    others = logits.scatter(-1, classes, -math.inf)
    rest = temperature * (torch.logsumexp(others / temperature, -1) - math.log(logits.shape[-1] - count))
    numbers = torch.int16 if logits.shape[-1] <= 2**15 else torch.int32
    return TopLogits(values=values.half(), classes=classes.to(numbers), rest=rest.half(), num_classes=logits.shape[-1])


def enough_logits(logits: Tensor, temperature: float) -> int:
    """Return how many of each output's logits lose nothing at a temperature, a power of two; 0 if none saves bytes.

    Measured by the mean divergence of the softened distributions on (N, C) logits, at most `NOTHING_LOST`.
    """
    classes, count = logits.shape[1], 2
    exact = (logits / temperature).log_softmax(1)
    while 4 * count + 2 < 2 * classes:  # bytes of an output
        kept = (top_logits(logits, count, temperature)[:].float() / temperature).log_softmax(1)
        if float((exact.exp() * (exact - kept)).sum(1).mean()) <= NOTHING_LOST:
            return count
        count *= 2
    return 0


@dataclass(frozen=True)
class CachedTargets:
    """Teacher logits by (view, sample id). Of mixed images, the teacher's probabilities are mixed as the images are.

    Args:
        logits: (views, samples, C) float16, or the largest of them.
    """

    logits: Tensor | TopLogits

    def __call__(self, batch: Batch) -> Tensor:
        logits = self.logits[batch.view, batch.ids].float()
        if batch.other_ids is None:
            return logits
        others = self.logits[batch.view, batch.other_ids].float()
        mixture = batch.share * logits.softmax(1) + (1 - batch.share) * others.softmax(1)
        return mixture.clamp_min(torch.finfo(torch.float32).tiny).log()


def cached_targets(teachers: Sequence[nn.Module], data: Data, views: int, path: Path, dtype: torch.dtype | None,
                   device: torch.device, tracker: Tracker, temperature: float | None = None,
                   batch_size: int = 256) -> CachedTargets:
    """Run the teachers over every view of every training image once, or read the file of an earlier sitting.

    A sitting that is stopped leaves the views that it has finished in a file beside the cache, and the next goes on there.
    Where the largest logits of some images say the same at a temperature, those alone are kept of all.

    Args:
        teachers: each (N, C, H, W) -> (N, classes), on the device.
        data: what the student will train on, with the same augmenter.
        views: number of augmentations of each sample.
        path: the cache; belongs to one stage folder, so to one set of teachers, data set and seed.
        dtype: type to run the teachers in, None for float32.
        device: where the cache is kept.
        tracker: shows progress.
        temperature: at which alone the logits will be used; None keeps all of them.
        batch_size: images per pass.
    """
    if path.is_file():
        found = torch.load(path, map_location=device, weights_only=True)
        return CachedTargets(found if isinstance(found, Tensor) else TopLogits(**found))
    answer = mean_of_teachers(teachers)
    samples, unfinished = len(data.train), path.with_name(f"unfinished-{path.name}")

    def answers(ids: Tensor, images: Tensor, view: int) -> Tensor:
        inputs = normalize(data.augmenter(images.to(device), ids, view), data.preprocessing)
        with torch.no_grad(), autocast(dtype, device):
            return answer(inputs).float()

    cache: dict[str, Any] = {}
    done = kept = 0  # views; logits of each output, 0 for all
    if unfinished.is_file():
        found = torch.load(unfinished, weights_only=True)
        cache, done, kept = found["cache"], found["done"], found["kept"]
    elif temperature is not None:
        some = torch.linspace(0, samples - 1, min(samples, batch_size)).long()  # of all classes, wherever they lie
        kept = enough_logits(answers(some, data.train.images.batch(some), 0), temperature)
    with tracker.progress("teacher outputs") as advance:
        for view in range(done, views):
            for ids, images in prefetched(data.train.images, torch.arange(samples).split(batch_size)):
                logits = answers(ids, images, view)
                parts = {"all": logits} if not kept or temperature is None else vars(top_logits(logits, kept, temperature))
                for name, part in parts.items():
                    if isinstance(part, Tensor):
                        stored = torch.float16 if part.is_floating_point() else part.dtype
                        if name not in cache:
                            cache[name] = torch.zeros(views, samples, *part.shape[1:], dtype=stored)
                        cache[name][view, ids] = part.to("cpu", stored)
                    else:
                        cache[name] = part
                advance(view * samples + int(ids[-1]) + 1, views * samples)
            if view < views - 1:
                write_tensors(unfinished, {"cache": cache, "done": view + 1, "kept": kept})
    content: Tensor | dict[str, Any] = cache.get("all", cache)
    write_tensors(path, content)
    unfinished.unlink(missing_ok=True)
    return CachedTargets((content if isinstance(content, Tensor) else TopLogits(**content)).to(device))
