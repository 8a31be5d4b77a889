"""Optimizers, schedules and the training loop: against torch's own, closed forms, and an uninterrupted run."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from architectures.zoo import make
from compress.training.assessment import accuracy_of, assess
from compress.training.averaging import Average
from compress.training.checkpoints import best_file
from compress.training.data import Data, seeded
from compress.training.distillation import cross_entropy
from compress.training.loop import train
from compress.training.mixup import Batch, Loss, mixed
from compress.training.optimizers import Ascent, OPTIMIZERS, frozen_statistics, make_optimizer, parameter_groups
from compress.training.schedules import Plateau, rate_factor
from compress.training.settings import TrainingSettings
from loaders.arrays import ArrayImages
from loaders.augment import Augmenter
from loaders.catalog import load
from loaders.request import Request
from loaders.splits import Split
from metadata.errors import UserError
from metadata.formats import read_csv
from tests.helpers.commands import PROJECT
from tests.helpers.trainings import numbered_images, quiet, small_data

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------------ schedules


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


# ----------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("name", [*sorted(OPTIMIZERS), "sam"])
@pytest.mark.parametrize("model_name", ["slim_resnet18", "timm:mobilenetv3_small_050", "mnist_model_ll"])
def test_every_parameter_in_one_group_and_no_decay_on_vectors(name: str, model_name: str) -> None:
    model = make(model_name, num_classes=3)
    optimizer = make_optimizer(settings(optimizer=name, weight_decay=0.01), model)
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
    optimizer = make_optimizer(settings(optimizer="muon", lr=0.1, momentum=0.0, weight_decay=0.0, adamw_lr=0.003), model)
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


def test_mixup_mixes_images_and_both_labels() -> None:
    torch.manual_seed(0)
    labels = torch.arange(8)
    images = nn.functional.one_hot(labels).float().view(8, 8, 1, 1)
    batch = mixed(Batch(images=images, labels=labels, ids=labels, view=0), alpha=0.4)
    assert batch.other_labels is not None and 0 < batch.share < 1
    share = batch.images[:, :, 0, 0]
    for index in range(8):
        other = int(batch.other_labels[index])
        assert float(share[index, index]) == pytest.approx(1.0 if other == index else batch.share)
        assert float(share[index].sum()) == pytest.approx(1.0)
    logits = torch.randn(8, 8)
    value, _ = cross_entropy(0.0)(_Constant(logits), batch)
    soft = nn.functional.cross_entropy(logits, share)
    assert float(value) == pytest.approx(float(soft), rel=1e-5)


class _Constant(nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits


# -------------------------------------------------------------------------------------------------- training loop


def settings(**changes: Any) -> TrainingSettings:
    """Three epochs of the small data."""
    return TrainingSettings(**{"epochs": 3, "batch_size": 16, "checkpoint_seconds": 0.0, "lr": 0.05, "weight_decay": 1e-4,
                               **changes})


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3),
                                 nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def fit(path: Path, chosen: TrainingSettings, model: nn.Module | None = None, loss: Loss | None = None,
        data: Data | None = None) -> nn.Module:
    with seeded(0, "model"):
        model = model or WithDropout()
    path.parent.mkdir(exist_ok=True)
    tracker = quiet()
    tracker.folder = path.parent
    train(model, data or small_data(), loss or cross_entropy(0.0), chosen, label="training", seed=5, device=CPU,
          checkpoint=path, tracker=tracker)
    return model


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name} for name in OPTIMIZERS},
    "sam over adamw": {"optimizer": "sam", "sam_base": "adamw", "clip": 1.0},
    "average, mixup, parts": {"ema": 0.9, "mixup": 0.5, "accumulate": 2},
    "plateau": {"schedule": "plateau", "patience": 0, "factor": 0.5},
    "stopping, the best kept": {"epochs": 9, "early_patience": 1, "keep": "best", "lr": 0.3},
    "changing batches and sizes": {"batch_size_schedule": {1: 8, 2: 20}, "size_schedule": {0: 6, 1: 8},
                                   "schedule": "one_cycle"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_stopped_training_continues_bit_for_bit(stop: int, variant: str, tmp_path: Path) -> None:
    changes = VARIANTS[variant]
    whole = fit(tmp_path / "whole" / "checkpoint.pth", settings(**changes))
    fit(tmp_path / "parts" / "checkpoint.pth", settings(**changes, max_steps=stop))  # leaves the state of step `stop`
    rest = fit(tmp_path / "parts" / "checkpoint.pth", settings(**changes))
    assert_same(whole, rest)
    rows = [read_csv(tmp_path / name / "metrics.csv") for name in ("whole", "parts")]
    for mine, theirs in zip(*rows, strict=True):
        timing = {"seconds", "images_per_second"}
        assert {key: mine[key] for key in mine.keys() - timing} == {key: theirs[key] for key in theirs.keys() - timing}


def test_training_is_deterministic_and_leaves_global_randomness_alone(tmp_path: Path) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one, two = fit(tmp_path / "1.pth", settings()), fit(tmp_path / "2.pth", settings())
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(one, two)


def test_batches_and_sizes_change_with_the_epoch_and_no_step_is_at_rate_nought(tmp_path: Path) -> None:
    seen = []

    def looking(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((tuple(batch.images.shape), batch.view))
        return cross_entropy(0.0)(model, batch)

    fit(tmp_path / "c.pth", settings(batch_size_schedule={1: 8, 2: 200}, size_schedule={0: 6, 2: 7}, schedule="linear"),
        loss=looking)
    assert seen == [((16, 3, 6, 6), 0)] * 3 + [((8, 3, 6, 6), 1)] * 7 + [((60, 3, 7, 7), 2)]
    rows = read_csv(tmp_path / "metrics.csv")
    assert all(float(row["lr"]) > 0 for row in rows)
    alone = fit(tmp_path / "one" / "c.pth", settings(epochs=1, batch_size=60, warmup=0.5))  # a single step, in the warm-up
    with seeded(0, "model"):
        start = WithDropout()
    assert not torch.equal(alone.net[0].weight, start.net[0].weight)  # type: ignore[union-attr, arg-type, index]


def test_mixup_counts_each_label_by_its_share(tmp_path: Path) -> None:
    labels, others = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 1, 3, 0])
    batch = Batch(images=torch.zeros(4, 1, 1, 1), labels=labels, ids=labels, view=0)
    logits = nn.functional.one_hot(torch.tensor([0, 1, 3, 2]), 4).float()
    assert float(replace(batch, other_labels=others, share=0.7).correct(logits)) == pytest.approx(0.7 + 1.0 + 0.3)
    assert int(batch.correct(logits)) == 2


@pytest.mark.parametrize("damage", ["cut short", "something else", "another model's"])
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    fit(path, settings(max_steps=4))
    if damage == "another model's":
        torch.save({"model": nn.Linear(2, 2).state_dict()}, path)
    else:
        path.write_bytes(path.read_bytes()[:-200] if damage == "cut short" else b"hello")
    with pytest.raises(UserError, match=r"c\.pth: not a .*(remove it|remove the training's files) to start from the begin"):
        fit(path, settings())


@pytest.mark.parametrize("changes", [{}, {"optimizer": "sam"}, {"clip": 0.5}], ids=str)
def test_parts_of_a_batch_are_the_batch(changes: dict[str, Any], tmp_path: Path) -> None:
    def plain() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4))

    whole = fit(tmp_path / "1.pth", settings(**changes), plain())
    parts = fit(tmp_path / "2.pth", settings(**changes, accumulate=3), plain())
    for mine, theirs in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_training_learns_the_digits(tmp_path: Path) -> None:
    splits = load(Request(name="digits"))
    augmenter = Augmenter(names=[], size=(8, 8), padding=0, seed=0, samples=len(splits.train))
    data = Data(train=splits.train, validation=splits.validation, augmenter=augmenter,
                preprocessing=splits.card.preprocessing)
    model = make("slim_resnet18", num_classes=10, width=4, stem="small")
    fit(tmp_path / "c.pth", settings(epochs=4, batch_size=32, lr=0.1), model, data=data)
    assert accuracy_of(model, splits.validation, splits.card.preprocessing) > 0.8


def test_assessment_is_the_mean_loss_and_the_share_that_is_right() -> None:
    data = small_data()
    model = WithDropout().train()
    found = assess(model, data.validation, data.preprocessing, batch_size=7)
    assert model.training
    from loaders.images import normalize
    with torch.no_grad():
        logits = model.eval()(normalize(data.validation.images.batch(torch.arange(60)), data.preprocessing))
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, data.validation.labels)), rel=1e-5)
    assert found.correct == int((logits.argmax(1) == data.validation.labels).sum()) and found.images == 60


def test_early_stopping_ends_with_the_best_epochs_weights(tmp_path: Path) -> None:
    model = fit(tmp_path / "c.pth", settings(epochs=40, early_patience=3, keep="best", lr=0.3, schedule="constant"))
    rows = read_csv(tmp_path / "metrics.csv")
    losses = [float(row["validation_loss"]) for row in rows]
    best = losses.index(min(losses))
    assert len(rows) == best + 4 < 40
    data = small_data()
    assert assess(model, data.validation, data.preprocessing).loss == pytest.approx(losses[best], rel=1e-6)
    assert [path.name for path in tmp_path.glob("best*")] == [best_file(tmp_path / "c.pth", best + 1).name]


def test_plateau_lowers_the_rate(tmp_path: Path) -> None:
    fit(tmp_path / "c.pth", settings(epochs=12, schedule="plateau", patience=1, factor=0.1, lr=0.3, warmup=0.0))
    rows = read_csv(tmp_path / "metrics.csv")
    state, expected = Plateau(patience=1, factor=0.1), []
    for row in rows:
        expected.append(0.3 * state.value)
        state.update(float(row["validation_loss"]))
    assert [float(row["lr"]) for row in rows] == pytest.approx(expected) and expected[-1] < 0.3


def test_without_a_validation_split_the_training_loss_is_watched(tmp_path: Path) -> None:
    data = small_data()
    empty = Split(ArrayImages(numbered_images(1)[:0]), torch.zeros(0, dtype=torch.int64))
    fit(tmp_path / "c.pth", settings(monitor="train", keep="best"),
        data=replace(data, validation=empty))
    rows = read_csv(tmp_path / "metrics.csv")
    assert len(rows) == 3 and "validation_loss" not in rows[0]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_mixed_precision_ends_near_full_precision(optimizer: str, precision: str, tmp_path: Path) -> None:
    changes = {"optimizer": optimizer, "clip": 1.0, "lr": 0.02}
    whole = fit(tmp_path / "1.pth", settings(**changes))
    half = fit(tmp_path / "2.pth", settings(**changes, precision=precision))
    mine, theirs = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (whole, half))
    with seeded(0, "model"):
        start = torch.cat([p.detach().flatten() for p in WithDropout().parameters()])
    assert float((mine - theirs).norm()) < 0.1 * float((mine - start).norm())
    assert half.net[0].weight.dtype == torch.float32  # type: ignore[union-attr, index]


@pytest.mark.parametrize("passes", [{3}, {4}, {3, 4}], ids=str)  # the first pass, the second, both
def test_an_overflow_under_a_loss_scaler_lowers_its_scale_and_goes_on(passes: set[int], tmp_path: Path) -> None:
    seen: list[int] = []

    def sometimes_huge(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        value, logits = cross_entropy(0.0)(model, batch)
        seen.append(len(seen))
        gain = 1e38 if len(seen) in passes else 1.0
        return value + (value - value.detach()) * (gain - 1), logits  # the same loss, a gradient that overflows

    model = fit(tmp_path / "c.pth", settings(precision="float16", optimizer="sam"), loss=sometimes_huge)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    assert len(seen) == 2 * 3 * (60 // 16)
    lowered = torch.load(tmp_path / "c.pth", weights_only=True)["scaler"]["scale"] < 2.0**16
    assert lowered == (4 in passes)  # the step is by the second pass


def test_nan_loss_stops_with_step_rate_and_advice_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    def bad_at_the_sixth(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        value, logits = cross_entropy(0.0)(model, batch)
        calls.append(1)
        return value * (math.nan if len(calls) == 6 else 1.0), logits

    calls: list[int] = []
    path = tmp_path / "c.pth"
    with pytest.raises(UserError, match=r"loss is nan at step 6 \(learning rate .*lower lr.*last good state is kept in"):
        fit(path, settings(), loss=bad_at_the_sixth)
    state = torch.load(path, weights_only=True)
    assert state["step"] == 5 and all(bool(torch.isfinite(tensor).all()) for tensor in state["model"].values())
    with pytest.raises(UserError, match=r"the (loss is (nan|inf)|weights are not finite)"):
        fit(tmp_path / "d.pth", settings(lr=1e12, warmup=0.0))


@pytest.mark.slow
def test_a_network_found_faster_compiled_stays_compiled_in_later_sittings(tmp_path: Path) -> None:
    def network() -> nn.Module:  # without dropout, which draws other numbers in compiled code
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))

    whole = fit(tmp_path / "whole.pth", settings(), network())
    fit(tmp_path / "parts.pth", settings(max_steps=4), network())
    state = torch.load(tmp_path / "parts.pth", weights_only=True)
    assert state["compiled"] is False  # too short to be tried
    torch.save({**state, "compiled": True}, tmp_path / "parts.pth")
    rest = fit(tmp_path / "parts.pth", settings(), network())
    for mine, theirs in zip(whole.state_dict().values(), rest.state_dict().values(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)
    assert torch.load(tmp_path / "parts.pth", weights_only=True)["compiled"] is True


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_first_step_that_the_loss_scaler_skips_leaves_no_trace(optimizer: str) -> None:
    """torch's fused SGD would take the momentum of a skipped first step from uninitialized memory."""
    weights = []
    for gradients in ([1.0], [math.inf, 1.0]):
        layer = nn.Linear(100, 100, bias=False)
        nn.init.ones_(layer.weight)
        moves = make_optimizer(TrainingSettings(optimizer=optimizer, lr=0.1), layer, scaled=True)
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


def test_batches_that_are_too_small_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batches of two or more images, got 1"):
        fit(tmp_path / "c.pth", settings(batch_size=8, accumulate=8))


@pytest.mark.slow
def test_memory_stays_flat_over_epochs(tmp_path: Path) -> None:
    script = f"""
import resource
from pathlib import Path
from compress.training.malloc import keep_freed_memory
from tests.training.test_loop import fit, settings
keep_freed_memory()
fit(Path({str(tmp_path)!r}) / "1.pth", settings(epochs=20, checkpoint_seconds=100.0, compile=False))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fit(Path({str(tmp_path)!r}) / "2.pth", settings(epochs=100, checkpoint_seconds=100.0, compile=False))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""  # a process of its own, whose peak nothing before has raised
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 * 1024  # kB
