"""What lowering must not lose: weights that are shared, what acts in training alone, and shapes on either device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import architectures.stand_ins
from architectures.counting import architecture_macs, count_macs
from architectures.describe import describe, lower
from architectures.source import source
from architectures.zoo import make
from metadata.errors import UserError
from tests.helpers.marks import slow_but


class Shared(nn.Module):
    """One matrix twice."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(27, 27))
        self.head = nn.Linear(27, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = nn.functional.linear(x.flatten(1), self.w).relu()
        return self.head(nn.functional.linear(rows, self.w))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """One attention over the rows of an image."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1, 2)
        return self.head(self.attention(rows, rows, rows)[0].mean(1))  # type: ignore[no-any-return]


class Detached(nn.Module):
    """A branch that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).detach().mean((2, 3)))  # type: ignore[no-any-return]


class Changed(nn.Module):
    """A bias of which a part is set to zero, as in torchvision's SwinV2."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.bias, self.head = nn.Parameter(torch.randn(6, 12)), nn.Parameter(torch.ones(6)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.clone()
        bias[2:4].zero_()
        bias.mul_(3)
        return self.head(nn.functional.linear(x.flatten(1), self.w, bias))  # type: ignore[no-any-return]


class Partly(nn.Module):
    """A part of the images' own tensor that a statement changes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x[:, 3:].zero_()
        return self.head(x)  # type: ignore[no-any-return]


class Stated(nn.Module):
    """Statements that change the images and an activation's input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5)
        x = self.head(x.flatten(1))
        x.relu_()
        x.mul_(2)
        return x


def test_tensors_that_statements_change_in_place() -> None:
    model = Changed().eval()
    lowered = lower(model, (3, 2, 2))
    biases = [weights for key, weights in lowered.weights.items() if key.endswith("bias") and len(weights) == 6]
    assert [bias.tolist() for bias in biases] == [[3, 3, 0, 0, 3, 3]] and bool((model.bias == 1).all())
    images = torch.randn(2, 3, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(lowered.build()(images), model(images))
    stated = Stated().eval()
    with torch.no_grad():
        torch.testing.assert_close(lower(stated, (3, 2, 2)).build()(images), stated(images.clone()))
    with pytest.raises(UserError, match="zero_ as a statement, which changes a tensor in place"):
        describe(Partly(), (3, 2, 2))


def test_weights_that_two_calls_are_given_are_refused() -> None:
    with pytest.raises(UserError, match="the weights w are used twice; layers that share weights are not in the layer"):
        describe(Shared(), (3, 3, 3))


def test_dropout_of_attention_acts_in_training_and_in_training_alone() -> None:
    model = Attention(0.5).eval()
    lowered = lower(model, (3, 4, 8))
    assert [layer.type for layer in lowered.architecture.layers].count("Dropout") == 1
    rebuilt, images = lowered.build(), torch.randn(2, 3, 4, 8)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(images), model(images))
        assert not torch.equal(rebuilt.train()(images), rebuilt(images))
    plain = [layer.type for layer in describe(Attention(0.0).eval(), (3, 4, 8)).layers]
    assert "ScaledDotProduct" in plain and "Dropout" not in plain


def test_multiply_adds_of_attention_are_those_of_its_layers() -> None:
    """torch runs nn.MultiheadAttention in evaluation as one kernel, into which its counter does not see."""
    model = Attention(0.0).eval()
    rows, width = 12, 8
    macs = rows * width * (3 * width + width) + 2 * rows * rows * width + width * 4
    assert count_macs(model, (3, 4, 8)) == architecture_macs(describe(model, (3, 4, 8))) == macs


def test_a_branch_without_gradients_is_refused() -> None:
    with pytest.raises(UserError, match="detach of a tensor that depends on the images"):
        describe(Detached(), (3, 8, 8))


def test_an_answer_that_depends_on_earlier_calls_is_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.head = 0, nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.head(x.flatten(1) * self.calls)  # type: ignore[no-any-return]

    with pytest.raises(UserError, match="its code keeps a state"):
        describe(Counts(), (3, 2, 2))


@pytest.mark.parametrize(("name", "called"), [("class", "classNetwork"), ("nn", "nnNetwork"), ("Path", "PathNetwork"),
                                              ("super", "superNetwork"), ("Net", "Net")])
def test_names_that_a_class_cannot_have_get_an_ending(name: str, called: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    architecture = describe(model, (3, 2, 2), name)
    assert architecture.model_type == called and f"class {called}(nn.Module)" in source(architecture, "w.pth")
    if name != called:
        with pytest.raises(UserError, match=f"model_type '{name}': .* such as {called}"):
            source(architecture.model_copy(update={"model_type": name}), "w.pth")


@pytest.mark.parametrize("name", slow_but(["torchvision:shufflenet_v2_x0_5", "timm:convnext_atto"], ["timm:convnext_atto"]))
def test_the_device_that_shapes_are_computed_on_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name, num_classes=4).eval()
    on_cpu = describe(model, (3, 64, 64))
    monkeypatch.setattr(architectures.stand_ins, "AFFORDED", 0)
    assert describe(model, (3, 64, 64)) == on_cpu
