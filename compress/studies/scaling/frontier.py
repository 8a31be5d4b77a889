"""The compute-optimal frontier: the best N and D for a budget, with bands."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from compress.studies.scaling.fitting import Fit, Observations
from compress.studies.scaling.forms import Array, Indices
from compress.studies.scaling.intervals import Interval, LEVEL, profile


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The compute-optimal split for each budget, for one or many parameter sets.

    Attributes:
        compute: budgets, (budgets,), in the unit of N * D * epochs.
        n, d: the best parameters and examples, (sets, budgets); NaN if one of the two powers has no slope.
        loss: the loss at the optimum, (sets, budgets).
    """

    compute: Array
    n: Array
    d: Array
    loss: Array


def optimum(best: Fit, theta: Array, compute: Array, epochs: float) -> Optimum:
    """Return N* and D* that minimise the form at N * D * epochs = C.

    Every joint form is an increasing function of X N^-x + Y N^c D^-y; hence N* = G (C / epochs)^(y / (x + y + c)) with
    G = (x X / ((y + c) Y))^(1 / (x + y + c)).

    Source: Hoffmann et al. 2022, equation 4, for c = 0.

    Args:
        best: the fit whose form is used.
        theta: parameter sets, (sets, P).
        compute: budgets, (budgets,).
        epochs: passes over the data.
    """
    terms = best.form.frontier_terms(theta)
    rising = terms.y + terms.cross  # with N, where D = C / (N epochs)
    total = (terms.x + rising)[:, None]
    budget = np.log(compute / epochs)[None]
    log_gain = (np.log(terms.x) + terms.log_x - np.log(rising) - terms.log_y)[:, None] / total
    log_n = log_gain + terms.y[:, None] / total * budget
    log_d = budget - log_n
    inputs = np.stack([log_n, log_d], axis=2) - best.form.centre  # (sets, budgets, 2)
    loss = np.exp(best.form.evaluate(theta, inputs)[0])
    return Optimum(compute=compute, n=np.exp(np.minimum(log_n, 600)), d=np.exp(np.minimum(log_d, 600)), loss=loss)


def exponents(best: Fit) -> tuple[Interval, Interval]:
    """Return the exponents p and 1 - p of N* ~ C^p and D* ~ C^(1 - p), with profile intervals."""
    def share(theta: Array) -> Array:
        terms = best.form.frontier_terms(theta)
        return np.asarray(terms.y / (terms.x + terms.y + terms.cross))
    first = profile(best, [share])[0]
    return first, Interval(value=1 - first.value, low=None if first.high is None else 1 - first.high,
                           high=None if first.low is None else 1 - first.low)


def band(draws: Array) -> tuple[Array, Array]:
    """Return the ends of the middle 95 % over parameter sets: (budgets,) each from (sets, budgets)."""
    low, high = np.nanpercentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0)
    return low, high


def empirical_frontier(data: Observations) -> Indices:
    """Return the indices, by compute, of the points with a lower loss than every point of the same or less compute."""
    order = np.lexsort((data.log_loss, data.values["C"]))
    kept, lowest = [], math.inf
    for index in order:
        if data.log_loss[index] < lowest:
            kept.append(int(index))
            lowest = float(data.log_loss[index])
    return np.array(kept, dtype=np.intp)
