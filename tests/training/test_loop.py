"""The training loop: against an uninterrupted run, full precision and closed forms."""

from __future__ import annotations

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
from compress.training.checkpoints import best_file
from compress.training.data import Data, seeded
from compress.training.distillation import cross_entropy
from compress.training.mixup import Batch, mixed
from compress.training.optimizers import OPTIMIZERS
from compress.training.schedules import Plateau
from loaders.arrays import ArrayImages
from loaders.augment import Augmenter
from loaders.catalog import load
from loaders.request import Request
from loaders.splits import Split
from metadata.errors import UserError
from metadata.formats import read_csv
from tests.helpers.commands import PROJECT
from tests.helpers.trainings import assert_same, fit, numbered_images, Says, settings, small_data, WithDropout


def test_mixup_mixes_images_and_both_labels() -> None:
    torch.manual_seed(0)
    labels = torch.arange(8)
    images = nn.functional.one_hot(labels).float().view(8, 8, 1, 1)
    batch = mixed(Batch(images=images, labels=labels, ids=labels, view=0), mixup=0.4)
    assert batch.other_labels is not None and 0 < batch.share < 1
    share = batch.images[:, :, 0, 0]
    for index in range(8):
        other = int(batch.other_labels[index])
        assert float(share[index, index]) == pytest.approx(1.0 if other == index else batch.share)
        assert float(share[index].sum()) == pytest.approx(1.0)
    logits = torch.randn(8, 8)
    value, _ = cross_entropy(0.0)(Says(logits), batch)
    soft = nn.functional.cross_entropy(logits, share)
    assert float(value) == pytest.approx(float(soft), rel=1e-5)


def test_cutmix_pastes_a_box_and_counts_its_pixels() -> None:
    torch.manual_seed(0)
    ids = torch.arange(10, 16)
    images = torch.arange(6).float().view(6, 1, 1, 1).expand(6, 3, 12, 20)
    shares = []
    for _ in range(60):
        batch = mixed(Batch(images=images, labels=ids - 10, ids=ids, view=0), 0.0, 1.0)
        assert batch.other_ids is not None and batch.other_labels is not None
        assert torch.equal(batch.other_ids, batch.other_labels + 10)
        for index, other in enumerate(batch.other_labels.tolist()):
            pasted = batch.images[index] == other
            assert bool((pasted | (batch.images[index] == index)).all()) and bool((pasted == pasted[:1]).all())
            if other != index:
                box = pasted[0].nonzero()
                assert len(box) == 0 or len(box) == int((box.max(0).values - box.min(0).values + 1).prod())
                assert 1 - len(box) / 240 == pytest.approx(batch.share)
        shares.append(batch.share)
    assert bool((images == torch.arange(6).view(6, 1, 1, 1)).all()) and 0.35 < sum(shares) / 60 < 0.75
    both = [mixed(Batch(images=images, labels=ids, ids=ids, view=0), 0.4, 1.0) for _ in range(30)]
    kinds = {bool(batch.images.frac().any()) for batch in both}
    assert kinds == {True, False}  # both, in turn


VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name} for name in OPTIMIZERS},
    "sam over adamw": {"optimizer": "sam", "sam_base": "adamw", "clip": 1.0},
    "average, mixup, parts": {"ema": 0.9, "mixup": 0.5, "cutmix": 1.0, "accumulate": 2},
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


def test_batches_and_sizes_change_with_the_epoch_and_no_step_is_at_rate_zero(tmp_path: Path) -> None:
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
    said = r"c\.pth: (not a|the file is cut short) .*(remove it|remove the training's files) to start from the begin"
    with pytest.raises(UserError, match=said.replace("short)", "short):?")):
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


def test_batches_that_are_too_small_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batches of two or more images, got 1"):
        fit(tmp_path / "c.pth", settings(batch_size=8, accumulate=8))


@pytest.mark.slow
def test_memory_stays_flat_over_epochs(tmp_path: Path) -> None:
    script = f"""
import resource
from pathlib import Path
from compress.training.malloc import keep_freed_memory
from tests.helpers.trainings import fit, settings
keep_freed_memory()
fit(Path({str(tmp_path)!r}) / "1.pth", settings(epochs=20, checkpoint_seconds=100.0, compile=False))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fit(Path({str(tmp_path)!r}) / "2.pth", settings(epochs=100, checkpoint_seconds=100.0, compile=False))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""  # a process of its own, whose peak nothing before has raised
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 * 1024  # kB
