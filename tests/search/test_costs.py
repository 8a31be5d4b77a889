"""The cost model: it finds the times of layers again, says how exact it is, and is measured once for a machine."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from architectures.build import build
from compress.search.costs import CostModel, fitted, held_out, measure_costs
from compress.search.space import Choice
from compress.search.terms import ONE, Terms, layer_terms, total
from compress.search.timings import as_served, check_backend, repeat_errors, take_turns, typical
from compress.training.trackers import Tracker
from metadata.errors import UserError
from tests.search.networks import space


def tracker() -> tuple[Tracker, io.StringIO]:
    text = io.StringIO()
    return Tracker(Console(file=text, width=200)), text


def true_times(name: str, uneven: float = 0.0) -> Terms:
    """Times of layers that depend on the channels of both ends, in ms."""
    own = space(name)
    rng = np.random.default_rng(4)
    parts = [ONE.over(ONE, own.options, frozenset()).scaled(0.05)]
    for layer in layer_terms(own):
        parts += [layer.there.scaled(0.002), layer.ends.scaled(0.01 * rng.uniform(0.5, 2)),
                  layer.product.scaled(1e-7 * layer.macs * rng.uniform(0.7, 1.3)),
                  *(part.scaled(uneven * layer.pixels * 1e-5) for part in layer.uneven)]
    return total(parts, own.options)


def drawn(name: str, count: int) -> list[Choice]:
    rng = np.random.default_rng(1)
    return [space(name).full(), space(name).smallest(True), *(space(name).random(rng, drop=True) for _ in range(count - 2))]


def measured(terms: Terms, choices: list[Choice], noise: float = 0.02, rounds: int = 12) -> np.ndarray:
    """Times of a machine that is slow in some rounds, and noisy."""
    rng = np.random.default_rng(2)
    exact = np.array([terms.value(choice) for choice in choices])
    return exact * rng.uniform(1, 1.6, (rounds, 1)) * np.exp(noise * rng.standard_normal((rounds, len(choices))))


def model(name: str, terms: Terms, noise: float = 0.02, count: int = 90) -> CostModel:
    choices = drawn(name, count)
    return fitted(space(name), choices, measured(terms, choices, noise), "torch", "float32", 1)


@pytest.mark.parametrize("name", ["slim", "compact"])
def test_times_of_layers_are_found_again(name: str) -> None:
    """On sub-networks that were not measured, up to the speed of the machine in a calm round."""
    terms = true_times(name)
    found = model(name, terms)
    assert found.check.holds and not found.check.noisy and found.check.networks == 30 and found.check.fitted == 60
    others = [space(name).random(np.random.default_rng(seed), drop=True) for seed in range(50, 90)]
    ratios = np.array([found.latency_ms(choice) / terms.value(choice) for choice in others])
    assert np.quantile(np.abs(ratios / np.median(ratios) - 1), 0.95) < 0.05


def test_channels_that_are_no_multiple_of_sixteen_may_be_slow() -> None:
    terms = true_times("compact", uneven=3.0)
    widths = dict(space("compact").full().widths)
    assert widths["stages.0.1.body.0"] == 32
    odd = Choice(widths={**widths, "stages.0.1.body.0": 24})
    assert terms.value(odd) > terms.value(space("compact").full())
    found = model("compact", terms)
    assert found.check.holds and found.latency_ms(odd) > found.latency_ms(space("compact").full())


def test_a_dropped_block_takes_no_time() -> None:
    own = space("slim")
    found = model("slim", true_times("slim"))
    without = Choice(widths=own.full().widths, dropped=frozenset({"layer1.1"}))
    assert found.latency_ms(without) < 0.98 * found.latency_ms(own.full())
    assert found.corrected(1.5).latency_ms(without) == pytest.approx(1.5 * found.latency_ms(without))


def test_noise_is_told_apart_from_a_wrong_model() -> None:
    noisy = model("slim", true_times("slim"), noise=0.6, count=40)
    assert noisy.check.noisy and not noisy.check.holds and noisy.noise > 0.2
    quiet = model("slim", true_times("slim"), noise=0.01, count=40)
    assert quiet.noise < 0.02 and quiet.check.repeat_median < 0.01
    text = str(noisy.check)
    assert f"{noisy.check.p95_error:.1%}" in text and f"{noisy.check.repeat_p95:.1%}" in text


def test_what_slows_a_whole_round_counts_for_nothing() -> None:
    exact = np.array([1.0, 2.0, 5.0])
    times = exact * np.array([[1.0], [3.0], [1.0], [1.0], [1.1], [1.0], [9.0]])
    times[2, 1] = 40  # and one that hits one network
    assert typical(times) == pytest.approx(exact)
    assert repeat_errors(times) == pytest.approx([0, 0, 0])


def test_repeat_errors_are_those_of_whole_measurements() -> None:
    rng = np.random.default_rng(0)
    first, second = (typical(np.exp(0.1 * rng.standard_normal((16, 4000)))) for _ in range(2))
    assert np.median(repeat_errors(np.exp(0.1 * rng.standard_normal((16, 4000))))) == pytest.approx(
        np.median(np.abs(first / second - 1)), rel=0.15)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_shape_is_served_on_each_runtime(backend: str, precision: str, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    shape = space("little").shape(space("little").smallest(drop=True))
    answer = as_served(shape, backend, precision, 1, tmp_path)  # type: ignore[arg-type]
    image = torch.randn(1, *shape.input_shape, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    with torch.inference_mode():
        expected, found = build(shape).eval()(image), answer(image)
    assert found.shape == (1, 5)
    close = 1e-4 if precision == "float32" else 0.3
    assert (found - expected).abs().max() < close * expected.abs().max()


def test_rounds_take_all_networks_in_orders_of_their_own() -> None:
    seen: list[int] = []
    answers = [lambda image, number=number: seen.append(number) or image for number in range(5)]
    times = take_turns(answers, (3, 4, 4), 1, 0.0, np.random.default_rng(0))
    assert times.shape == (4, 5) and (times > 0).all()
    orders = np.array(seen).reshape(4, 5, 7)
    assert (orders == orders[:, :, :1]).all() and all(sorted(order) == list(range(5)) for order in orders[:, :, 0].tolist())
    assert len({tuple(order) for order in orders[:, :, 0].tolist()}) > 1


def test_a_runtime_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="expected torch, onnxruntime, openvino, got 'tensorrt'"):
        check_backend("tensorrt")


def test_real_networks_are_measured() -> None:
    own = space("little")
    found = measure_costs(own, "onnxruntime", "float32", 1, 0.1, tracker()[0])
    assert found.check.networks + found.check.fitted == 24 and found.seconds > 0
    assert 0 < found.latency_ms(own.smallest(True)) < found.latency_ms(own.full())


class Machine:
    """Times the sub-networks that `measured_times` draws."""

    def __init__(self) -> None:
        self.noise, self.taken = 0.01, list[int]()

    def take_turns(self, answers: list[None], *arguments: object) -> np.ndarray:
        self.taken.append(len(answers))
        own, rng = space("little"), np.random.default_rng(0)
        choices = [own.full(), own.smallest(True), *(own.random(rng, drop=True) for _ in answers[2:])]
        return measured(true_times("little"), choices, self.noise, rounds=8)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine that is as noisy as the test wants."""
    there = Machine()
    monkeypatch.setattr("compress.search.costs.as_served", lambda *arguments: None)
    monkeypatch.setattr("compress.search.costs.take_turns", there.take_turns)
    return there


def test_costs_are_measured_once(tmp_path: Path, machine: Machine) -> None:
    own = space("little")
    found = measure_costs(own, "onnxruntime", "float32", 1, 0.1, tracker()[0], tmp_path)
    again = measure_costs(own, "onnxruntime", "float32", 1, 0.1, tracker()[0], tmp_path)
    assert machine.taken == [24] and again.seconds == 0 and again.check == found.check
    assert again.latency_ms(own.full()) == found.latency_ms(own.full())
    path, = tmp_path.iterdir()
    path.write_text("{}")  # damaged
    measure_costs(own, "onnxruntime", "float32", 1, 0.1, tracker()[0], tmp_path)
    assert len(machine.taken) == 2 and path.stat().st_size > 2
    for backend, precision, threads in (("torch", "float32", 1), ("onnxruntime", "int8", 1), ("onnxruntime", "float32", 2)):
        measure_costs(own, backend, precision, threads, 0.1, tracker()[0], tmp_path)  # type: ignore[arg-type]
    assert len(machine.taken) == 5 and len(list(tmp_path.iterdir())) == 4


def test_what_a_noisy_machine_measures_is_not_kept(tmp_path: Path, machine: Machine) -> None:
    """The search says so, and measures for longer."""
    machine.noise = 0.8
    shown, text = tracker()
    found = measure_costs(space("little"), "torch", "float32", 1, 0.1, shown, tmp_path)
    assert found.check.noisy and machine.taken == [24, 24] and found.check.rounds == 16
    assert "the machine is noisy; more rounds are taken" in text.getvalue()
    assert "too noisy to tell sub-networks apart" in text.getvalue()
    assert list(tmp_path.iterdir()) == []


def test_what_is_checked_is_not_among_what_is_learned_from() -> None:
    choices = drawn("little", 90)
    held = held_out(choices)
    assert 10 < held.sum() <= 30
    assert {choice for choice, checked in zip(choices, held, strict=True) if checked}.isdisjoint(
        choice for choice, checked in zip(choices, held, strict=True) if not checked)
    assert held_out(choices[:1] * 9).sum() == 3  # there is but one
