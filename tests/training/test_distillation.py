"""Distillation: each method against its formula, and cached teacher outputs against live ones."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from architectures.zoo import make
from compress.training.distillation import METHODS, MethodName, TeacherLoss, distill
from compress.training.mixup import Batch, mixed
from compress.training.targets import (
    CachedTargets, TopLogits, cached_targets, enough_logits, live_targets, top_logits)
from loaders.images import normalize
from tests.helpers.trainings import Says, quiet, small_data


STUDENT = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
TEACHER = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.5, 1.0]])
LABELS = torch.tensor([1, 2])


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def divergence(student: list[float], teacher: list[float]) -> float:
    return sum(q * math.log(q / p) for p, q in zip(student, teacher, strict=True))


def by_hand(method: str, temperature: float) -> float:
    """A method's value for the tensors above, from its formula, number by number."""
    rows, value = list(zip(STUDENT.tolist(), TEACHER.tolist(), LABELS.tolist(), strict=True)), 0.0
    for student, teacher, label in rows:
        if method == "standardized":
            student, teacher = ([(x - statistics.mean(row)) / statistics.stdev(row) for x in row]
                                for row in (student, teacher))
        ours, theirs = softmax(student, temperature), softmax(teacher, temperature)
        if method in ("kd", "standardized"):
            value += (10 if method == "standardized" else 1) * divergence(ours, theirs)
        elif method == "dkd":
            rest = [index for index in range(3) if index != label]
            value += divergence([ours[label], 1 - ours[label]], [theirs[label], 1 - theirs[label]])
            value += 8 * divergence(*(softmax([row[index] for index in rest], temperature) for row in (student, teacher)))
    if method == "dist":
        images = [[softmax(row, temperature) for row in logits.tolist()] for logits in (STUDENT, TEACHER)]
        classes = [list(zip(*part, strict=True)) for part in images]
        value = 2 * 2 * sum(statistics.mean(1 - statistics.correlation(*pair) for pair in zip(*part, strict=True))
                            for part in (images, classes))
    return value / 2 * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_its_formula(name: MethodName, temperature: float) -> None:
    value = float(METHODS[name].loss(STUDENT, TEACHER, LABELS, temperature))
    assert value == pytest.approx(by_hand(name, temperature), rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_least_where_the_student_says_what_the_teacher_says(name: MethodName) -> None:
    torch.manual_seed(0)
    teacher, labels = 5 * torch.randn(16, 10), torch.arange(16) % 10
    teacher[0, 0] = 80  # sure
    loss = METHODS[name].loss
    assert float(loss(teacher, teacher, labels, 4.0)) == pytest.approx(0.0, abs=1e-3)
    student = torch.randn(16, 10, requires_grad=True)
    optimizer = torch.optim.Adam([student], 0.1)
    first = float(loss(teacher.flip(0), teacher, labels, 4.0))
    for _ in range(300):
        optimizer.zero_grad()
        value = loss(student, teacher, labels, 4.0)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert bool(student.grad.isfinite().all()) and float(value.detach()) < 0.05 * first  # type: ignore[union-attr]
    assert (student.argmax(1) == teacher.argmax(1)).all()


def test_the_labels_have_the_rest_of_the_weight() -> None:
    batch = Batch(images=torch.zeros(2, 1), labels=LABELS, ids=LABELS, view=0)
    hard = sum(-math.log(softmax(row)[label]) for row, label in zip(STUDENT.tolist(), [1, 2], strict=True)) / 2
    value, logits = distill(lambda _: TEACHER, TeacherLoss(alpha=0.7).chosen(), 0.0)(Says(STUDENT), batch)
    assert float(value) == pytest.approx(0.7 * by_hand("kd", 4.0) + 0.3 * hard, rel=1e-5) and logits is STUDENT
    assert TeacherLoss(method="standardized").chosen().temperature == 2.0
    assert TeacherLoss(method="dist").chosen().alpha == 0.5


@pytest.mark.parametrize("name", METHODS)
def test_distillation_of_mixed_images_counts_each_label_by_its_share(name: MethodName) -> None:
    logits, teacher = torch.randn(4, 3), torch.randn(4, 3)
    labels, others = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    batch = Batch(images=torch.zeros(4, 1), labels=labels, ids=labels, view=0, other_labels=others, share=0.7)
    method = TeacherLoss(method=name, alpha=0.6).chosen()
    value, one, other = (float(distill(lambda _: teacher, method, 0.0)(Says(logits), each)[0]) for each in (
        batch, replace(batch, other_labels=None), replace(batch, labels=others, other_labels=None)))
    assert value == pytest.approx(0.7 * one + 0.3 * other, rel=1e-5)


# ------------------------------------------------------------------------------------------------- teacher cache


def test_cached_teacher_outputs_belong_to_sample_and_view_in_any_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = small_data()
    teacher = make("slim_resnet18", num_classes=4, width=4, stem="small").eval()
    device = torch.device("cpu")
    cached = cached_targets([teacher], data, 3, tmp_path / "cache.pth", None, device, quiet(), batch_size=16)
    live = live_targets([teacher], None)
    for view in range(3):
        for ids in torch.randperm(60).split(17):
            images = normalize(data.augmenter(data.train.images.batch(ids), ids, view), data.preprocessing)
            batch = Batch(images=images, labels=data.train.labels[ids], ids=ids, view=view)
            assert torch.allclose(cached(batch), live(batch), atol=5e-3)
    again = cached_targets([nn.Identity()], data, 3, tmp_path / "cache.pth", None, device, quiet())
    assert torch.equal(again.logits, cached.logits)  # read, not computed anew
    wrong = Batch(images=images, labels=data.train.labels[ids], ids=ids.flip(0), view=2)
    assert not torch.allclose(cached(wrong), live(batch), atol=5e-3)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_largest_logits_and_the_mass_of_the_rest_are_the_softened_distribution(temperature: float) -> None:
    logits = 4 * torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    kept = top_logits(logits, 8, temperature)
    assert kept.shape == (7, 100)
    exact, found = ((part / temperature).softmax(1) for part in (logits, kept[:].float()))
    largest = logits.topk(8).indices
    torch.testing.assert_close(found.gather(1, largest), exact.gather(1, largest), atol=1e-3, rtol=5e-3)
    rest = torch.ones_like(found).scatter(1, largest, 0).bool()
    assert all(len(set(row[mask].tolist())) == 1 for row, mask in zip(kept[:], rest, strict=True))  # the others are alike
    torch.testing.assert_close(found[rest].view(7, -1).sum(1), exact[rest].view(7, -1).sum(1), atol=1e-3, rtol=5e-3)


def test_logits_that_lose_something_are_all_kept() -> None:
    sure = torch.full((5, 100), -20.0)
    sure[:, 3], sure[:, 50] = 9.0, 8.0
    assert enough_logits(sure + 0.1 * torch.randn(5, 100), 1.0) == 2
    assert enough_logits(torch.randn(5, 100), 4.0) == 0  # no class stands out
    assert enough_logits(sure[:, :4], 1.0) == 0  # nothing to save
    many = torch.full((1, 40_000), -30.0)
    many[0, 39_999] = 5.0
    assert top_logits(many, 2, 1.0)[:].argmax() == 39_999


@pytest.mark.parametrize("gain", [1.0, 400.0])
def test_a_cache_of_the_largest_logits_teaches_the_same(tmp_path: Path, gain: float) -> None:
    data, device = small_data(), torch.device("cpu")

    class Sure(nn.Module):
        """Logits of 50 classes, the surer the larger the gain."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return gain * images.flatten(1)[:, :50]

    cached = cached_targets([Sure()], data, 2, tmp_path / "cache.pth", None, device, quiet(), temperature=4.0)
    assert isinstance(cached.logits, TopLogits) == (gain > 1)
    again = cached_targets([nn.Identity()], data, 2, tmp_path / "cache.pth", None, device, quiet(), temperature=4.0)
    ids = torch.arange(60).flip(0)
    images = normalize(data.augmenter(data.train.images.batch(ids), ids, 0), data.preprocessing)
    batch = Batch(images=images, labels=data.train.labels[ids], ids=ids, view=0)
    assert torch.equal(again(batch), cached(batch))
    exact, found = ((logits / 4).log_softmax(1) for logits in (Sure()(images), cached(batch)))
    assert float((exact.exp() * (exact - found)).sum(1).mean()) < 2e-4


@pytest.mark.parametrize("temperature", [None, 4.0])
def test_a_cache_that_was_cut_off_goes_on_with_the_next_view(tmp_path: Path, temperature: float | None) -> None:
    data, device, seen = small_data(), torch.device("cpu"), list[int]()

    class Dying(nn.Module):
        """Sure logits of 50 classes for so many images."""

        def __init__(self, most: int) -> None:
            super().__init__()
            self.most = most

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            if sum(seen) > self.most:
                raise KeyboardInterrupt
            return 400 * images.flatten(1)[:, :50]

    def cached(most: int, name: str) -> CachedTargets:
        seen.clear()
        return cached_targets([Dying(most)], data, 3, tmp_path / name, None, device, quiet(), temperature)

    whole = cached(1000, "whole.pth")
    asked = sum(seen)
    with pytest.raises(KeyboardInterrupt):
        cached(asked - 1, "cut.pth")
    assert not (tmp_path / "cut.pth").exists()
    resumed = cached(1000, "cut.pth")
    assert sum(seen) == 60  # the last view alone
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cut.pth", "whole.pth"]
    ids = torch.arange(60)
    for view in range(3):
        assert torch.equal(resumed.logits[view, ids], whole.logits[view, ids])


def test_several_teachers_are_the_mean_of_their_logits() -> None:
    batch = Batch(images=torch.randn(3, 2), labels=torch.zeros(3).long(), ids=torch.arange(3), view=0)
    teachers = [nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(2, 4)]
    with torch.no_grad():
        expected = sum(teacher(batch.images) for teacher in teachers) / 3
    torch.testing.assert_close(live_targets(teachers, None)(batch), expected)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.5, 0.0), (0.0, 1.0)])
def test_cached_probabilities_are_mixed_as_the_images_are(mixup: float, cutmix: float) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 9, 4)
    logits[0, 3] = torch.tensor([300.0, 0, 0, 0])  # sure beyond float32
    ids = torch.tensor([3, 8, 1, 5])
    plain = Batch(images=torch.randn(4, 3, 8, 8), labels=ids % 4, ids=ids, view=1)
    for view in (0, 1):
        batch = mixed(replace(plain, view=view), mixup, cutmix)
        assert batch.other_ids is not None and 0 < batch.share < 1
        got = CachedTargets(logits.half())(batch).softmax(1)
        expected = (batch.share * logits.half()[view, ids].float().softmax(1)
                    + (1 - batch.share) * logits.half()[view, batch.other_ids].float().softmax(1))
        torch.testing.assert_close(got, expected)
