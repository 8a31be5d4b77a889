"""Losses and teacher caches, each against its closed form; the choices of the training settings."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from architectures.zoo import make
from compress.training.distillation import cached_targets, live_targets
from compress.training.loop import Data
from compress.training.losses import distillation_loss
from compress.training.mixup import Batch
from compress.training.optimizers import OPTIMIZERS
from compress.training.schedules import SCHEDULES
from compress.training.trackers import Tracker
from loaders.arrays import ArrayImages, Split
from loaders.augment import AUGMENTATIONS, Augmenter
from loaders.images import normalize
from metadata.schemas import Preprocessing


def quiet() -> Tracker:
    return Tracker(Console(file=io.StringIO()))


def numbered_images(count: int, size: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_every_augmentation_is_a_choice_of_the_config() -> None:
    from typing import get_args

    from compress.pipeline.config import TrainConfig
    choices = get_args(get_args(TrainConfig.model_fields["augment"].annotation)[0])
    assert set(choices) == set(AUGMENTATIONS)
    assert set(get_args(TrainConfig.model_fields["optimizer"].annotation)) == {*OPTIMIZERS, "sam"}
    assert set(get_args(TrainConfig.model_fields["schedule"].annotation)) == {*SCHEDULES, "one_cycle"}


# -------------------------------------------------------------------------------------------------------- losses


def test_distillation_loss_closed_form() -> None:
    student = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    teacher = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    labels = torch.tensor([1, 2])

    def softmax(row: list[float], temperature: float) -> list[float]:
        powers = [math.exp(value / temperature) for value in row]
        return [power / sum(powers) for power in powers]

    temperature, alpha = 4.0, 0.7
    soft = sum(q * math.log(q / p) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
               for p, q in zip(softmax(s, temperature), softmax(t, temperature), strict=True)) / 2 * temperature**2
    hard = sum(-math.log(softmax(s, 1.0)[label]) for s, label in zip(student.tolist(), [1, 2], strict=True)) / 2
    loss = distillation_loss(student, teacher, labels, temperature, alpha)
    assert float(loss) == pytest.approx(alpha * soft + (1 - alpha) * hard, rel=1e-5)
    assert float(distillation_loss(student, student, labels, 3.0, 1.0)) == pytest.approx(0.0, abs=1e-6)


# ------------------------------------------------------------------------------------------------- teacher cache


def small_data(samples: int = 60, classes: int = 4) -> Data:
    images = numbered_images(samples)
    labels = torch.arange(samples) % classes
    split = Split(ArrayImages(images), labels)
    return Data(split, split, Augmenter(names=["crop", "flip"], size=(8, 8), padding=2, seed=1, samples=samples),
                Preprocessing(resize=8, crop=8))


def test_cached_teacher_outputs_belong_to_sample_and_view_in_any_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = small_data()
    teacher = make("slim_resnet18", num_classes=4, width=4, stem="small").eval()
    device = torch.device("cpu")
    cached = cached_targets(teacher, data, 3, tmp_path / "cache.pth", None, device, quiet(), batch_size=16)
    live = live_targets(teacher, None)
    for view in range(3):
        for ids in torch.randperm(60).split(17):
            images = normalize(data.augmenter(data.train.images.batch(ids), ids, view), data.preprocessing)
            batch = Batch(images, data.train.labels[ids], ids, view)
            assert torch.allclose(cached(batch), live(batch), atol=5e-3)
    again = cached_targets(nn.Identity(), data, 3, tmp_path / "cache.pth", None, device, quiet())
    assert torch.equal(again.logits, cached.logits)  # read, not computed anew
    wrong = Batch(images, data.train.labels[ids], ids.flip(0), 2)
    assert not torch.allclose(cached(wrong), live(batch), atol=5e-3)
