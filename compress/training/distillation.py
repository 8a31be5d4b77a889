"""The loss functions of a training: on labels alone, or with a teacher whose outputs are computed live or cached once.

The cache is keyed by augmentation view and sample id. A cache keyed by order of arrival would silently give a shuffled
loader the soft targets of other images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.training.data import Data
from compress.training.mixup import Batch, Loss
from compress.training.precision import autocast
from compress.training.trackers import Tracker
from loaders.arrays import prefetched
from loaders.images import normalize
from metadata.formats import write_tensors

Targets = Callable[[Batch], Tensor]  # batch -> (N, C) teacher logits


def live_targets(teacher: nn.Module, dtype: torch.dtype | None) -> Targets:
    """Return targets that the teacher computes from each batch, in a type (None for float32)."""
    teacher.eval()

    def targets(batch: Batch) -> Tensor:
        with torch.no_grad(), autocast(dtype, batch.images.device):
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


def cached_targets(teacher: nn.Module, data: Data, views: int, path: Path, dtype: torch.dtype | None,
                   device: torch.device, tracker: Tracker, batch_size: int = 256) -> CachedTargets:
    """Run the teacher over every view of every training image once, or read the file of an earlier sitting.

    Args:
        teacher: (N, C, H, W) -> (N, classes), on the device.
        data: what the student will train on, with the same augmenter.
        views: number of augmentations of each sample.
        path: the cache; belongs to one stage folder, so to one teacher, data set and seed.
        dtype: type to run the teacher in, None for float32.
        device: where the cache is kept.
        tracker: shows progress.
        batch_size: images per pass.
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
                with autocast(dtype, device):
                    logits = teacher(inputs)
                if cache is None:
                    cache = torch.empty(views, samples, logits.shape[1], dtype=torch.float16)
                cache[view, ids] = logits.to("cpu", torch.float16)
                advance(view * samples + int(ids[-1]) + 1, views * samples)
    assert cache is not None
    write_tensors(path, cache)
    return CachedTargets(cache.to(device))


def distill(targets: Targets, temperature: float, alpha: float, label_smoothing: float) -> Loss:
    """Return the loss function of a training with a teacher; see `distillation_loss`."""
    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.images)
        soft = targets(batch)
        return _of_both_labels(batch, lambda labels: distillation_loss(
            logits, soft, labels, temperature=temperature, alpha=alpha, label_smoothing=label_smoothing)), logits
    return loss


def cross_entropy(label_smoothing: float) -> Loss:
    """Return the loss function of a training on labels alone."""
    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.images)
        return _of_both_labels(batch, lambda labels: F.cross_entropy(
            logits, labels, label_smoothing=label_smoothing)), logits
    return loss


def _of_both_labels(batch: Batch, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the loss on the batch's labels; of mixed images, on each label by its share."""
    value = loss(batch.labels)
    if batch.other_labels is None:
        return value
    return batch.share * value + (1 - batch.share) * loss(batch.other_labels)


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, alpha: float,
                      label_smoothing: float = 0.0) -> Tensor:
    """Return alpha T^2 KL(teacher || student) at temperature T, plus (1 - alpha) cross-entropy with the labels.

    The divergence is a mean over the batch of a sum over classes; torch's default reduction would be C times weaker.
    T^2 keeps the gradients of the soft part at the size of the hard part's.
    Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Args:
        student: (N, C) logits.
        teacher: (N, C) logits.
        labels: (N,) int64.
        temperature: T > 0.
        alpha: weight of the soft part in [0, 1].
        label_smoothing: of the cross-entropy.
    """
    soft = F.kl_div(F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1),
                    reduction="batchmean", log_target=True) * temperature**2
    hard = F.cross_entropy(student, labels, label_smoothing=label_smoothing)
    return alpha * soft + (1 - alpha) * hard
