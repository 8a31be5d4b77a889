"""The time of a sub-network, from measurements on this machine: a time for each layer by its channels.

Random sub-networks are served and timed one beside another. Times of layers that depend on the channels of both ends are
fitted to the times of whole networks, so that they are those of layers in their place: with what is fused into them, with
caches as the neighbours leave them. Layers that are timed alone, or by a runtime's profiler, do not add up to a network's
time (docs/search.md has the comparison). Some sub-networks are held out, and say how far the prediction is right.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.optimize import nnls

from architectures.counting import layer_costs
from compress.search.space import Choice, Space
from compress.search.terms import ONE, LayerTerms, Terms, layer_terms, total
from compress.search.timings import Backend, Precision, Times, as_served, check_backend, repeat_errors, take_turns, typical
from compress.training.trackers import Tracker
from metadata.errors import VerificationError
from metadata.files import read_json, write_json
from metadata.machine import machine
from metadata.schemas import Strict

CHECKED, CHECKED_SHARE = 30, 0.4  # networks of the check at most, and as a share of all
FEWEST, MOST = 24, 130  # networks in all
MOST_NUMBERS = 3 * 10**8  # stored by all networks together, which are in memory at once
BUILDING = 0.65  # of the time at most goes into making networks ready
MEDIAN_ERROR, P95_ERROR = 0.05, 0.10  # what a prediction should keep
TOO_NOISY = 0.08  # p95 of the difference between two measurements of one network; more rounds are taken above it
SHRINKAGE = (0.01, 0.1, 1.0)  # of the times of layers towards 0, relative to a network's
SHARED_SHRINKAGE = 0.1  # of what layers of a kind share, relative to that
FOLDS = 5
Detail = Literal["kinds", "layers"]
DETAILS: tuple[Detail, ...] = get_args(Detail)
VERSION = 1  # of the measurement: another one is not read from a cache


class CostCheck(Strict):
    """How far the times of random sub-networks are from what was predicted without them.

    Args:
        networks: number of sub-networks.
        fitted: number of others that the prediction was fitted to.
        median_error, p95_error: of the predicted time, relative to the measured one.
        repeat_median, repeat_p95: by which two measurements of one network differ.
        rounds: of the measurement.
    """

    networks: int
    fitted: int
    median_error: float
    p95_error: float
    repeat_median: float
    repeat_p95: float
    rounds: int

    @property
    def noisy(self) -> bool:
        """Whether the prediction is not exact, and cannot be: two measurements of one network differ by as much."""
        return not self.holds and self.repeat_p95 > TOO_NOISY

    @property
    def holds(self) -> bool:
        """Whether the prediction is as exact as it should be."""
        return self.median_error <= MEDIAN_ERROR and self.p95_error <= P95_ERROR

    def __str__(self) -> str:
        return (f"{self.networks} random sub-networks differ from the prediction by {self.median_error:.1%} (median) and "
                f"{self.p95_error:.1%} (p95); two measurements of one differ by {self.repeat_median:.1%} and "
                f"{self.repeat_p95:.1%}; fitted to {self.fitted} others")


class _Measured(Strict):
    """The file of a cache: the times of sub-networks."""

    version: int
    key: str
    choices: list[dict[str, Any]]
    times: list[list[float]]
    machine: dict[str, Any]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """The predicted time of sub-networks.

    Args:
        backend: the runtime.
        precision: of the weights.
        threads: of one inference.
        terms: milliseconds, a constant and the layers'.
        check: how far it is right.
        detail: how much the time of a layer depends on, see `_features`.
        seconds: that the measurement took; 0 where it was read from a cache.
    """

    backend: Backend
    precision: Precision
    threads: int
    terms: Terms
    check: CostCheck
    detail: Detail
    seconds: float

    @property
    def noise(self) -> float:
        """By which share two measurements of one network differ, the p95: smaller differences tell nothing."""
        return self.check.repeat_p95

    def latency_ms(self, choice: Choice) -> float:
        """Return the predicted time of a sub-network at batch 1."""
        return self.terms.value(choice)

    def corrected(self, factor: float) -> CostModel:
        """Return the model for a machine that is slower by a factor, as a measured network has shown."""
        return replace(self, terms=self.terms.scaled(factor))


def measure_costs(space: Space, backend: Backend, precision: Precision, threads: int, seconds: float, tracker: Tracker,
                  cache: Path | None = None) -> CostModel:
    """Return the cost model of a space on this machine, measured or from the cache.

    On a machine that is too noisy to tell networks apart, it measures for twice the time, and warns if that is not enough.

    Args:
        space: the sub-networks.
        backend: the runtime.
        precision: of the weights.
        threads: of one inference.
        seconds: that the measurement should take; some networks are measured in any case.
        tracker: shows progress.
        cache: a folder with a file for each space, runtime, machine and version; None: always measure.

    Raises:
        UserError: the runtime is not installed.
    """
    check_backend(backend)
    key = _key(space, backend, precision, threads)
    path = None if cache is None else cache / f"costs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    found = _cached(path, key)
    if found is not None:
        return _of(space, found, backend, precision, threads, 0.0)
    started = time.monotonic()
    choices, times = measured_times(space, backend, precision, threads, seconds, tracker)
    found = _Measured(version=VERSION, key=key, choices=[choice.to_json() for choice in choices], times=times.tolist(),
                      machine=machine(), seconds=round(time.monotonic() - started, 1))
    model = _of(space, found, backend, precision, threads, found.seconds)
    if path is not None and not model.check.noisy:  # a later search may meet a calmer machine
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found.model_dump())
    if model.check.noisy:
        tracker.warn(f"{backend} {precision}: this machine is too noisy to tell sub-networks apart that differ by less "
                     f"than {model.noise:.0%}; end other work on it, or take a measured limit as that uncertain")
    elif not model.check.holds:
        tracker.warn(f"{backend} {precision}: times of sub-networks are predicted less exactly than {MEDIAN_ERROR:.0%} "
                     f"(median) and {P95_ERROR:.0%} (p95); networks are measured before they train")
    return model


def _of(space: Space, found: _Measured, backend: Backend, precision: Precision, threads: int, seconds: float) -> CostModel:
    """Return the cost model of a file's measurements."""
    choices = [Choice.from_json(choice) for choice in found.choices]
    return fitted(space, choices, np.array(found.times), backend, precision, threads, seconds)


def _key(space: Space, backend: str, precision: str, threads: int) -> str:
    """Return what decides the times, as text: the machine, the runtime with its version, the space."""
    here = machine()
    distributions = {"torch", backend} | ({"onnxruntime"} if precision == "int8" else set())
    return json.dumps([VERSION, here["cpu"], here["flags"], here["cores"], backend, precision, threads, space.fingerprint,
                       torch.backends.cpu.get_cpu_capability(),
                       *sorted(f"{name} {importlib.metadata.version(name)}" for name in distributions)])


def _cached(path: Path | None, key: str) -> _Measured | None:
    """Return what was measured for a key, or None; a damaged file is measured again."""
    if path is None or not path.is_file():
        return None
    try:
        found: _Measured = read_json(path, _Measured)
    except (VerificationError, ValidationError):
        return None
    return found if found.key == key else None


def measured_times(space: Space, backend: Backend, precision: Precision, threads: int, seconds: float, tracker: Tracker,
                   ) -> tuple[list[Choice], Times]:
    """Return sub-networks, those that are checked among them (see `held_out`), and their times, (rounds, networks).

    Args and errors: as for `measure_costs`.
    """
    rng = np.random.default_rng(0)
    choices, answers, numbers = list[Choice](), [], 0
    started = time.monotonic()
    what = f"{backend} {precision}"
    with tempfile.TemporaryDirectory() as folder, tracker.progress(f"making ready for {what}", "networks") as advance:
        drawn = [space.full(), space.smallest(True)]
        while len(choices) < FEWEST or (len(choices) < MOST and numbers < MOST_NUMBERS
                                        and time.monotonic() - started < BUILDING * seconds):
            choice = drawn.pop(0) if drawn else space.random(rng, drop=True)
            shape = space.shape(choice)
            answers.append(as_served(shape, backend, precision, threads, Path(folder)))
            choices.append(choice)
            numbers += sum(cost.parameters for cost in layer_costs(shape).values())
            advance(len(choices), MOST)
    with tracker.progress(f"timing on {what}", "rounds") as advance:
        left = seconds - (time.monotonic() - started)
        times = take_turns(answers, space.architecture.input_shape, threads, left, rng, advance)
        if float(np.quantile(repeat_errors(times), 0.95)) > TOO_NOISY:
            tracker.say(f"  {what}: the machine is noisy; more rounds are taken")
            times = np.concatenate([times, take_turns(answers, space.architecture.input_shape, threads, seconds, rng)])
    return choices, times


def held_out(choices: Sequence[Choice]) -> NDArray[np.bool_]:
    """Return which networks are checked: some that are not among the others, where there are such."""
    so_far = np.floor(CHECKED_SHARE * np.arange(len(choices) + 1)).clip(max=CHECKED)
    held = np.diff(so_far) > 0
    others = {choice for choice, checked in zip(choices, held, strict=True) if not checked}
    new: NDArray[np.bool_] = held & np.array([choice not in others for choice in choices])
    return new if new.any() else held


# ------------------------------------------------------------------------------------------------------------ the fit


def fitted(space: Space, choices: Sequence[Choice], times: Times, backend: Backend, precision: Precision, threads: int,
           seconds: float = 0.0) -> CostModel:
    """Return the cost model of measured sub-networks.

    Some networks are held out for the check; after it, the model is fitted to all.

    Args:
        space: the sub-networks.
        choices: those that were measured.
        times: milliseconds, (rounds, networks).
        backend, precision, threads: how they were served.
        seconds: that the measurement took.
    """
    typical_ms, repeats, held = typical(times), repeat_errors(times), held_out(choices)
    layers = layer_terms(space)
    features, shrinkages, rows = {}, {}, {}
    for detail in DETAILS:
        features[detail], shrinkages[detail] = _features(layers, detail, space)
        rows[detail] = np.array([[feature.value(choice) for feature in features[detail]] for choice in choices])
    _, detail, shrinkage = min(
        (_cross_validated(rows[detail][~held], typical_ms[~held], shrinkage * shrinkages[detail]), detail, shrinkage)
        for detail in DETAILS for shrinkage in SHRINKAGE)
    pull = shrinkage * shrinkages[detail]
    errors = np.abs(rows[detail][held] @ _fit(rows[detail][~held], typical_ms[~held], pull) / typical_ms[held] - 1)
    check = CostCheck(
        networks=int(held.sum()), fitted=int((~held).sum()), median_error=float(np.median(errors)),
        p95_error=float(np.quantile(errors, 0.95)), repeat_median=float(np.median(repeats)),
        repeat_p95=float(np.quantile(repeats, 0.95)), rounds=len(times))
    found = _fit(rows[detail], typical_ms, pull)
    terms = total((feature.scaled(float(each)) for feature, each in zip(features[detail], found, strict=True)),
                  space.options)
    return CostModel(backend=backend, precision=precision, threads=threads, terms=terms, check=check, detail=detail,
                     seconds=seconds)


def _features(layers: Sequence[LayerTerms], detail: Detail, space: Space) -> tuple[list[Terms], Times]:
    """Return what the time of a network is a sum of, with a factor for each that is not negative, and their shrinkage.

    Args:
        layers: with weights.
        detail: "kinds": layers of a kind share the factors of their multiply-adds, of the values at their ends, and of
            pixels with an uneven number of channels; "layers": each layer has factors of its own besides.
        space: of the layers.
    """
    options = space.options
    found = [ONE.over(ONE, options, frozenset()), total((layer.there for layer in layers), options)]
    for kind in dict.fromkeys(layer.kind for layer in layers):
        alike = [layer for layer in layers if layer.kind == kind]
        found.append(total((layer.product.scaled(layer.macs) for layer in alike), options))
        found.append(total((layer.ends.scaled(layer.values) for layer in alike), options))
        found += [total((uneven.scaled(layer.pixels) for layer, uneven in zip(alike, sides, strict=True)), options)
                  for sides in zip(*(layer.uneven for layer in alike), strict=True)]
    found = [terms.scaled(1 / largest) for terms in found if (largest := terms.largest()) > 0]
    shared = len(found)
    if detail == "layers":
        found += [part for layer in layers for part in (layer.there, layer.product, layer.ends)]
    return found, np.where(np.arange(len(found)) < shared, SHARED_SHRINKAGE, 1.0)


def _fit(rows: Times, times: Times, shrinkage: Times) -> Times:
    """Return the factor of each feature, none below 0, by least squares of the relative error.

    Args:
        rows: (networks, features).
        times: (networks,) milliseconds.
        shrinkage: (features,) of the factors towards 0.
    """
    ridge = np.diag(shrinkage / float(times.mean()))
    found, _ = nnls(np.vstack([rows / times[:, None], ridge]), np.r_[np.ones(len(times)), np.zeros(rows.shape[1])],
                    maxiter=100 * rows.shape[1])
    return found  # type: ignore[no-any-return]


def _cross_validated(rows: Times, times: Times, shrinkage: Times) -> float:
    """Return the mean relative error on networks that each fit leaves out."""
    folds = np.arange(len(times)) % FOLDS
    errors = np.zeros(len(times))
    for fold in range(FOLDS):
        inside = folds != fold
        errors[~inside] = np.abs(rows[~inside] @ _fit(rows[inside], times[inside], shrinkage) / times[~inside] - 1)
    return float(errors.mean())
