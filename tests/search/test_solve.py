"""Solving: as good as the best of all sub-networks, one by one, within the gap; limits kept to the byte."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from torch import nn

from architectures.describe import describe
from compress.search.costs import CostCheck, CostModel
from compress.search.solve import GAP, Infeasible, Limits, loss_of, solve
from compress.search.sizes import UNCERTAIN
from compress.search.space import Choice, Space
from compress.search.terms import Terms, layer_terms, total
from metadata.errors import UserError
from tests.helpers.graphs import Residual, graph_of
from tests.helpers.marks import slow_but
from tests.search.networks import space


@dataclass(frozen=True)
class Toy:
    """A value model."""

    terms: dict[str, dict[int, float]]
    blocks: dict[str, float]


def toy(of: Space, seed: int) -> Toy:
    """Losses that grow with what is removed, and nothing else in common."""
    rng = np.random.default_rng(seed)
    terms = {}
    for group in of.groups:
        steps = rng.random(len(group.options) - 1)
        losses = [*np.cumsum(steps[::-1])[::-1].tolist(), 0.0]
        terms[group.name] = dict(zip(group.options, losses, strict=True))
    return Toy(terms, {block.name: float(rng.random() + 0.2) for block in of.blocks})


def random_costs(of: Space, seed: int) -> CostModel:
    """A cost model whose layers have random factors."""
    rng = np.random.default_rng(seed)
    parts = [part.scaled(float(factor)) for layer in layer_terms(of)
             for part, factor in zip((layer.there, layer.ends, layer.product, *layer.uneven), rng.random(7), strict=False)]
    check = CostCheck(networks=1, fitted=1, median_error=0, p95_error=0, repeat_median=0, repeat_p95=0, rounds=1)
    return CostModel(backend="torch", precision="float32", threads=1, terms=total(parts, of.options), check=check,
                     detail="layers", seconds=0)


def all_choices(of: Space, drop: bool) -> Iterator[Choice]:
    blocks = [block.name for block in of.blocks] if drop else []
    seen = set()
    for count in range(len(blocks) + 1):
        for dropped in itertools.combinations(blocks, count):
            for widths in itertools.product(*of.options.values()):
                choice = of.normal(Choice(widths=dict(zip(of.options, widths, strict=True)), dropped=frozenset(dropped)))
                if choice not in seen:
                    seen.add(choice)
                    yield choice


@pytest.fixture(scope="module")
def little() -> Space:
    """A space of some hundred sub-networks."""
    return space("little")


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("share", [0.35, 0.7])
def test_no_sub_network_under_the_limit_of_time_is_better(little: Space, share: float, drop: bool) -> None:
    choices = list(all_choices(little, drop))
    assert len(choices) > 100
    for seed in range(3):
        values, costs = toy(little, seed), random_costs(little, seed)
        limit = costs.latency_ms(little.smallest(drop)) * (1 - share) + share * costs.latency_ms(little.full())
        found = solve(little, costs, values, Limits(latency_ms=limit), form="float32", drop=drop)
        assert found.latency_ms is not None and found.latency_ms == costs.latency_ms(found.choice) <= limit * (1 + 1e-6)
        best = min(loss_of(values, choice) for choice in choices if costs.latency_ms(choice) <= limit)
        assert found.loss <= best * (1 + GAP) + 1e-9
        assert found.gap <= GAP and found.macs == little.macs(found.choice)
        assert drop or not found.choice.dropped
        assert found.loss == loss_of(values, found.choice)


def test_bytes_are_kept_exactly_and_used() -> None:
    """Of all sub-networks of a small space none is better whose file keeps the limit."""
    model = graph_of(Residual(nn.ReLU(), channels=64))
    own = Space.of(describe(model, (3, 16, 16)), model.state_dict())
    sizes = {choice: own.size_bytes(choice, "int8_dynamic") for choice in all_choices(own, drop=True)}
    for seed, limit in enumerate((min(sizes.values()) + 1500, int(np.median([*sizes.values()])))):
        values = toy(own, seed)
        found = solve(own, None, values, Limits(size_kb=limit / 1000), form="int8_dynamic", drop=True)
        expected = min(loss_of(values, choice) for choice, size in sizes.items() if size <= limit)
        assert found.size_bytes == sizes[found.choice] <= limit
        assert found.loss <= expected * (1 + GAP) + 1e-9 and found.latency_ms is None


def test_a_static_file_may_be_larger_with_other_weights(little: Space) -> None:
    """The solution leaves room for it."""
    size = sum(little.size_bytes(choice, "int8_static") for choice in (little.smallest(True), little.full())) // 2
    found = solve(little, None, toy(little, 2), Limits(size_kb=size / 1000), form="int8_static", drop=True)
    assert found.size_bytes <= size - UNCERTAIN["int8_static"] < size


def test_both_limits_hold_together(little: Space) -> None:
    values, costs = toy(little, 7), random_costs(little, 7)
    size = sum(little.size_bytes(choice, "int8_dynamic") for choice in (little.smallest(True), little.full())) // 2
    limits = Limits(latency_ms=0.8 * costs.latency_ms(little.full()), size_kb=size / 1000)
    found = solve(little, costs, values, limits, form="int8_dynamic", drop=True)
    assert found.size_bytes <= size and costs.latency_ms(found.choice) <= limits.latency_ms * (1 + 1e-6)
    one = solve(little, costs, values, Limits(latency_ms=limits.latency_ms), form="int8_dynamic", drop=True)
    assert one.loss <= found.loss * (1 + GAP)


def test_without_limits_nothing_is_removed(little: Space) -> None:
    found = solve(little, None, toy(little, 0), Limits(min_accuracy=0.9), form="float32", drop=True)
    assert found.choice == little.full() and found.loss == 0


@pytest.mark.parametrize("name", slow_but(["slim", "mobile"], ["slim"]))
def test_a_solution_is_better_than_random_ones(name: str) -> None:
    own = space(name)
    values, costs = toy(own, 1), random_costs(own, 1)
    rng = np.random.default_rng(0)
    drawn = [own.random(rng, drop=True) for _ in range(60)]
    limit = float(np.median([costs.latency_ms(choice) for choice in drawn]))
    found = solve(own, costs, values, Limits(latency_ms=limit), form="int8_dynamic", drop=True)
    assert found.gap <= GAP and costs.latency_ms(found.choice) <= limit * (1 + 1e-6)
    assert found.loss < min(loss_of(values, choice) for choice in drawn if costs.latency_ms(choice) <= limit)


def test_limits_that_nothing_can_meet_are_refused_with_the_least_of_both(little: Space) -> None:
    values, costs = toy(little, 0), random_costs(little, 0)
    least = {drop: min(map(costs.latency_ms, all_choices(little, drop))) for drop in (False, True)}
    size = little.size_bytes(little.smallest(True), "float32") / 1000
    with pytest.raises(Infeasible) as error:
        solve(little, costs, values, Limits(latency_ms=least[True] / 2, size_kb=0.1), form="float32", drop=True)
    assert isinstance(error.value, UserError) and error.value.exit_code == 2 and "\n" not in str(error.value)
    assert f"is {least[True]:.4g} ms and {size:.4g} kB" in str(error.value) and "0.1 kB" in str(error.value)
    assert least[True] < least[False]
    with pytest.raises(Infeasible, match="raise a limit"):
        solve(little, costs, values, Limits(latency_ms=sum(least.values()) / 2), form="float32", drop=False)


def test_a_block_of_which_no_value_is_known_stays(little: Space) -> None:
    values, costs = toy(little, 0), random_costs(little, 0)
    known = Toy(values.terms, {"stages.1.1.body": 0.0})
    limit = 0.9 * costs.latency_ms(little.full())
    found = solve(little, costs, known, Limits(latency_ms=limit), form="float32", drop=True)
    assert found.choice.dropped == {"stages.1.1.body"}


def test_the_smallest_file_can_be_asked_for(little: Space) -> None:
    smallest = little.smallest(drop=True)
    limit = little.size_bytes(smallest, "int8_dynamic")
    found = solve(little, None, toy(little, 0), Limits(size_kb=limit / 1000), form="int8_dynamic", drop=True)
    assert found.size_bytes <= limit


def test_terms_add_up_to_the_multiply_adds() -> None:
    rng = np.random.default_rng(0)
    for name in ("slim", "compact"):
        own = space(name)
        macs: Terms = total((layer.product.scaled(layer.macs) for layer in layer_terms(own)), own.options)
        for choice in (own.full(), own.smallest(drop=True), own.random(rng, drop=True)):
            assert macs.value(choice) == pytest.approx(own.macs(choice), rel=1e-9)
