"""How exactly the time of a sub-network is foretold: 30 random ones, measured whole, on each runtime, in float and in int8.

    nice python -m benchmarks.search_costs [--networks slim_resnet18] [--backends torch onnxruntime] [--seconds 120]

Three predictions are compared: the cost model of `compress/search/costs.py`; multiply-adds, with a constant and a factor;
and tables of layers: for ONNX files, each layer's time by the runtime's profiler in the same networks, fitted layer by
layer, with a constant and a factor for what the profiler does not see. All learn from the same networks and are checked on
the same others. The error of a second measurement stands beside. A solver looks for what a model gets wrong: so solutions
under limits of time, for values that are drawn at random, are measured beside as many other random sub-networks.
Write benchmarks/results/search_costs.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from scipy.optimize import nnls

sys.path.insert(0, str(Path(__file__).parents[1]))

from architectures.describe import lower
from architectures.zoo import make
from compress.quantization.layer_times import layer_times
from compress.search.costs import CostModel, fitted, held_out, measured_times
from compress.search.solve import Limits, solve
from compress.search.space import Choice, Space
from compress.search.terms import layer_terms
from compress.search.timings import BACKENDS, Backend, Precision, as_served, random_onnx, take_turns, typical
from compress.training.trackers import Tracker
from metadata.files import read_json, write_json
from metadata.machine import machine, versions
from metadata.schemas import Strict

RESULTS = Path(__file__).parent / "results" / "search_costs.json"
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {  # the zoo's name, its options, pixels
    "slim_resnet18": ("slim_resnet18", {"width": 16, "stem": "small"}, 32),
    "compact_net": ("compact_net", {}, 32),
    "mobilenet_v2": ("torchvision:mobilenet_v2", {}, 64),
}
PREDICTIONS = ("cost_model", "layers_by_profiler", "multiply_adds", "solutions", "second_measurement")
SOLUTIONS, SOLUTION_SECONDS = 16, 30.0
Array = NDArray[np.float64]


class Record(Strict):
    """The file of results."""

    rows: dict[str, dict[str, Any]]


def errors_of(predicted: Array, times: Array) -> dict[str, float]:
    """Return the relative errors of a prediction: median and p95."""
    errors = np.abs(predicted / times - 1)
    return {"median": round(float(np.median(errors)), 4), "p95": round(float(np.quantile(errors, 0.95)), 4)}


def with_constant(numbers: Array, times: Array, held: NDArray[np.bool_]) -> dict[str, float]:
    """Return the errors of a constant and a factor times a number of each network, learned from those not held out."""
    rows = np.stack([np.ones_like(numbers), numbers / numbers.max()], 1)
    found, _ = nnls(rows[~held] / times[~held, None], np.ones(int((~held).sum())))
    return errors_of(rows[held] @ found, times[held])


def by_layers(space: Space, choices: Sequence[Choice], times: Array, backend: Backend, precision: Precision,
              held: NDArray[np.bool_]) -> dict[str, float]:
    """Return the errors of tables of layers: each layer's time by the profiler, by the channels at its ends."""
    image = torch.randn(1, *space.architecture.input_shape).numpy()
    taken = [layer_times(random_onnx(space.shape(choice), precision), backend, image) if not checked else {}
             for choice, checked in zip(choices, held, strict=True)]
    sums = np.zeros(len(choices))
    for terms in layer_terms(space):
        rows = np.array([[part.value(choice) for part in (terms.there, terms.ends, terms.product, *terms.uneven)]
                         for choice in choices])
        known = np.array([terms.name in found for found in taken])
        if known.any():
            own = np.array([found[terms.name] for found in taken if terms.name in found])
            sums += rows @ nnls(rows[known], own)[0]
    return with_constant(sums, times, held)


@dataclass(frozen=True)
class Drawn:
    """A value model with losses that are drawn at random and grow with what is removed."""

    terms: dict[str, dict[int, float]]
    blocks: dict[str, float]

    @classmethod
    def of(cls, space: Space, rng: np.random.Generator) -> Drawn:
        """Return the losses for a space."""
        terms = {group.name: dict(zip(group.options, [*np.cumsum(rng.random(len(group.options) - 1))[::-1].tolist(), 0.0],
                                      strict=True)) for group in space.groups}
        return cls(terms, {block.name: float(2 * rng.random()) for block in space.blocks})


def of_solutions(space: Space, model: CostModel, tracker: Tracker) -> dict[str, float]:
    """Return how far solutions are from their predicted times, up to the machine's speed as random sub-networks show it."""
    rng = np.random.default_rng(1)
    whole = model.latency_ms(space.full())
    found = set[Choice]()
    for number, share in enumerate(np.linspace(0.15, 0.8, SOLUTIONS)):
        drop = bool(number % 2)
        least = model.latency_ms(space.smallest(drop))
        limits = Limits(latency_ms=least + share * (whole - least))
        found.add(solve(space, model, Drawn.of(space, rng), limits, form="float32", drop=drop).choice)
    choices = [*found, *(space.random(rng, drop=True) for _ in found)]
    with tempfile.TemporaryDirectory() as folder:
        answers = [as_served(space.shape(choice), model.backend, model.precision, 1, Path(folder)) for choice in choices]
    times = typical(take_turns(answers, space.architecture.input_shape, 1, SOLUTION_SECONDS, rng))
    ratios = times / np.array([model.latency_ms(choice) for choice in choices])
    solved, others = ratios[:len(found)], ratios[len(found):]
    tracker.say(f"  solutions take {np.median(solved) / np.median(others):.3f} of what other sub-networks lead to expect")
    return errors_of(np.full(len(found), np.median(others)), solved) | {
        "bias": round(float(np.median(solved) / np.median(others)) - 1, 4), "networks": len(found)}


def one_row(space: Space, backend: Backend, precision: Precision, seconds: float, tracker: Tracker) -> dict[str, Any]:
    """Return the errors on one runtime."""
    started = time.monotonic()
    choices, rounds = measured_times(space, backend, precision, 1, seconds, tracker)
    spent = time.monotonic() - started
    model = fitted(space, choices, rounds, backend, precision, 1)
    tracker.say(f"{backend} {precision}: {model.check}")
    times, held = typical(rounds), held_out(choices)
    row = {"cost_model": {"median": round(model.check.median_error, 4), "p95": round(model.check.p95_error, 4),
                          "detail": model.detail},
           "multiply_adds": with_constant(np.array([space.macs(choice) for choice in choices], float), times, held)}
    if backend != "torch":
        row["layers_by_profiler"] = by_layers(space, choices, times, backend, precision, held)
    row["solutions"] = of_solutions(space, model, tracker)
    return row | {
        "second_measurement": {"median": round(model.check.repeat_median, 4), "p95": round(model.check.repeat_p95, 4)},
        "networks_checked": model.check.networks, "networks_fitted": model.check.fitted, "rounds": len(rounds),
        "milliseconds": {"least": round(float(times.min()), 4), "whole": round(float(times[0]), 4)},
        "seconds": round(spent, 1), "threads": 1, "machine": machine(), "versions": versions()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["slim_resnet18"])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["torch", "onnxruntime"])
    parser.add_argument("--precisions", nargs="+", choices=get_args(Precision), default=get_args(Precision))
    parser.add_argument("--seconds", type=float, default=120, help="of each measurement")
    arguments = parser.parse_args()
    tracker = Tracker(Console())
    torch.set_num_threads(1)
    rows = read_json(RESULTS, Record).rows if RESULTS.is_file() else {}
    for name in arguments.networks:
        zoo_name, options, pixels = NETWORKS[name]
        found = lower(make(zoo_name, num_classes=10, **options).eval(), (3, pixels, pixels))
        space = Space.of(found.architecture, found.weights)
        for backend in arguments.backends:
            for precision in arguments.precisions:
                row = one_row(space, backend, precision, arguments.seconds, tracker)
                rows[f"{name} {pixels}x{pixels} on {backend}, {precision}"] = row
                write_json(RESULTS, Record(rows=rows).model_dump())
    for name, row in rows.items():
        tracker.say(name + "".join(f"; {key.replace('_', ' ')} {row[key]['median']:.1%}, {row[key]['p95']:.1%}"
                                   for key in PREDICTIONS if key in row))


if __name__ == "__main__":
    main()
