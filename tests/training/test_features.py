"""Distillation by features: the formulas, where layers are compared, and a student that gives its features."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.describe import lower
from architectures.zoo import make
from compress.training.features import (
    FEATURE_METHODS, Pair, Place, TeacherFeatures, WithFeatures, attention, distill_features, pairs_of, places_of,
    projected)
from compress.training.mixup import Batch
from metadata.errors import UserError


def test_attention_is_the_distance_of_maps_of_length_one() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 2, 2), torch.randn(2, 5, 2, 2)
    value = 0.0
    for image in range(2):
        maps = []
        for features in (student, teacher):
            squares = [sum(float(channel[row, column])**2 for channel in features[image])
                       for row in (0, 1) for column in (0, 1)]
            length = sum(each**2 for each in squares)**0.5
            maps.append([each / length for each in squares])
        value += sum((one - other)**2 for one, other in zip(*maps, strict=True))
    assert float(attention(student, teacher)) == pytest.approx(500 * value / 8, rel=1e-5)
    assert float(attention(7 * teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_projected_features_are_measured_in_the_teachers_units() -> None:
    teacher = torch.full((1, 2, 2, 2), 10.0)
    assert float(projected(torch.zeros(1, 2, 2, 2), teacher)) == pytest.approx(1.0, rel=1e-4)
    assert float(projected(1000 * teacher * 0.5, 1000 * teacher)) == pytest.approx(0.25, rel=1e-4)


class Reuses(nn.Module):
    """One activation at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 6, 3, 2, 1)
        self.relu, self.fc = nn.ReLU(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.one(x))
        x = self.relu(self.two(x))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_the_last_call_of_each_size_counts() -> None:
    model, images = Reuses().eval(), torch.randn(2, 3, 8, 8)
    assert places_of(model, images) == {(8, 8): Place(module="relu", call=0, channels=4),
                                        (4, 4): Place(module="relu", call=1, channels=6)}
    pairs = [Pair(layer="", channels=1, place=place) for place in places_of(model, images).values()]
    large, small = TeacherFeatures(model, pairs, None)(images)
    with torch.no_grad():
        expected = F.relu(model.one(images))
        torch.testing.assert_close(large, expected)
        torch.testing.assert_close(small, F.relu(model.two(expected)))
    assert not any(module._forward_hooks for module in model.modules())
    resnet = make("resnet18", num_classes=4, stem="small").eval()
    names = [place.module for place in places_of(resnet, torch.zeros(1, 3, 32, 32)).values()]
    assert names == ["layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_a_student_learns_its_teachers_features(name: str) -> None:
    torch.manual_seed(0)
    teacher = make("slim_resnet18", num_classes=4, width=16, stem="small").eval()
    lowered = lower(make("slim_resnet18", num_classes=4, width=8, stem="small").eval(), (3, 16, 16))
    student, images = lowered.build(), torch.randn(8, 3, 16, 16)
    pairs, method = pairs_of(lowered.architecture, teacher, images), FEATURE_METHODS[name]
    assert [(pair.layer, pair.place.module) for pair in pairs] == [
        (next(layer.name for layer in reversed(lowered.architecture.layers) if layer.name.startswith(stage)), stage)
        for stage in ("layer1", "layer2", "layer3", "layer4")]
    model = WithFeatures(student, pairs, method.projects)
    own = {id(parameter) for parameter in student.parameters()}
    assert own < {id(parameter) for parameter in model.parameters()} if method.projects else own == {
        id(parameter) for parameter in model.parameters()}
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images), student.eval()(images))
    model.train()
    labels = torch.arange(8) % 4
    loss = distill_features(TeacherFeatures(teacher, pairs, None), method, 1.0, 0.0)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        value, logits = loss(model, Batch(images=images, labels=labels, ids=labels, view=0))
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        values.append(float(value.detach()))
    assert logits.shape == (8, 4) and values[-1] < 0.5 * values[0]


def test_labels_and_features_share_the_weight() -> None:
    torch.manual_seed(0)
    lowered = lower(make("slim_resnet18", num_classes=4, width=8, stem="small").eval(), (3, 16, 16))
    student, images, labels = lowered.build(), torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    teacher = copy.deepcopy(student)
    pairs = pairs_of(lowered.architecture, teacher, images)
    model = WithFeatures(student, pairs, projects=False)
    model.network.eval()  # as the teacher, with the averages of batch norm
    batch = Batch(images=images, labels=labels, ids=labels, view=0, other_labels=labels.flip(0), share=0.75)
    loss = distill_features(TeacherFeatures(teacher, pairs, None), FEATURE_METHODS["features"], 0.4, 0.1)
    with torch.no_grad():
        value, logits = loss(model, batch)
    hard = [F.cross_entropy(logits, part, label_smoothing=0.1) for part in (labels, labels.flip(0))]
    assert float(value) == pytest.approx(0.6 * float(0.75 * hard[0] + 0.25 * hard[1]), rel=1e-4)


def test_networks_without_a_common_size_are_told() -> None:
    lowered = lower(nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten(), nn.Linear(4 * 144, 4)).eval(), (3, 16, 16))
    with pytest.raises(UserError, match=r"student: 12x12; teacher: 16x16, 8x8.*; set method kd"):
        pairs_of(lowered.architecture, make("slim_resnet18", num_classes=4, width=8, stem="small").eval(),
                 torch.zeros(1, 3, 16, 16))
