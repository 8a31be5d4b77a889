"""Augmentation of a whole batch at once: (N, C, H, W) uint8 -> (N, C, size, size) uint8.

What happens to a sample is a function of (seed, view, sample id) and of nothing else: not of the batch it is in, nor of
the order of arrival. That is what lets teacher outputs be cached and interrupted runs continue exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 5  # uniform numbers a sample and view: crop 0-1, flip 2, cutout 3-4


def derive_seed(seed: int, *purpose: object) -> int:
    """A seed for one purpose, independent of those for others."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "big")


def crop(images: Tensor, draws: Tensor, size: tuple[int, int], padding: int) -> Tensor:
    """A random window of `size`, after `padding` black pixels on each side where the image is no larger than that."""
    height, width = size
    if images.shape[2] <= height and images.shape[3] <= width and padding:
        images = F.pad(images, (padding,) * 4)
    top = (draws[:, 0] * (images.shape[2] - height + 1)).long()
    left = (draws[:, 1] * (images.shape[3] - width + 1)).long()
    rows = top[:, None] + torch.arange(height, device=images.device)  # (N, height)
    columns = left[:, None] + torch.arange(width, device=images.device)  # (N, width)
    samples = torch.arange(len(images), device=images.device)
    # Channels last in memory, so that a gathered pixel is one contiguous read; indexing gives (N, height, width, C).
    picked = images.permute(0, 2, 3, 1)[samples[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def flip(images: Tensor, draws: Tensor, size: tuple[int, int], padding: int) -> Tensor:
    """Mirrors half of the images."""
    return torch.where((draws[:, 2] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)


def cutout(images: Tensor, draws: Tensor, size: tuple[int, int], padding: int) -> Tensor:
    """Blackens a square of half the image's side around a random point. Source: DeVries and Taylor 2017."""
    height, width = images.shape[2:]
    radius = min(height, width) // 4
    rows = torch.arange(height, device=images.device) - (draws[:, 3:4] * height).long()  # (N, H)
    columns = torch.arange(width, device=images.device) - (draws[:, 4:5] * width).long()  # (N, W)
    hidden = (rows.abs() < radius)[:, None, :, None] & (columns.abs() < radius)[:, None, None, :]
    return images.masked_fill(hidden, 0)


AUGMENTATIONS: dict[str, Callable[[Tensor, Tensor, tuple[int, int], int], Tensor]] = {
    "crop": crop, "flip": flip, "cutout": cutout}


@dataclass
class Augmenter:
    """Augments batches of a split of `samples` images.

    Args:
        names: of AUGMENTATIONS, in the order in which they are applied.
        size: (H, W) of the result; images that no random crop brought to it are cropped centrally.
        padding: of the crop, in pixels.
        seed: of every draw.
        samples: length of the split.
    """

    names: list[str]
    size: tuple[int, int]
    padding: int
    seed: int
    samples: int
    _draws: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    def __call__(self, images: Tensor, ids: Tensor, view: int) -> Tensor:
        """Augments (B, C, H, W) uint8 images of the samples `ids` (B,), as view number `view` of them."""
        if self.names:
            draws = self._draws_of(view, images.device)[ids.to(images.device)]
            for name in self.names:
                images = AUGMENTATIONS[name](images, draws, self.size, self.padding)
        return center_crop(images, self.size)

    def _draws_of(self, view: int, device: torch.device) -> Tensor:
        if (view, device) not in self._draws:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "augment", view))
            self._draws = {(view, device): torch.rand(self.samples, DRAWS, generator=generator).to(device)}
        return self._draws[view, device]


def center_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The central window, as `model_loader.decode_image` takes it."""
    top, left = round((images.shape[2] - size[0]) / 2), round((images.shape[3] - size[1]) / 2)
    return images[:, :, top:top + size[0], left:left + size[1]]
