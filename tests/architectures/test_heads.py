"""The last layer on the way to the output, whatever the order in which modules are registered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.heads import head_parameters, reorder_classes
from architectures.zoo import make


class HeadFirst(nn.Module):
    """A network whose head is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(8, 4)
        self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x).mean((2, 3)))


class Scaled(HeadFirst):
    """Logits of a weight without a module, scaled and shifted; the shift has two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(1, 4))
        self.scale = nn.Parameter(torch.rand(4) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(x).mean((2, 3)), F.normalize(self.classifier.weight)) * self.scale + self.shift


class Frozen(HeadFirst):
    """The body runs without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(x).mean((2, 3))
        return self.classifier(x)


class TwoHeads(HeadFirst):
    """The mean of two heads, and weights that no logit depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(8, 4, 1)
        self.unused = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return (self.classifier(x.mean((2, 3))) + self.other(x).amax((2, 3))) / 2


@pytest.mark.parametrize(("kind", "names"), [
    (HeadFirst, ["classifier.weight", "classifier.bias"]), (Frozen, ["classifier.weight", "classifier.bias"]),
    (Scaled, ["shift", "scale", "classifier.weight"]),
    (TwoHeads, ["classifier.weight", "classifier.bias", "other.weight", "other.bias"])])
def test_the_head_is_the_last_layer_on_the_way_to_the_output(kind: Any, names: list[str]) -> None:
    model = kind().train()
    assert list(head_parameters(model, torch.randn(1, 3, 8, 8))) == names
    assert all(module.training for module in model.modules()) and model.body[2].num_batches_tracked == 0


@pytest.mark.parametrize(("name", "head"), [
    ("slim_resnet18", "fc"), ("squeezenet1_1", "classifier.1"), ("timm:vit_tiny_patch16_224", "head"),
    ("timm:mobilenetv3_small_050", "classifier"), ("timm:deit_tiny_distilled_patch16_224", "head head_dist")])
def test_heads_of_the_zoos(name: str, head: str) -> None:
    options = {"img_size": 32} if "patch16" in name else {}
    found = head_parameters(make(name, num_classes=3, **options), torch.zeros(1, 3, 32, 32))
    assert " ".join(key.removesuffix(".weight") for key in found if key.endswith(".weight")) == head


@pytest.mark.parametrize("kind", [HeadFirst, Scaled, TwoHeads, Frozen])
def test_classes_are_reordered(kind: Any) -> None:
    torch.manual_seed(0)
    model, images, order = kind().eval(), torch.randn(5, 3, 8, 8), [2, 0, 3, 1]
    before = model(images.clone())
    done = reorder_classes(model, order, images)
    # A shift of two dimensions does not lie along the first, so that the rows alone are not enough.
    assert done == (kind is not Scaled)
    assert torch.allclose(model(images.clone()), before[:, order] if done else before, atol=1e-6)
