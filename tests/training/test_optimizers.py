"""Schedules, optimizers and the average of weights: against torch's own and closed forms."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from architectures.zoo import make
from compress.training.averaging import Average
from compress.training.optimizers import Ascent, OPTIMIZERS, frozen_statistics, make_optimizer, parameter_groups
from compress.training.schedules import Plateau, rate_factor
from compress.training.settings import TrainingSettings
from metadata.errors import UserError
from tests.helpers.trainings import settings


def test_schedules_closed_forms() -> None:
    def factor(name: str, progress: float, epoch: int = 0, **changes: Any) -> float:
        return rate_factor(TrainingSettings(**{"schedule": name, "warmup": 0.0, **changes}), progress, epoch)

    assert factor("cosine", 0.0) == 1.0 and factor("cosine", 0.5) == pytest.approx(0.5)
    assert factor("linear", 0.75) == pytest.approx(0.25) and factor("constant", 0.9) == 1.0
    assert [factor("step", p) for p in (0.4, 0.6, 0.8)] == [1.0, 0.1, 0.01]
    assert [factor("step", 0.0, epoch, step_size=3, gamma=0.5) for epoch in (2, 3, 6)] == [1.0, 0.5, 0.25]
    assert [factor("cosine", p, warmup=0.2) for p in (0.1, 0.2, 0.6)] == pytest.approx([0.5, 1.0, 0.5])
    assert [factor("linear", p, anneal=0.5, lr_floor=0.1) for p in (0.0, 0.25, 0.5, 0.9)] == pytest.approx(
        [1.0, 0.55, 0.1, 0.1])


def test_one_cycle_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.4, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=2001, cycle_momentum=False)
    chosen = TrainingSettings(schedule="one_cycle", warmup=0.0)
    for step in range(2001):
        assert 0.4 * rate_factor(chosen, step / 2000, 0) == pytest.approx(theirs.get_last_lr()[0], abs=1e-3)
        optimizer.step()
        if step < 2000:
            theirs.step()


def test_plateau_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    mine = Plateau(patience=2, factor=0.5)
    for loss in (3.0, 2.0, 2.0, 2.5, 1.99999, 1.0, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1, 0.5):
        mine.update(loss)
        theirs.step(loss)
        assert mine.value == theirs.get_last_lr()[0]
    assert mine.value == 0.125


@pytest.mark.parametrize("name", [*sorted(OPTIMIZERS), "sam"])
@pytest.mark.parametrize("model_name", ["slim_resnet18", "timm:mobilenetv3_small_050", "mnist_model_ll"])
def test_every_parameter_in_one_group_and_no_decay_on_vectors(name: str, model_name: str) -> None:
    model = make(model_name, num_classes=3)
    example = torch.zeros(1, 1, 28, 28) if model_name == "mnist_model_ll" else torch.zeros(1, 3, 32, 32)
    optimizer = make_optimizer(settings(optimizer=name, weight_decay=0.01), model, example)
    seen = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(seen) == sorted(id(parameter) for parameter in model.parameters())
    for group in optimizer.param_groups:
        dims = {parameter.dim() > 1 for parameter in group["params"]}
        assert dims == {group["weight_decay"] > 0}
    assert len(parameter_groups(model, 0.01)) == 2


def test_muon_turns_kernels_as_matrices_and_leaves_the_rest_to_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 4))
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(settings(optimizer="muon", lr=0.1, momentum=0.0, weight_decay=0.0, adamw_lr=0.003), model,
                               torch.zeros(1, 3, 6, 6))
    nn.functional.cross_entropy(model(torch.randn(5, 3, 6, 6)), torch.arange(5) % 4).backward()
    optimizer.step()
    moved = {name: tensor - before[name] for name, tensor in model.state_dict().items() if tensor.dim()}
    singular = torch.linalg.svdvals(moved["0.weight"].view(8, 27))
    raw = torch.linalg.svdvals(model[0].weight.grad.view(8, 27))  # type: ignore[union-attr, operator]
    # Orthogonalised: every direction moves about as far, however unequal the gradient is.
    assert singular.max() / singular.min() < 2.5 < 4 < raw.max() / raw.min()
    for name in ("1.weight", "1.bias", "3.weight"):  # Adam's first step moves every weight by the rate
        assert float(moved[name].abs().median()) == pytest.approx(0.003, rel=0.02), name


def test_sam_steps_by_the_gradient_at_the_climbed_point() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    scale = torch.tensor([1.0, 3.0])

    def gradient() -> None:
        weight.grad = None
        (0.5 * scale * weight**2).sum().backward()

    gradient()
    ascent = Ascent([weight], rho=0.1)
    ascent.up()
    climbed = torch.tensor([1.0, -2.0]) + 0.1 * torch.tensor([1.0, -6.0]) / math.sqrt(37)
    assert torch.allclose(weight, climbed)
    gradient()
    ascent.down()
    assert torch.equal(weight.detach(), torch.tensor([1.0, -2.0]))
    assert weight.grad is not None and torch.allclose(weight.grad, scale * climbed)


def test_sam_climbs_by_rho_whatever_the_loss_scaler_multiplied_by() -> None:
    places = []
    for factor in (1.0, 2.0**16):
        weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        (factor * (weight**2).sum()).backward()
        Ascent([weight], rho=0.5).up(factor)
        places.append(weight.detach())
    assert torch.allclose(places[0], torch.tensor([3.3, 4.4])) and torch.allclose(*places)
    weight.grad = torch.tensor([math.inf, 1.0])
    ascent = Ascent([weight], rho=0.5)
    before = weight.detach().clone()
    ascent.up(2.0**16)
    assert torch.equal(weight.detach(), before)  # an overflow moves nothing, and above all not to NaN


def test_statistics_are_frozen_on_the_second_pass() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    model(torch.randn(6, 3, 5, 5))
    before = copy.deepcopy(model.state_dict())
    with frozen_statistics(model):
        output = model(torch.randn(6, 3, 5, 5) * 5 + 2)
    assert torch.allclose(output.mean((0, 2, 3)), torch.zeros(4), atol=1e-5)  # the batch's own statistics were used
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model(torch.randn(6, 3, 5, 5))
    assert not torch.equal(model.state_dict()["1.running_mean"], before["1.running_mean"])


def test_average_is_the_moving_mean_of_weights_and_statistics() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = Average(model, decay=0.9)
    expected = model[0].weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(2, 2))  # type: ignore[operator]
        model(torch.randn(4, 2))
        average.follow(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()  # type: ignore[operator]
    assert torch.allclose(average.model[0].weight, expected, atol=1e-5)  # type: ignore[index]
    assert average.model[1].num_batches_tracked == 29  # type: ignore[index]
    assert not torch.equal(average.model[1].running_mean, model[1].running_mean)  # type: ignore[index]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_first_step_that_the_loss_scaler_skips_leaves_no_trace(optimizer: str) -> None:
    """torch's fused SGD would take the momentum of a skipped first step from uninitialized memory."""
    weights = []
    for gradients in ([1.0], [math.inf, 1.0]):
        layer = nn.Linear(100, 100, bias=False)
        nn.init.ones_(layer.weight)
        moves = make_optimizer(TrainingSettings(optimizer=optimizer, lr=0.1), layer, torch.zeros(1, 100), scaled=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        for gradient in gradients:
            scaler.scale(torch.zeros(()))  # the scaler begins to work with its first loss
            garbage = torch.full_like(layer.weight, math.nan)
            layer.weight.grad = torch.full_like(layer.weight, gradient * scaler.get_scale())
            del garbage  # what is allocated next may find this memory
            scaler.step(moves)
            scaler.update()
        weights.append(layer.weight.detach().clone())
    assert torch.equal(*weights) and float(weights[0].max()) < 1


class HeadFirst(nn.Module):
    """A network that registers its head before its body."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 12)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


class Recomputed(HeadFirst):
    """A network whose whole forward pass is computed again for its gradients."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.use_reentrant)  # type: ignore[no-any-return]


def test_muon_is_refused_where_the_graph_hides_the_head() -> None:
    chosen, example = settings(optimizer="muon"), torch.zeros(1, 3, 8, 8)
    with pytest.raises(UserError, match=r"^optimizer muon: .*use_reentrant=False"):
        make_optimizer(chosen, Recomputed(True), example)
    make_optimizer(settings(optimizer="adamw"), Recomputed(True), example)
    model = Recomputed(False)
    groups = make_optimizer(chosen, model, example).param_groups
    assert [group["use_fallback"] for group in groups if any(p is model.head.weight for p in group["params"])] == [True]


@pytest.mark.parametrize("name", ["muon", "sam"])
def test_muons_head_is_the_last_layer_on_the_way_to_the_output(name: str) -> None:
    model = HeadFirst()
    chosen = settings(optimizer=name, sam_base="muon", lr=0.1, head_lr=0.05, adamw_lr=0.003)
    optimizer = make_optimizer(chosen, model, torch.zeros(1, 3, 8, 8))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            expected = (parameter is model.head.weight, parameter is model.head.weight or parameter.dim() < 2)
            assert (group["fallback_lr_scale"] == 0.5, group["use_fallback"]) == expected
