"""A small network and small data, trained by the training loop with a tracker that prints nothing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from compress.training.data import Data, seeded
from compress.training.distillation import cross_entropy
from compress.training.loop import train
from compress.training.mixup import Loss
from compress.training.settings import TrainingSettings
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


def settings(**changes: Any) -> TrainingSettings:
    """Return settings for three epochs of the small data, with `changes`."""
    return TrainingSettings(**{"epochs": 3, "batch_size": 16, "checkpoint_seconds": 0.0, "lr": 0.05, "weight_decay": 1e-4,
                               **changes})


class Says(nn.Module):
    """A network with these logits for all images."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits


class WithDropout(nn.Module):
    """A convolution with batch norm, dropout and a linear layer, for 8x8 images of 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3),
                                 nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def fit(path: Path, chosen: TrainingSettings, model: nn.Module | None = None, loss: Loss | None = None,
        data: Data | None = None) -> nn.Module:
    """Train `model`, or a new `WithDropout`, with the checkpoint at `path`, and return the model."""
    with seeded(0, "model"):
        model = model or WithDropout()
    path.parent.mkdir(exist_ok=True)
    tracker = quiet()
    tracker.folder = path.parent
    train(model, data or small_data(), loss or cross_entropy(0.0), chosen, label="training", seed=5,
          device=torch.device("cpu"), checkpoint=path, tracker=tracker)
    return model


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Assert that two models have the same weights and buffers to the bit."""
    for (name, mine), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
