"""Augmentation of a whole batch at once: (N, C, H, W) uint8 -> (N, C, size, size) uint8.

The augmentation of a sample depends only on (seed, view, sample id), not on its batch or the order of samples. So teacher
outputs can be cached, and interrupted runs continue exactly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from loaders.images import center_crop, normalize
from loaders.splits import Splits

# Uniform random numbers for each sample and view: crop 0-1, flip 2, cutout 3-4, alternating_flip 5, affine 6-11.
DRAWS = 12


def derive_seed(seed: int, *purpose: object) -> int:
    """Return a seed for one purpose, independent of the seeds for other purposes."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "big")


@dataclass(frozen=True, kw_only=True)
class Affine:
    """The limits of the affine augmentation, in both directions.

    Args:
        degrees: rotation.
        scale: relative change of the height and, independently, of the width.
        shear: sideways shift of the top as a fraction of the height.
        shift: pixels.
    """

    degrees: float = 10.0
    scale: float = 0.1
    shear: float = 0.1
    shift: float = 2.0


@dataclass(frozen=True)
class Strength:
    """Settings of the augmentations: (H, W) of the result, padding of the crop in pixels, and limits of affine."""

    size: tuple[int, int]
    padding: int
    affine: Affine


def crop(images: Tensor, draws: Tensor, strength: Strength) -> Tensor:
    """Take a random window; first add `padding` black pixels on each side if the image is no larger than the window."""
    height, width = strength.size
    images = images.permute(0, 2, 3, 1)  # (N, H, W, C), so that the row of a window is contiguous
    if images.shape[1] <= height and images.shape[2] <= width and strength.padding:
        images = F.pad(images, (0, 0, *(strength.padding,) * 4))
    top = (draws[:, 0] * (images.shape[1] - height + 1)).long()
    left = (draws[:, 1] * (images.shape[2] - width + 1)).long()
    picked = (windows_by_row if images.device.type == "cpu" else windows_by_pixel)(images, top, left, height, width)
    return picked.permute(0, 3, 1, 2)


def windows_by_pixel(images: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Take a window of each image, pixel by pixel: (N, H, W, C) -> (N, height, width, C)."""
    rows = top[:, None] + torch.arange(height, device=images.device)  # (N, height)
    columns = left[:, None] + torch.arange(width, device=images.device)  # (N, width)
    samples = torch.arange(len(images), device=images.device)
    return images[samples[:, None, None], rows[:, :, None], columns[:, None, :]]


def windows_by_row(images: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Take the same windows row by row: NumPy copies whole rows, where indexing in torch copies single bytes."""
    channels = images.shape[3]
    rows = images.contiguous().flatten(2).numpy()  # (N, H, W * C)
    windows = sliding_window_view(rows, (height, width * channels), (1, 2))[:, :, ::channels]
    picked = windows[np.arange(len(rows)), top.numpy(), left.numpy()]  # (N, height, width * C)
    return torch.from_numpy(picked).view(len(rows), height, width, channels)


def flip(images: Tensor, draws: Tensor, strength: Strength) -> Tensor:
    """Mirror a random half of the images."""
    return _mirrored(images, draws[:, 2] < 0.5)


def alternating_flip(images: Tensor, draws: Tensor, strength: Strength) -> Tensor:
    """Mirror a random half of the images in even views and the other half in odd views, so that two views show all.

    Source: Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", section 3.6.
    """
    return _mirrored(images, draws[:, 5] < 0.5)


def _mirrored(images: Tensor, which: Tensor) -> Tensor:
    return torch.where(which.view(-1, 1, 1, 1), images.flip(3), images)


def cutout(images: Tensor, draws: Tensor, strength: Strength) -> Tensor:
    """Blacken a square of half the shorter side of the image around a random point. Source: DeVries and Taylor 2017."""
    height, width = images.shape[2:]
    radius = min(height, width) // 4
    rows = torch.arange(height, device=images.device) - (draws[:, 3:4] * height).long()  # (N, H)
    columns = torch.arange(width, device=images.device) - (draws[:, 4:5] * width).long()  # (N, W)
    hidden = (rows.abs() < radius)[:, None, :, None] & (columns.abs() < radius)[:, None, None, :]
    return images.masked_fill(hidden, 0)


def affine(images: Tensor, draws: Tensor, strength: Strength) -> Tensor:
    """Rotate, scale, shear and shift, with bilinear interpolation and black borders."""
    limits = strength.affine
    height, width = images.shape[2:]
    angle, wide, high, shear, across, down = (2 * draws[:, 6:12] - 1).unbind(1)  # each in [-1, 1)
    angle, shear = angle * math.radians(limits.degrees), shear * limits.shear
    cos, sin, wide, high = torch.cos(angle), torch.sin(angle), 1 + wide * limits.scale, 1 + high * limits.scale
    # The source of each pixel of the result, in coordinates from -1 to 1 along either side: (N, 2, 3).
    slope = height / width
    upper = [cos * wide, (cos * shear - sin) * high * slope, across * 2 * limits.shift / width]
    lower = [sin * wide / slope, (sin * shear + cos) * high, down * 2 * limits.shift / height]
    theta = torch.stack([torch.stack(upper, 1), torch.stack(lower, 1)], 1)
    grid = F.affine_grid(theta, [len(images), 1, height, width], align_corners=False)
    moved = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved.round_().to(torch.uint8)


AUGMENTATIONS: dict[str, Callable[[Tensor, Tensor, Strength], Tensor]] = {
    "crop": crop, "flip": flip, "alternating_flip": alternating_flip, "cutout": cutout, "affine": affine}


@dataclass(kw_only=True)
class Augmenter:
    """Augment batches of a split of `samples` images.

    Args:
        names: names in AUGMENTATIONS, in the order of application.
        size: (H, W) of the result; images of another size are cropped at the centre.
        padding: padding of the crop, in pixels.
        seed: the seed of all draws.
        samples: the length of the split.
        affine: the limits of the affine augmentation.
    """

    names: list[str]
    size: tuple[int, int]
    padding: int
    seed: int
    samples: int
    affine: Affine = Affine()
    _draws: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    def __call__(self, images: Tensor, ids: Tensor, view: int) -> Tensor:
        """Augment (B, C, H, W) uint8 images of the samples `ids` (B,) as view number `view`."""
        if self.names:
            draws = self._draws_of(view, images.device)[ids.to(images.device)]
            strength = Strength(self.size, self.padding, self.affine)
            for name in self.names:
                images = AUGMENTATIONS[name](images, draws, strength)
        return center_crop(images, self.size)

    def _draws_of(self, view: int, device: torch.device) -> Tensor:
        if (view, device) not in self._draws:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "augment", view))
            draws = torch.rand(self.samples, DRAWS, generator=generator)
            always = torch.Generator().manual_seed(derive_seed(self.seed, "augment"))  # the same in each view
            draws[:, 5] = (torch.rand(self.samples, generator=always) + view / 2) % 1
            self._draws = {(view, device): draws.to(device)}
        return self._draws[view, device]


def examples(splits: Splits, count: int, seed: int = 0) -> Tensor:
    """Return at most `count` training images drawn at random: (N, C, H, W) float32, preprocessed, on the CPU.

    Training images are decoded larger than the input of the network, to leave room for random crops; here the crop is
    central.
    """
    images = splits.train.images.batch(splits.train.sample(count, seed)).cpu()
    return normalize(center_crop(images, splits.card.input_shape[1:]), splits.card.preprocessing).contiguous()
