"""Describing what users write: every spelling of a call is understood, the rest is refused in one line that names it."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.describe import describe, lower
from metadata.errors import UserError

SHAPE = (3, 8, 8)
Middle = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """A convolution, and what is tried."""

    def __init__(self, middle: Middle, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.middle = middle
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(self, self.conv(x))


class Rows(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.middle(self, self.conv(x)))  # type: ignore[no-any-return]


class Images(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.middle(self, self.conv(x)).mean(dim=(2, 3)))  # type: ignore[no-any-return]


def assert_described(model: nn.Module) -> None:
    model.eval()
    rebuilt = lower(model, SHAPE).build()
    images = torch.randn(5, *SHAPE)
    assert torch.allclose(rebuilt(images), model(images), atol=1e-5)


def refusal(model: nn.Module) -> str:
    with pytest.raises(UserError) as caught:
        describe(model.eval(), SHAPE)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("middle", "width"), [
    (lambda net, x: torch.cat(tensors=[x, x], dim=1), 8), (lambda net, x: torch.cat((x, x), axis=1), 8),
    (lambda net, x: torch.cat(dim=1, tensors=(x, x)), 8), (lambda net, x: torch.concat([x, x], dim=-3), 8),
    (lambda net, x: torch.concatenate([x, x], axis=1), 8), (lambda net, x: torch.add(input=x, other=x), 4),
    (lambda net, x: torch.mul(other=x, input=x), 4), (lambda net, x: torch.add(x, other=x), 4),
    (lambda net, x: x.add(other=x), 4), (lambda net, x: x.mul(other=net.relu(input=x)), 4),
    (lambda net, x: F.relu(input=x), 4), (lambda net, x: torch.relu(input=x), 4), (lambda net, x: F.relu6(input=x), 4),
    (lambda net, x: F.silu(input=x), 4), (lambda net, x: F.hardswish(input=x), 4),
    (lambda net, x: F.gelu(approximate="tanh", input=x), 4), (lambda net, x: torch.sigmoid(input=x), 4),
    (lambda net, x: torch.tanh(input=x), 4), (lambda net, x: F.dropout(p=0.2, input=x, training=net.training), 4),
    (lambda net, x: F.max_pool2d(kernel_size=2, input=x), 4), (lambda net, x: F.max_pool2d(x, kernel_size=2, stride=1), 4),
    (lambda net, x: F.avg_pool2d(input=x, kernel_size=3, padding=1), 4),
    (lambda net, x: F.adaptive_avg_pool2d(output_size=2, input=x), 4), (lambda net, x: x.contiguous(), 4),
    (lambda net, x: torch.mean(input=x, dim=(2, 3), keepdim=True), 4),
    (lambda net, x: x.mean(axis=(2, 3), keepdims=True), 4),
])
def test_every_spelling_of_a_call_is_understood(middle: Middle, width: int) -> None:
    assert_described(Images(middle, width))


@pytest.mark.parametrize("middle", [
    lambda net, x: torch.flatten(input=x, start_dim=1), lambda net, x: torch.flatten(x, start_dim=1, end_dim=3),
    lambda net, x: x.flatten(start_dim=1), lambda net, x: x.view(x.size(0), -1), lambda net, x: x.view(-1, 256),
    lambda net, x: x.reshape(x.shape[0], 256), lambda net, x: x.reshape((x.size(dim=0), -1)),
    lambda net, x: x.reshape(shape=(len_of(x), -1)), lambda net, x: torch.reshape(input=x, shape=(-1, 256)),
    lambda net, x: x.view(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]),
    lambda net, x: x.view(*unpacked(x)), lambda net, x: x.view(x.size(0), x.numel() // x.size(0)),
    lambda net, x: x.view(x.size(0), 4, -1).flatten(1), lambda net, x: x.reshape(x.shape).flatten(1),
    lambda net, x: x.view(x.size()[0], 4, 64).view(x.size(0), -1),
])
def test_every_spelling_of_flattening_is_understood(middle: Middle) -> None:
    assert_described(Rows(middle, 256))


def len_of(x: Tensor) -> int:
    return x.shape[0]


def unpacked(x: Tensor) -> tuple[int, int]:
    batch, channels, height, width = x.shape
    return batch, channels * height * width


@pytest.mark.parametrize("middle", [
    lambda net, x: x * 2, lambda net, x: 2 - x, lambda net, x: x / 3 - 1, lambda net, x: 1 / (x * x + 1), lambda net, x: -x,
    lambda net, x: x * x.shape[1], lambda net, x: x[:, 0:1] * x, lambda net, x: x if x.shape[1] > 2 else -x,
    lambda net, x: x.view(len(x), 2, 2, 8, 8).flatten(1, 2), lambda net, x: x.view(int(x.shape[0]), 4, 64).view(x.shape),
    lambda net, x: sum(x[:, [0]] for _ in range(x.size(1))) + x, lambda net, x: x.float().sum((2, 3), keepdim=True) + x,
    lambda net, x: x.view(x.size(0), 2, 2, 8, 8).transpose(1, 2).reshape(x.size(0), 4, 8, 8),
    lambda net, x: x.roll((1, -3), (2, 3)),
    lambda net, x: torch.stack(x.chunk(2, 1), 2).flatten(1, 2),
    lambda net, x: torch.cat(x.unbind(1)[::-1], 1).unflatten(1, (4, 8)),
    lambda net, x: x.permute(2, 0, 3, 1)[0].unsqueeze(-1).transpose(1, 2), lambda net, x: F.pad(x, (1, 2, 0, 3), value=2.0),
    lambda net, x: F.normalize(x, dim=1), lambda net, x: x.pow(2).add(1).sqrt(), lambda net, x: x.clamp(-1, 0.5).exp(),
    lambda net, x: x[:, torch.tensor([2, 0, 3, 1])], lambda net, x: x[..., None, ::2].squeeze(-2).expand(-1, -1, -1, -1),
    lambda net, x: windows(x).softmax(-1).view(x.shape[0], 4, 4, 4, 4).permute(0, 4, 1, 2, 3).flatten(2, 3),
    lambda net, x: x + torch.arange(8.0), lambda net, x: x.movedim(1, 3).movedim(3, 1),
    lambda net, x: torch.einsum("nchw,ncwv->nchv", x, x), lambda net, x: (x @ x.mT) @ torch.eye(8).roll(1, 0),
    lambda net, x: F.scaled_dot_product_attention(x, x, x * 2, attn_mask=torch.eye(8)),
    lambda net, x: x.mean((2, 3), keepdim=True).expand_as(x) * x,
    lambda net, x: F.interpolate(x, scale_factor=2), lambda net, x: F.interpolate(x, (5, 9), mode="bilinear"),
    lambda net, x: x * F.conv1d(x.mean((2, 3)).unsqueeze(1), torch.ones(1, 1, 3), padding=1).transpose(1, 2).unsqueeze(3),
    lambda net, x: x + torch.arange(8.0).expand(len(x), 1, 8, 8), lambda net, x: x + x.mean(3, keepdim=True).expand_as(x),
    lambda net, x: F.pad(x, (2, 1, 0, 3), mode="reflect"), lambda net, x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    lambda net, x: F.group_norm(x, 2, torch.ones(4)),
    lambda net, x: F.conv2d(x, standardized(net.conv.weight)[:, [0, 1, 2, 0]]),
    lambda net, x: F.layer_norm(x, (8, 8)), lambda net, x: F.group_norm(x, 2), lambda net, x: torch.addcmul(x, x, x),
])
def test_what_moves_and_combines_numbers_is_understood(middle: Middle) -> None:
    assert_described(Images(middle))


def standardized(weight: Tensor) -> Tensor:
    """The weights of a convolution with mean zero and variance one, as in BiT and NFNet."""
    return F.batch_norm(weight.reshape(1, len(weight), -1), None, None, training=True).reshape_as(weight)


def windows(x: Tensor) -> Tensor:
    """(N, C, 8, 8) -> (4 N, 16, C): windows of four by four pixels among the images."""
    count, channels, height, width = x.shape
    x = x.view(count, channels, height // 4, 4, width // 4, 4)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, channels)


@pytest.mark.parametrize(("middle", "said"), [
    (lambda net, x: x.view(7, -1), "shape '[7, -1]' is invalid"),
    (lambda net, x: x / len(x), "does something else for three images than for two"),
    (lambda net, x: x.roll(1, 0), "it works along the images"), (lambda net, x: x[0:1] + x, "it works along the images"),
    (lambda net, x: x.softmax(0), "it works along the images"),
    (lambda net, x: x - x.mean(0, keepdim=True), "along the images"),
    (lambda net, x: x.transpose(0, 1).reshape(x.shape), "a reshape across the images"),
    (lambda net, x: torch.cat([x, x])[:4], "images"), (lambda net, x: x.repeat(1, 2, 1, 1), "repeats numbers"),
    (lambda net, x: x if x.sum() > 0 else -x, "control flow"), (lambda net, x: x[x > 0], "gt"),
    (lambda net, x: torch.cat([x] * x.shape[1]), "along the images"), (lambda net, x: torch.cat(tensors=x, dim=1), "cat"),
    (lambda net, x: torch.cat([x, torch.ones(1, 4, 8, 8)], 1), "Sizes of tensors must match"),
    (lambda net, x: x.cumsum(1), "cumsum"),
    (lambda net, x: {"logits": x}["other"], "other"), (lambda net, x: net.missing(x), "missing"),
    (lambda net, x: x.mean(), "mean"), (lambda net, x: torch.add(x, x, alpha=2), "Add has no option alpha=2"),
    (lambda net, x: x.add(x, alpha=2), "Add has no option alpha=2"), (lambda net, x: x * float("nan"), "nan"),
    (lambda net, x: 1 / 0, "division"), (lambda net, x: [][0], "index"),
])
def test_what_is_refused_names_the_line(middle: Middle, said: str) -> None:
    text = refusal(Net(middle))
    named = re.search(r"layer .*\(test_describe\.py, line (\d+)\): (.*)", text)
    assert named and said in named[2], text
    assert int(named[1]) in (middle.__code__.co_firstlineno, Net.forward.__code__.co_firstlineno + 1), text


@pytest.mark.parametrize(("middle", "said"), [
    (lambda net, x: x.view(1, -1), "must be logits (N, classes), got shape [1, 768] for 3 images"),
    (lambda net, x: x.view(-1, 8, 8), "must be logits (N, classes), got shape [12, 8, 8]"),
    (lambda net, x: x.flatten(0), "must be logits (N, classes), got shape [768]"),
    (lambda net, x: x + torch.arange(float(len(x))).view(-1, 1, 1, 1), "a tensor that depends on the number of images"),
])
def test_what_is_refused_as_a_whole_says_why(middle: Middle, said: str) -> None:
    assert said in refusal(Net(middle))


def test_modules_that_are_not_used_are_named() -> None:
    model = Images(lambda net, x: x)
    model.aux, model.old = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 2)
    text = refusal(model)
    assert "aux.0, aux.1, old have weights that its forward pass does not use" in text and "state_dict" not in text
    model = Images(lambda net, x: x)
    model.scale = nn.Parameter(torch.ones(1))
    assert "scale has weights that its forward pass does not use" in refusal(model)


def noisy(net: Net, x: Tensor) -> Tensor:
    if net.training:
        x = x + torch.randn_like(x)
    return x


@pytest.mark.parametrize("middle", [
    noisy, lambda net, x: net.relu(x) if net.training else x, lambda net, x: F.dropout(x, 0.5 if net.training else 0.0),
    lambda net, x: F.dropout(x) if net.training and x.sum() > 0 else x])
@pytest.mark.parametrize("training", [False, True])
def test_another_forward_pass_in_training_is_refused(middle: Middle, training: bool) -> None:
    model = Images(middle).train(training)
    with pytest.raises(UserError, match=r"test_describe.py, line \d+\).*teacher") as caught:
        describe(model, SHAPE)
    assert "(self.training)" in str(caught.value) and all(module.training == training for module in model.modules())


def test_a_branch_that_is_the_same_in_both_modes_is_taken() -> None:
    for middle in (lambda net, x: F.dropout(x, 0.5, net.training),
                   lambda net, x: [net.relu, net.relu][net.training](x)):
        assert_described(Images(middle))
        describe(Images(middle).train(), SHAPE)


def test_the_line_in_the_users_code_is_named() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.roll(x, 1) if self.training else x.cumsum(1)

    class Forks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    number = Inner.forward.__code__.co_firstlineno + 1
    assert f"layer cumsum (test_describe.py, line {number}): cumsum" in refusal(nn.Sequential(Inner(), nn.Flatten()))
    number = Forks.forward.__code__.co_firstlineno + 1
    assert f"layer 0 (Forks) cannot be traced (test_describe.py, line {number}): " in refusal(nn.Sequential(Forks()))


def test_no_line_outside_the_network_is_named() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    assert refusal(Two()) == "input y: a student takes one tensor, this model takes more"


@pytest.mark.parametrize("condition", ["x.shape[0] == 1", "x.shape[2] == 9", "x.dim() == 5", "len(x.shape) == 3"])
def test_an_assertion_on_a_shape_that_does_not_hold_is_one_line(condition: str) -> None:
    assert "cannot be traced (network.py, line 3): torch.Size([2, 3, 8, 8])" in refusal(asserting(condition))


@pytest.mark.parametrize("condition", ["x.shape[2] == 8", "x.dim() == 4", "x.size(1) > 1 and x.size(2) == 8"])
def test_an_assertion_on_a_shape_that_holds_changes_nothing(condition: str) -> None:
    """Shapes are numbers while a network is traced, so that no version of Python treats their assertions apart."""
    assert_described(asserting(condition))


def asserting(condition: str) -> nn.Module:
    """Return a network that asserts a condition on its input x, in line 3 of a file network.py."""
    scope = {"nn": nn}
    exec(compile(f"class Asserting(nn.Module):\n  def forward(self, x):\n    assert {condition}, x.shape\n"
                 "    return x.mean((2, 3))\n", "/somewhere/network.py", "exec"), scope)
    return scope["Asserting"]()  # type: ignore[operator, no-any-return]


class OwnError(Exception):
    """An error of a user's own."""


@pytest.mark.parametrize("error", [OwnError("mine"), AssertionError(), IndexError("out of range"), KeyError("k"),
                                   ZeroDivisionError("zero"), NotImplementedError(), StopIteration(), OSError("no file")])
@pytest.mark.parametrize("when", ["traced", "run"])
def test_whatever_a_network_raises_is_one_line(error: Exception, when: str) -> None:
    def middle(net: Net, x: Tensor) -> Tensor:
        if when == "traced" or isinstance(x, Tensor):
            raise error
        return x

    refusal(Images(middle))


PIECES: list[Middle] = [
    lambda net, x: net.relu(x), lambda net, x: net.relu(input=x), lambda net, x: x + x, lambda net, x: x.add(other=x),
    lambda net, x: torch.cat(tensors=[x, x], dim=1), lambda net, x: x[:, :4], lambda net, x: x * 0.5,
    lambda net, x: F.max_pool2d(x, 2, ceil_mode=True), lambda net, x: x.view(x.size(0), -1), lambda net, x: x.view(-1, 4),
    lambda net, x: torch.flatten(input=x, start_dim=1), lambda net, x: x.permute(0, 2, 3, 1), lambda net, x: x.mean(1),
    lambda net, x: x.unsqueeze(1), lambda net, x: x.reshape(x.shape[0], x.shape[1], -1), lambda net, x: x.t(),
    lambda net, x: torch.mul(input=x, other=x), lambda net, x: x.mean(dim=-1, keepdims=True), lambda net, x: -x,
    lambda net, x: F.dropout(x, training=net.training), lambda net, x: x.chunk(2, 1)[0], lambda net, x: x.sum() + x,
    lambda net, x: torch.where(x > 0, x, x), lambda net, x: x.transpose(1, -1), lambda net, x: x.split(2, dim=1)[1],
]


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_random_networks_are_described_exactly_or_refused_in_one_line(count: int) -> None:
    draw, described = random.Random(0), 0
    for _ in range(count):
        pieces = draw.choices(PIECES, k=draw.randint(1, 4))

        class Random(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3, padding=1)
                self.relu = nn.ReLU()

            def forward(self, x: Tensor) -> Tensor:
                x = self.conv(x)
                for piece in pieces:  # noqa: B023 - the network is used within the turn
                    x = piece(self, x)  # type: ignore[arg-type]
                return x.flatten(1)

        try:
            assert_described(Random())
            described += 1
        except UserError as error:
            assert "\n" not in str(error)
    assert count / 6 < described < count


class Optional(nn.Module):
    """A network as timm writes them: further arguments with defaults, a norm with its activation, a cache of its own."""

    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, 1e-3))

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.rows = nn.Conv2d(3, 4, 3), self.NormAct(4), nn.BatchNorm1d(4)
        self.bias, self.cache = nn.Parameter(torch.rand(2, 4)), dict[str, Tensor]()

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        if causal or mask is not None:
            raise NotImplementedError
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias[:, torch.tensor([3, 1, 2, 0])]
        x = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        x = self.rows(x.flatten(0, 1)).reshape_as(x)
        return (x + self.cache["bias"].mean(0, keepdim=True)).flatten(1)


class Changing(Images):
    """A network that changes the images that it is given."""

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5)
        return super().forward(x)


def test_a_change_of_the_images_in_place_is_followed() -> None:
    model, images = Changing(lambda net, x: x).eval(), torch.randn(2, 3, 10, 10)
    with torch.no_grad():
        assert torch.equal(lower(model, (3, 10, 10)).build()(images), model(images.clone()))


def test_whatever_stops_the_description_is_one_line() -> None:
    lazy, normed, huge = nn.LazyLinear(3), Images(lambda net, x: x), Images(lambda net, x: x * 3e38)
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(normed.conv)
    leaving = Images(lambda net, x: sys.exit(7))
    for model in (nn.Sequential(nn.Flatten(), lazy), normed, leaving):
        refusal(model)
    nn.init.constant_(huge.fc.weight, 3e38)
    describe(huge, SHAPE)


def test_arguments_with_defaults_caches_and_norms_with_activations() -> None:
    torch.manual_seed(0)
    model = Optional().eval()
    for norm in (model.norm, model.rows):
        torch.nn.init.uniform_(norm.running_mean)
    lowered = lower(model, SHAPE)
    assert not model.cache and {"conv.weight", "rows.weight", "norm.batch_norm.running_mean"} <= lowered.weights.keys()
    images = torch.randn(5, *SHAPE)
    with torch.no_grad():
        assert torch.allclose(lowered.build()(images), model(images), atol=1e-6)
