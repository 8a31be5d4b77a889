"""A training batch and the loss function that takes it; mixup, and batches in parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images with their labels. With mixup, each image is `share` of one image and the rest of another."""

    images: Tensor  # (N, C, H, W) float32, augmented and normalized
    labels: Tensor  # (N,) int64
    ids: Tensor  # (N,) int64, indices into the training split
    view: int | Tensor  # number of the augmentation; (1,) int64 in a captured step, see compress/training/cuda.py
    other_labels: Tensor | None = None  # (N,) int64, of the images that are mixed in
    share: float = 1.0

    def correct(self, logits: Tensor) -> Tensor:
        """Return how many of (N, classes) logits predict the label; each label of a mixed image counts by its share."""
        predicted = logits.argmax(1)
        count = (predicted == self.labels).sum()
        if self.other_labels is None:
            return count
        return self.share * count + (1 - self.share) * (predicted == self.other_labels).sum()


Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]  # -> mean loss, (N, classes) logits


def mixed(batch: Batch, alpha: float) -> Batch:
    """Mix each image with another of the batch, in one proportion for all. Source: Zhang et al. 2018, mixup, eq. 1.

    The proportion comes from torch's global generator, the pairs from that of the batch's device.
    """
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    other = torch.randperm(len(batch.labels), device=batch.labels.device)
    return replace(batch, images=torch.lerp(batch.images[other], batch.images, share), other_labels=batch.labels[other],
                   share=share)


def parts(batch: Batch, count: int) -> list[Batch]:
    """Split a batch into `count` parts whose sizes differ by one image at most."""
    images = len(batch.labels)
    return cut(batch, [images // count + (index < images % count) for index in range(count)])


def cut(batch: Batch, sizes: list[int]) -> list[Batch]:
    """Split a batch into parts of the given sizes, which are views."""
    if len(sizes) == 1:
        return [batch]
    others = batch.other_labels.split(sizes) if batch.other_labels is not None else [None] * len(sizes)
    return [replace(batch, images=images, labels=labels, ids=ids, other_labels=other) for images, labels, ids, other in zip(
        batch.images.split(sizes), batch.labels.split(sizes), batch.ids.split(sizes), others, strict=True)]
