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
    view: int  # number of the augmentation
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

    The proportion and the pairs come from torch's global generator.
    """
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    other = torch.randperm(len(batch.labels)).to(batch.labels.device)
    return replace(batch, images=torch.lerp(batch.images[other], batch.images, share), other_labels=batch.labels[other],
                   share=share)


def parts(batch: Batch, count: int) -> list[Batch]:
    """Split a batch into `count` parts whose sizes differ by one image at most."""
    if count == 1:
        return [batch]
    others = batch.other_labels.tensor_split(count) if batch.other_labels is not None else [None] * count
    return [replace(batch, images=images, labels=labels, ids=ids, other_labels=other) for images, labels, ids, other in zip(
        batch.images.tensor_split(count), batch.labels.tensor_split(count), batch.ids.tensor_split(count), others,
        strict=True)]
