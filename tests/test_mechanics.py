"""Augmentation, schedules, optimizers, losses, teacher caches: each against its closed form or its definition."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from architectures import make
from compress.distillation import cached_targets, live_targets
from compress.losses import distillation_loss
from compress.optimizers import OPTIMIZERS, make_optimizer, parameter_groups
from compress.schedules import SCHEDULES, rate
from compress.trackers import Tracker
from compress.training import Batch, Data, Recipe, seeded, train
from loaders import load
from loaders.arrays import ArrayImages, Request, Split
from loaders.augment import AUGMENTATIONS, Augmenter, center_crop, derive_seed
from model_loader import Preprocessing, UserError, normalize


def quiet() -> Tracker:
    return Tracker(Console(file=io.StringIO()))


def numbered_images(count: int, size: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("names", [["crop"], ["flip"], ["cutout"], ["crop", "flip", "cutout"]], ids=str)
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

    from compress.config import TrainConfig
    choices = get_args(get_args(TrainConfig.model_fields["augment"].annotation)[0])
    assert set(choices) == set(AUGMENTATIONS)
    assert set(get_args(TrainConfig.model_fields["optimizer"].annotation)) == set(OPTIMIZERS)
    assert set(get_args(TrainConfig.model_fields["schedule"].annotation)) == set(SCHEDULES)


# ------------------------------------------------------------------------------------- schedules, optimizers, losses


def test_schedules_closed_forms() -> None:
    assert rate("cosine", 0.0, 0.0) == 1.0 and rate("cosine", 0.0, 0.5) == pytest.approx(0.5)
    assert rate("linear", 0.0, 0.75) == pytest.approx(0.25) and rate("constant", 0.0, 0.9) == 1.0
    assert [rate("step", 0.0, p) for p in (0.4, 0.6, 0.8)] == [1.0, 0.1, 0.01]
    assert rate("cosine", 0.2, 0.1) == pytest.approx(0.5) and rate("cosine", 0.2, 0.2) == 1.0
    assert rate("cosine", 0.2, 0.6) == pytest.approx(0.5)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_parameter_in_one_group_and_no_decay_on_vectors(name: str) -> None:
    model = make("slim_resnet18", num_classes=3, width=4)
    optimizer = make_optimizer(name, model, lr=0.1, momentum=0.9, weight_decay=0.01)
    seen = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(seen) == sorted(id(parameter) for parameter in model.parameters())
    for group in optimizer.param_groups:
        dims = {parameter.dim() > 1 for parameter in group["params"]}
        assert dims == {group["weight_decay"] > 0}
    assert len(parameter_groups(model, 0.01)) == 2


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
    cached = cached_targets(teacher, data, 3, tmp_path / "cache.pth", False, device, quiet(), batch_size=16)
    live = live_targets(teacher, bfloat16=False)
    for view in range(3):
        for ids in torch.randperm(60).split(17):
            images = normalize(data.augmenter(data.train.images.batch(ids), ids, view), data.preprocessing)
            batch = Batch(images, data.train.labels[ids], ids, view)
            assert torch.allclose(cached(batch), live(batch), atol=5e-3)
    again = cached_targets(nn.Identity(), data, 3, tmp_path / "cache.pth", False, device, quiet())
    assert torch.equal(again.logits, cached.logits)  # read, not computed anew
    wrong = Batch(images, data.train.labels[ids], ids.flip(0), 2)
    assert not torch.allclose(cached(wrong), live(batch), atol=5e-3)


# ------------------------------------------------------------------------------------------------- training loop


def recipe(**changes: object) -> Recipe:
    settings: dict[str, object] = dict(
        epochs=3, batch_size=16, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4, schedule="cosine",
        warmup=0.1, clip=0.0, views=0, bfloat16=False, max_steps=None, checkpoint_seconds=0.0)
    return Recipe(**{**settings, **changes})  # type: ignore[arg-type]


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
                                 nn.Linear(216, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def fit(path: Path, settings: Recipe, model: nn.Module | None = None) -> nn.Module:
    with seeded(0, "model"):
        model = model or WithDropout()
    train(model, small_data(), lambda m, batch: nn.functional.cross_entropy(m(batch.images), batch.labels), settings,
          label="training", seed=5, device=torch.device("cpu"), checkpoint=path, tracker=quiet())
    return model


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_stopped_training_continues_bit_for_bit(stop: int, optimizer: str, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole.pth", recipe(optimizer=optimizer))
    fit(tmp_path / "parts.pth", recipe(optimizer=optimizer, max_steps=stop))  # leaves the checkpoint of step `stop`
    rest = fit(tmp_path / "parts.pth", recipe(optimizer=optimizer))
    for (name, one), other in zip(whole.state_dict().items(), rest.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_training_is_deterministic_and_leaves_global_randomness_alone(tmp_path: Path) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one, two = fit(tmp_path / "1.pth", recipe()), fit(tmp_path / "2.pth", recipe())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_training_learns_the_digits(tmp_path: Path) -> None:
    splits = load(Request("digits"))
    data = Data(splits.train, splits.validation, Augmenter([], (8, 8), 0, 0, len(splits.train)),
                splits.card.preprocessing)
    model = make("slim_resnet18", num_classes=10, width=4, stem="small")
    train(model, data, lambda m, b: nn.functional.cross_entropy(m(b.images), b.labels),
          recipe(epochs=4, batch_size=32, lr=0.1), label="digits", seed=0, device=torch.device("cpu"),
          checkpoint=tmp_path / "c.pth", tracker=quiet())
    from compress.training import accuracy_of
    assert accuracy_of(model, splits.validation, splits.card.preprocessing) > 0.8


def test_nan_loss_stops_with_step_rate_and_advice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss is nan at step \d+ \(learning rate .*lower lr.*last good state"):
        fit(tmp_path / "c.pth", recipe(lr=1e12, warmup=0.0))


def test_seeds_for_different_purposes_differ() -> None:
    assert len({derive_seed(0, "order", 0), derive_seed(0, "order", 1), derive_seed(0, "augment", 0),
                derive_seed(1, "order", 0)}) == 4
