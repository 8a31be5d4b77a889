"""Distillation: the loss against its closed form, and cached teacher outputs against live ones."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from architectures.zoo import make
from compress.training.distillation import cached_targets, distill, distillation_loss, live_targets
from compress.training.mixup import Batch
from loaders.images import normalize
from tests.helpers.trainings import quiet, small_data


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
    loss = distillation_loss(student, teacher, labels, temperature=temperature, alpha=alpha)
    assert float(loss) == pytest.approx(alpha * soft + (1 - alpha) * hard, rel=1e-5)
    assert float(distillation_loss(student, student, labels, temperature=3.0, alpha=1.0)) == pytest.approx(0.0, abs=1e-6)


def test_distillation_of_mixed_images_counts_each_label_by_its_share() -> None:
    logits, teacher = torch.randn(4, 3), torch.randn(4, 3)
    labels, others = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    batch = Batch(images=torch.zeros(4, 1), labels=labels, ids=labels, view=0, other_labels=others, share=0.7)

    class Student(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return logits

    value, _ = distill(lambda _: teacher, 2.0, 0.6, 0.0)(Student(), batch)
    one, other = (distillation_loss(logits, teacher, part, temperature=2.0, alpha=0.6) for part in (labels, others))
    assert float(value) == pytest.approx(0.7 * float(one) + 0.3 * float(other), rel=1e-6)


# ------------------------------------------------------------------------------------------------- teacher cache


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
            batch = Batch(images=images, labels=data.train.labels[ids], ids=ids, view=view)
            assert torch.allclose(cached(batch), live(batch), atol=5e-3)
    again = cached_targets(nn.Identity(), data, 3, tmp_path / "cache.pth", None, device, quiet())
    assert torch.equal(again.logits, cached.logits)  # read, not computed anew
    wrong = Batch(images=images, labels=data.train.labels[ids], ids=ids.flip(0), view=2)
    assert not torch.allclose(cached(wrong), live(batch), atol=5e-3)
