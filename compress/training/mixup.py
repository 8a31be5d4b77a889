"""A training batch and the loss function that takes it; mixup and CutMix, and batches in parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images with their labels. With mixup or CutMix, each image is `share` of one image and the rest of another."""

    images: Tensor  # (N, C, H, W) float32, augmented and normalized
    labels: Tensor  # (N,) int64
    ids: Tensor  # (N,) int64, indices into the training split
    view: int | Tensor  # number of the augmentation; (1,) int64 in a captured step, see compress/training/cuda.py
    other_labels: Tensor | None = None  # (N,) int64, of the images that are mixed in
    other_ids: Tensor | None = None  # (N,) int64, of those images
    share: float = 1.0

    def correct(self, logits: Tensor) -> Tensor:
        """Return how many of (N, classes) logits predict the label; each label of a mixed image counts by its share."""
        predicted = logits.argmax(1)
        count = (predicted == self.labels).sum()
        if self.other_labels is None:
            return count
        return self.share * count + (1 - self.share) * (predicted == self.other_labels).sum()


Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]  # -> mean loss, (N, classes) logits


def mixed(batch: Batch, mixup: float, cutmix: float = 0.0) -> Batch:
    """Mix each image with another of the batch, in one proportion for all.

    Proportion and box come from torch's global generator, the pairs from that of the batch's device.

    Args:
        batch: not mixed yet.
        mixup: alpha of the Beta distribution of the proportion; 0: no mixup. Source: Zhang et al. 2018, mixup, eq. 1.
        cutmix: the same for a box of the other image, as high and wide as the rest's root, around any pixel. Source: Yun et
            al. 2019, CutMix, eq. 1 and 2. Where both are given, each batch has one of the two, as likely as the other.
    """
    pastes = bool(cutmix) and (not mixup or bool(torch.rand(()) < 0.5))
    alpha = cutmix if pastes else mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    other = torch.randperm(len(batch.labels), device=batch.labels.device)
    if pastes:
        images = batch.images.clone()
        height, width = images.shape[2:]
        rows, columns = (_side(size, share) for size in (height, width))
        images[:, :, rows, columns] = batch.images[other][:, :, rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    else:
        images = torch.lerp(batch.images[other], batch.images, share)
    return replace(batch, images=images, other_labels=batch.labels[other], other_ids=batch.ids[other], share=share)


def _side(size: int, share: float) -> slice:
    """Return the pixels of one side of a box around any pixel, cut off at the image's edges."""
    reach, centre = round(size * (1 - share)**0.5), int(torch.randint(size, ()))
    return slice(max(0, centre - reach // 2), min(size, centre - reach // 2 + reach))


def parts(batch: Batch, count: int) -> list[Batch]:
    """Split a batch into `count` parts whose sizes differ by one image at most."""
    images = len(batch.labels)
    return cut(batch, [images // count + (index < images % count) for index in range(count)])


def cut(batch: Batch, sizes: list[int]) -> list[Batch]:
    """Split a batch into parts of the given sizes, which are views."""
    if len(sizes) == 1:
        return [batch]
    others = [part.split(sizes) if part is not None else [None] * len(sizes)
              for part in (batch.other_labels, batch.other_ids)]
    return [replace(batch, images=images, labels=labels, ids=ids, other_labels=other, other_ids=other_ids)
            for images, labels, ids, other, other_ids in zip(
                batch.images.split(sizes), batch.labels.split(sizes), batch.ids.split(sizes), *others, strict=True)]


def of_both_labels(batch: Batch, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the loss on the batch's labels; of mixed images, on each label by its share."""
    value = loss(batch.labels)
    if batch.other_labels is None:
        return value
    return batch.share * value + (1 - batch.share) * loss(batch.other_labels)
