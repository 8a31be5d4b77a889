"""The clock, trainings that fit into a time, the state on disk, and what is said of limits that are missed."""

from __future__ import annotations

import csv
import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from compress.search import serving
from compress.search.clock import SearchClock
from compress.search.entrants import Entrant, RaceState
from compress.search.solve import Limits
from compress.search.timed import in_steps, step_seconds, train_within
from compress.search.verdict import missed, nearest_by_each, violation
from compress.training.distillation import cross_entropy
from compress.training.mixup import Batch
from compress.training.schedules import rate_factor
from tests.helpers.trainings import quiet, settings, small_data, WithDropout
from tests.search.test_race import entrant

COLUMNS = ["candidate", "model", "form", "latency_ms", "size_bytes", "macs", "parameters", "validation_accuracy",
           "validation_images", "round", "status", "settings"]


def test_the_clock_counts_all_sittings(tmp_path: Path) -> None:
    with SearchClock(tmp_path / "clock.json", 60) as clock:
        time.sleep(0.02)
        first = clock.spent
    (tmp_path / "clock.json").write_text(json.dumps({"spent": 50.0}))
    with SearchClock(tmp_path / "clock.json", 60) as clock:
        assert first >= 0.02 and clock.spent >= 50 and 0 < clock.left <= 10
        assert clock.share(0.5) <= 10 and clock.until(55)() and not clock.until(49)()
        assert "of 1 minutes left" in clock.said()
    assert json.loads((tmp_path / "clock.json").read_text())["spent"] >= 50


@pytest.mark.parametrize("steps", [1, 3, 4, 9])
def test_a_schedule_ends_with_its_last_step(steps: int) -> None:
    """Of 60 images in batches of 16 an epoch is 3 steps; the rate falls to its end wherever in an epoch that is."""
    planned = in_steps(settings(schedule="linear", warmup=0.0, epochs=100), steps, 60)
    assert planned.total_steps(60) == steps and not planned.keeps_best
    rates = [rate_factor(planned, (step // 3 + (step % 3 + 0.5) / 3) / planned.epochs, step // 3) for step in range(steps)]
    assert rates == pytest.approx([1 - (step + 0.5) / steps for step in range(steps)])


def test_a_training_takes_as_many_steps_as_there_is_time_for(tmp_path: Path) -> None:
    steps = train_within(WithDropout(), small_data(), cross_entropy(0.0), settings(), left=lambda: 1000.0, pace=100.0,
                         most_steps=12, label="search", seed=0, device=torch.device("cpu"),
                         checkpoint=tmp_path / "checkpoint.pth", tracker=quiet())
    assert steps == 12  # a step takes less than was thought: the most that it may take
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == 12


def test_a_training_whose_steps_became_slow_ends_with_the_time(tmp_path: Path) -> None:
    """A clock on which a step takes ten seconds, where one second was planned."""
    clock = [100.0]

    def loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        clock[0] -= 10
        return cross_entropy(0.0)(model, batch)

    model = WithDropout()
    steps = train_within(model, small_data(), loss, settings(), left=lambda: max(clock[0], 0.0), pace=0.001, most_steps=500,
                         label="search", seed=0, device=torch.device("cpu"), checkpoint=tmp_path / "checkpoint.pth",
                         tracker=quiet())
    assert steps == 10 and clock[0] == 0 and not model.training


def test_a_training_without_time_makes_one_step_and_a_finished_one_gives_its_weights(tmp_path: Path) -> None:
    def trained() -> tuple[int, torch.Tensor]:
        model = WithDropout()
        steps = train_within(model, small_data(), cross_entropy(0.0), settings(), left=lambda: 0.0, pace=1.0, most_steps=9,
                             label="search", seed=0, device=torch.device("cpu"), checkpoint=tmp_path / "checkpoint.pth",
                             tracker=quiet())
        return steps, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    (first, weights), (second, again) = trained(), trained()
    assert first == second == 1 and torch.equal(weights, again)


def test_the_pace_is_measured_without_changing_weights() -> None:
    model = WithDropout()
    before = [parameter.clone() for parameter in model.parameters()]
    assert step_seconds(model, small_data(), cross_entropy(0.0), settings(), torch.device("cpu")) > 0
    assert all(torch.equal(one, other) and other.grad is None
               for one, other in zip(before, model.parameters(), strict=True))


def test_front_has_a_row_for_what_was_measured(tmp_path: Path) -> None:
    state = RaceState(entrants=[entrant(0, latency_ms=0.5, correct=90, images=100), entrant(1)])
    state.save(tmp_path)
    with (tmp_path / "front.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]][:len(COLUMNS)] == COLUMNS and len(rows) == 1
    assert (rows[0]["latency_ms"], rows[0]["validation_accuracy"]) == ("0.5", "0.9")
    assert json.loads(rows[0]["settings"])["widths"] == {"conv": 8}
    assert RaceState.load(tmp_path) == state and RaceState.load(tmp_path / "elsewhere") == RaceState()


def measured(number: int, latency_ms: float, size_bytes: int, correct: int, noise: float = 0.0) -> Entrant:
    return entrant(number, latency_ms=latency_ms, size_bytes=size_bytes, correct=correct, images=100, noise=noise)


def test_a_limit_of_time_is_kept_within_what_can_be_told_and_one_of_bytes_exactly() -> None:
    limits = Limits(latency_ms=1.0, size_kb=10)
    for latency_ms, noise, expected in ((0.99, 0.0, 0), (1.0, 0.0, 0), (1.01, 0.0, 1), (1.029, 0.0, 1), (1.031, 0.0, 2),
                                        (1.05, 0.06, 1)):
        assert violation(measured(1, latency_ms, 10_000, 0, noise=noise), limits) == expected
    assert list(missed(measured(1, 1.0, 10_001, 0), limits)) == ["size_kb"]
    assert list(missed(measured(1, 1.0, 10_000, 89), Limits(min_accuracy=0.9))) == ["min_accuracy"]


def test_what_relaxing_a_limit_would_buy_is_said_for_each() -> None:
    limits = Limits(latency_ms=1.0, size_kb=10, min_accuracy=0.9)
    entrants = [measured(1, 0.9, 9_000, 80), measured(2, 1.2, 9_000, 92), measured(3, 0.9, 14_000, 95)]
    texts = nearest_by_each(entrants, limits)
    assert len(texts) == 3
    expected = (["latency_ms 1.2 instead of 1", "candidate 2"], ["size_kb 14 instead of 10", "candidate 3"],
                ["min_accuracy 0.800 instead of 0.9", "candidate 1"])
    for text, parts in zip(texts, expected, strict=True):
        assert all(part in text for part in parts), text
    assert "misses other limits too" in " ".join(nearest_by_each([measured(1, 2.0, 20_000, 50)], limits))


def test_latencies_are_shares_of_a_reference_at_its_calmest(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that is slow now and then, for all networks alike, until the noise of one asks for more rounds."""
    slowness, asked = itertools.cycle([1.0, 1.0, 3.0]), list[str]()

    def taken(answer: str, input_shape: object, **options: object) -> SimpleNamespace:
        asked.append(answer)
        if answer == "reference":
            taken.slow = next(slowness)  # type: ignore[attr-defined]
        shaky = {"shaky": 1 + 0.5 * (len(asked) % 4)}.get(answer, 1.0)
        return SimpleNamespace(median_ms=taken.slow * shaky * {"reference": 2.0, "quick": 1.0, "shaky": 4.0}[answer])  # type: ignore[attr-defined]

    monkeypatch.setattr(serving, "measure_latency", taken)
    watch = serving.Stopwatch("reference", (3, 8, 8), 1)  # type: ignore[arg-type]
    quick, = watch.times(["quick"])  # type: ignore[list-item]
    assert (quick.latency_ms, quick.noise, watch.calm_ms) == (1.0, 0.0, 2.0)
    assert len(asked) == 2 * serving.ROUNDS
    watch.calm_ms = 0.2
    quick, shaky = watch.times(["quick", "shaky"])  # type: ignore[list-item]
    assert quick.latency_ms == pytest.approx(0.1) and shaky.noise > serving.NOISE and watch.calm_ms == 0.2
    assert len(asked) == 2 * serving.ROUNDS + 3 * serving.MOST_ROUNDS
