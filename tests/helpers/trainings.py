"""Small data to train on, and a tracker that prints nothing."""

from __future__ import annotations

import io

import torch
from rich.console import Console

from compress.training.data import Data
from compress.training.trackers import Tracker
from loaders.arrays import ArrayImages
from loaders.augment import Augmenter
from loaders.splits import Split
from metadata.schemas import Preprocessing


def quiet() -> Tracker:
    """Return a tracker that prints nothing and keeps nothing."""
    return Tracker(Console(file=io.StringIO()))


def numbered_images(count: int, size: int = 8) -> torch.Tensor:
    """Return (count, 3, size, size) uint8 images of noise, the same at each call."""
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def small_data(samples: int = 60, classes: int = 4) -> Data:
    """Return 8x8 images of noise for training and validation, augmented by crop and flip."""
    images = numbered_images(samples)
    labels = torch.arange(samples) % classes
    split = Split(ArrayImages(images), labels)
    augmenter = Augmenter(names=["crop", "flip"], size=(8, 8), padding=2, seed=1, samples=samples)
    return Data(train=split, validation=split, augmenter=augmenter, preprocessing=Preprocessing(resize=8, crop=8))
