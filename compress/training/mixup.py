"""What a loss function gets: a batch of images with their labels, whole, mixed or in parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What a loss function gets. With mixup, each image is `share` of one image and the rest of another."""

    images: Tensor  # (N, C, H, W) float32, augmented and normalised
    labels: Tensor  # (N,) int64
    ids: Tensor  # (N,) int64, indices into the training split
    view: int  # which augmentation of each sample this is
    other_labels: Tensor | None = None  # (N,) int64, of what is mixed in
    share: float = 1.0

    def right(self, logits: Tensor) -> Tensor:
        """How many of (N, classes) logits name the label; of mixed images, the share of them that each label has."""
        named = logits.argmax(1)
        count = (named == self.labels).sum()
        if self.other_labels is None:
            return count
        return self.share * count + (1 - self.share) * (named == self.other_labels).sum()


def mixed(batch: Batch, alpha: float) -> Batch:
    """Each image with another of the batch, in one proportion for all. Source: Zhang et al. 2018, mixup, eq. 1.

    Draws from torch's global generator.
    """
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    other = torch.randperm(len(batch.labels)).to(batch.labels.device)
    return Batch(torch.lerp(batch.images[other], batch.images, share), batch.labels, batch.ids, batch.view,
                 batch.labels[other], share)


def parts(batch: Batch, count: int) -> list[Batch]:
    """A batch in `count` parts that differ by one image at most."""
    if count == 1:
        return [batch]
    others = batch.other_labels.tensor_split(count) if batch.other_labels is not None else [None] * count
    return [Batch(images, labels, ids, batch.view, other, batch.share) for images, labels, ids, other in zip(
        batch.images.tensor_split(count), batch.labels.tensor_split(count), batch.ids.tensor_split(count), others,
        strict=True)]
