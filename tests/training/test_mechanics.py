"""Augmentation, losses and teacher caches: each against its closed form or its definition."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

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
from loaders.augment import AUGMENTATIONS, Affine, Augmenter, _windows, _windows_on_cpu, center_crop, derive_seed
from loaders.images import normalize
from metadata.schemas import Preprocessing


def quiet() -> Tracker:
    return Tracker(Console(file=io.StringIO()))


def numbered_images(count: int, size: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("names", [*([name] for name in AUGMENTATIONS), ["crop", "flip", "cutout"]], ids=str)
def test_augmentation_depends_on_sample_and_view_not_on_the_batch(names: list[str]) -> None:
    images = numbered_images(40)
    ids = torch.arange(40)
    whole = Augmenter(names, (8, 8), 2, seed=3, samples=40)(images, ids, view=1)
    order = torch.randperm(40)
    pieces = [Augmenter(names, (8, 8), 2, seed=3, samples=40)(images[part], part, view=1) for part in order.split(7)]
    assert torch.equal(torch.cat(pieces), whole[order])
    assert not torch.equal(Augmenter(names, (8, 8), 2, seed=3, samples=40)(images, ids, view=2), whole)
    assert not torch.equal(Augmenter(names, (8, 8), 2, seed=4, samples=40)(images, ids, view=1), whole)


def test_crop_shifts_each_image_by_whole_pixels_within_the_padding() -> None:
    images = numbered_images(200)
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    result = Augmenter(["crop"], (8, 8), 2, seed=0, samples=200)(images, torch.arange(200), 0)
    shifts = set()
    for image, cropped in zip(padded, result, strict=True):
        found = [(y, x) for y in range(5) for x in range(5) if torch.equal(image[:, y:y + 8, x:x + 8], cropped)]
        assert found
        shifts.add(found[0])
    assert len(shifts) == 25  # every offset occurs in 200 draws of 25


def test_windows_are_the_same_row_by_row_and_pixel_by_pixel() -> None:
    images = numbered_images(50, size=12).permute(0, 2, 3, 1)
    top, left = (torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected = torch.stack([image[y:y + 9, x:x + 8] for image, y, x in zip(images, top, left, strict=True)])
    assert torch.equal(_windows(images, top, left, 9, 8), expected)
    assert torch.equal(_windows_on_cpu(images, top, left, 9, 8), expected)


def test_alternating_flip_shows_both_sides_in_two_views() -> None:
    images = numbered_images(100)
    augmenter = Augmenter(["alternating_flip"], (8, 8), 0, seed=0, samples=100)
    views = [augmenter(images, torch.arange(100), view) for view in range(4)]
    assert torch.equal(views[0].flip(3), views[1]) and torch.equal(views[0], views[2])
    mirrored = sum(torch.equal(a.flip(2), b) for a, b in zip(images, views[0], strict=True))
    assert 30 < mirrored < 70


@pytest.mark.parametrize(("limits", "expected"), [
    (Affine(0, 0, 0, 0), lambda image: image),
    (Affine(0, 0, 0, 1.0), None)], ids=["nothing", "shift"])
def test_affine_leaves_the_image_or_moves_it_within_the_limits(limits: Affine, expected: Any) -> None:
    images = numbered_images(60, size=16)
    moved = Augmenter(["affine"], (16, 16), 0, 0, 60, limits)(images, torch.arange(60), 0)
    if expected:
        assert torch.equal(moved, images)
        return
    point = torch.zeros(60, 1, 17, 17, dtype=torch.uint8)
    point[:, :, 8, 8] = 255
    spread = Augmenter(["affine"], (17, 17), 0, 0, 60, limits)(point, torch.arange(60), 0).float()
    assert float(spread[:, 0, 7:10, 7:10].sum()) == pytest.approx(float(spread.sum()))  # no further than a pixel
    assert len({int(image.argmax()) for image in spread.flatten(1)}) > 5  # and not all alike


def test_affine_turns_by_the_angle_and_keeps_corners_black() -> None:
    bar = torch.zeros(200, 1, 31, 31, dtype=torch.uint8)
    bar[:, :, 15, 3:28] = 255
    turned = Augmenter(["affine"], (31, 31), 0, 0, 200, Affine(30.0, 0, 0, 0))(bar, torch.arange(200), 0)[:, 0].float()
    rows, columns = torch.meshgrid(torch.arange(31.) - 15, torch.arange(31.) - 15, indexing="ij")
    angles = torch.rad2deg(torch.atan2((turned * rows * columns.sign()).sum((1, 2)),
                                       (turned * columns.abs()).sum((1, 2))))
    assert 25 < float(angles.max()) < 31 and -31 < float(angles.min()) < -25
    assert int(turned[:, ::30, ::30].max()) == 0


def test_flip_mirrors_about_half_and_cutout_blackens_a_square() -> None:
    images = numbered_images(400)
    flipped = Augmenter(["flip"], (8, 8), 0, seed=0, samples=400)(images, torch.arange(400), 0)
    mirrored = torch.tensor([torch.equal(a.flip(2), b) for a, b in zip(images, flipped, strict=True)])
    same = torch.tensor([torch.equal(a, b) for a, b in zip(images, flipped, strict=True)])
    assert bool((mirrored ^ same).all()) and 150 < int(mirrored.sum()) < 250
    cut = Augmenter(["cutout"], (8, 8), 0, seed=0, samples=400)(images.clamp(min=1), torch.arange(400), 0)
    black = (cut == 0).all(1).flatten(1).sum(1)
    assert int(black.max()) == 9 and int(black.min()) >= 4  # 3x3, or what of it lies inside


def test_larger_images_are_cropped_without_padding_and_centrally_without_a_crop() -> None:
    images = numbered_images(10, size=12)
    assert Augmenter(["crop"], (8, 8), 4, 0, 10)(images, torch.arange(10), 0).shape == (10, 3, 8, 8)
    assert torch.equal(Augmenter([], (8, 8), 4, 0, 10)(images, torch.arange(10), 0), images[:, :, 2:10, 2:10])
    assert center_crop(images, (12, 12)).shape == images.shape


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
    return Data(split, split, Augmenter(["crop", "flip"], (8, 8), 2, seed=1, samples=samples),
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


def test_seeds_for_different_purposes_differ() -> None:
    assert len({derive_seed(0, "order", 0), derive_seed(0, "order", 1), derive_seed(0, "augment", 0),
                derive_seed(1, "order", 0)}) == 4
