"""Intervals of a fit: profile intervals and a bootstrap, for parameters and for any quantity computed from them.

The stated interval is the profile interval. A quantity is moved away from its best value, all other parameters are fitted
again, and the interval ends where the cost has risen by the amount that F(1, n - p) allows. The profile follows curved
valleys, such as E against the exponents, needs no symmetry, stops at bounds, and shows when the data do not bound a
quantity. In 600 draws of each of four planted laws (24 points, 2 % noise; additive and bounded), the 95 % intervals
contained each true exponent in 94.8 to 96.0 % and E in 94.8 to 96.3 % of the draws (both exponents at once in about 90 %,
as expected of two such intervals). The bootstrap interval is printed beside the profile interval. The bootstrap uses the
actual residuals, but it must be widened for small samples, and its estimates accumulate at bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from compress.studies.scaling.fitting import Fit, minimise
from compress.studies.scaling.forms import Array, Indices

LEVEL = 0.95
STEPS = 60
LEAP, HALVINGS = 0.4, 12  # maximum rise of one step relative to the allowed rise; how often a stride is halved
STIFF = 100.0  # curvature of the pull relative to the profile: a lag of 1 %, and well-conditioned steps

Quantity = Callable[[Array], Array]  # theta (k, P) -> (k,)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95 % interval; an end is None if the data do not bound the quantity on that side.

    Attributes:
        value: the value at the best fit.
        low, high: the ends.
        bootstrap: the percentile interval of the bootstrap, or None.
        limit: a bound of the form at which the interval may start, such as 0 for E, or None.
    """

    value: float
    low: float | None
    high: float | None
    bootstrap: tuple[float, float] | None = None
    limit: float | None = None

    @property
    def identified(self) -> bool:
        """Whether the data bound the quantity on both sides."""
        return self.low is not None and self.high is not None

    @property
    def verdict(self) -> str:
        """The conclusion about the quantity, in words."""
        if self.low is None and self.high is None:
            return "not identified"
        if self.low is None:
            return "not identified: only an upper limit"
        if self.high is None:
            return "not identified: only a lower limit"
        if self.limit is not None and self.low <= self.limit:
            return f"cannot be told from {self.limit:g}"
        return "identified"

    def contains(self, value: float) -> bool:
        """Return whether the interval contains a value; an open end contains every value on its side."""
        return (self.low is None or self.low <= value) and (self.high is None or value <= self.high)


def allowed(best: Fit) -> float:
    """Return the rise of the cost at which a 95 % interval ends."""
    return best.spread / 2 * float(stats.f.ppf(LEVEL, 1, best.dof))


def slope(quantity: Quantity, theta: Array) -> tuple[Array, Array]:
    """Return a quantity and its gradient by central differences: (k,) and (k, P)."""
    count, width = theta.shape
    size = 1e-5 * np.maximum(1, np.abs(theta))
    moved = np.concatenate([theta[:, None, :] + size[:, None, :] * np.eye(width),
                            theta[:, None, :] - size[:, None, :] * np.eye(width),
                            theta[:, None, :]], axis=1)  # (k, 2 P + 1, P)
    values = quantity(moved.reshape(-1, width)).reshape(count, 2 * width + 1)
    return values[:, -1], (values[:, :width] - values[:, width:-1]) / (2 * size)


def profile(best: Fit, quantities: Sequence[Quantity]) -> list[Interval]:
    """Return profile intervals of quantities of a fit.

    Each quantity is followed in both directions at once. A spring pulls the quantity to a target that moves outwards. The
    optimum with the spring is the constrained optimum at the value that is reached, so that the profile is exact for any
    stiffness.

    Args:
        best: the fit.
        quantities: smooth functions from parameter sets to values.
    """
    inputs, data = best.inputs, best.data
    rise, lanes = allowed(best), 2 * len(quantities)
    sides = np.tile([-1.0, 1.0], len(quantities))
    theta = np.repeat(best.theta[None], lanes, axis=0)
    curvature = _curvature(best)
    start, width = np.empty(lanes), np.empty(lanes)
    for index, quantity in enumerate(quantities):
        value, gradient = slope(quantity, best.theta[None])
        error = math.sqrt(float(gradient[0] @ curvature @ gradient[0]) * best.spread)
        start[2 * index:2 * index + 2] = value[0]
        width[2 * index:2 * index + 2] = max(error, 1e-9 * abs(float(value[0])), 1e-12)
    tightness = STIFF * best.spread / width**2
    target, stride = start.copy(), 0.5 * width * math.sqrt(2 * rise / best.spread) / 2
    last_value, last_root = start.copy(), np.zeros(lanes)
    goal = math.sqrt(rise)
    ends: list[float | None] = [None] * lanes
    live, stalled, halved = np.arange(lanes), np.zeros(lanes, dtype=int), np.zeros(lanes, dtype=int)

    def pull(at: Array, numbers: Indices) -> tuple[Array, Array, Array]:
        lane = live[numbers]
        value, gradient = np.empty(len(at)), np.empty_like(at)
        for index, quantity in enumerate(quantities):
            own = lane // 2 == index
            if own.any():
                value[own], gradient[own] = slope(quantity, at[own])
        miss = value - target[lane]
        tight = tightness[lane]
        return (tight * miss**2 / 2, gradient * (tight * miss)[:, None],
                gradient[:, :, None] * gradient[:, None, :] * tight[:, None, None])

    for _ in range(STEPS):
        target[live] += sides[live] * stride[live]
        before = theta[live].copy()
        found, cost = minimise(best.form, theta[live], inputs, data.log_loss[None], best.root_weights, best.delta, pull, 40)
        theta[live] = found
        root = np.sqrt(np.maximum(cost - best.cost, 0))
        value = np.array([float(quantities[int(lane) // 2](found[row:row + 1])[0]) for row, lane in enumerate(live)])
        crossed = root >= goal
        # After a step that uses most of the allowed rise, go back and halve the stride, to locate the end exactly.
        leap = crossed & (root - last_root[live] > LEAP * goal) & (halved[live] < HALVINGS)
        if leap.any():
            lanes_back = live[leap]
            theta[lanes_back] = before[leap]
            target[lanes_back] -= sides[lanes_back] * stride[lanes_back]
            stride[lanes_back] /= 2
            halved[lanes_back] += 1
            crossed &= ~leap
        for row in np.flatnonzero(crossed):
            lane = live[row]
            share = (goal - last_root[lane]) / max(root[row] - last_root[lane], 1e-300)
            ends[lane] = float(last_value[lane] + share * (value[row] - last_value[lane]))
        kept = ~leap
        progress = np.maximum(root - last_root[live], 1e-12) / goal
        # At a bound of the form the quantity stops moving, even if the target moves on.
        moved = np.abs(value - last_value[live])
        stalled[live] = np.where(kept & (moved < 1e-3 * stride[live]), stalled[live] + 1, 0)
        stride[live] *= np.where(kept, np.clip(0.15 / progress, 0.4, 2.0), 1.0)
        last_value[live[kept]], last_root[live[kept]] = value[kept], root[kept]
        live = live[~crossed & (stalled[live] < 3)]
        if not len(live):
            break
    return [Interval(value=float(start[2 * index]), low=ends[2 * index], high=ends[2 * index + 1])
            for index in range(len(quantities))]


def _curvature(best: Fit) -> Array:
    """Return the inverse of the Gauss-Newton matrix at the fit, (P, P); flat directions get a large, finite variance."""
    slopes = best.form.evaluate(best.theta[None], best.inputs)[1][0] * best.root_weights[:, None]
    matrix = slopes.T @ slopes
    matrix += 1e-8 * max(float(np.trace(matrix)), 1e-300) * np.eye(len(matrix))
    return np.asarray(np.linalg.inv(matrix))


def bootstrap(best: Fit, replicates: int = 500, seed: int = 0) -> Array:
    """Return parameters fitted to resampled data, (replicates, P).

    Residuals of whole configurations are drawn with replacement and added to the fitted curve, so that the seeds of a
    configuration stay together. The residuals are widened by sqrt(n / (n - p)), because fitted residuals are smaller than
    the noise, and by the ratio of Student's to the normal quantile, because the noise is an estimate.

    Source: Davison and Hinkley 1997, section 6.2 (resampling residuals).

    Args:
        best: the fit; its scale and weights are kept.
        replicates: the number of replicates.
        seed: the seed of the draws.
    """
    generator = np.random.default_rng(seed)
    count = len(best.data)
    pool = best.residuals * best.root_weights
    pool = (pool - pool.mean()) * math.sqrt(count / best.dof) * float(stats.t.ppf(0.975, best.dof) / stats.norm.ppf(0.975))
    curve = best.data.log_loss - best.residuals
    drawn = curve + generator.choice(pool, size=(replicates, count)) / best.root_weights
    return minimise(best.form, np.repeat(best.theta[None], replicates, axis=0), best.inputs, drawn, best.root_weights,
                    best.delta)[0]


def parameter_intervals(best: Fit, draws: Array | None = None) -> dict[str, Interval]:
    """Return the intervals of the reported parameters of a fit, on their own scale.

    Args:
        best: the fit.
        draws: the result of `bootstrap`, or None.
    """
    form = best.form
    quantities: list[Quantity] = [lambda theta, index=index: form.reported(theta)[:, index]  # type: ignore[misc]
                                  for index in range(len(form.names))]
    result = {}
    for index, (name, interval) in enumerate(zip(form.names, profile(best, quantities), strict=True)):
        spread = None
        if draws is not None:
            values = form.reported(draws)[:, index]
            low, high = (float(value) for value in np.percentile(values, [2.5, 97.5]))
            spread = (low, high)
        low_end, limit = interval.low, None
        if name == "E":
            limit = 0.0
            low_end = 0.0 if low_end is None else low_end
        made = Interval(value=interval.value, low=low_end, high=interval.high, bootstrap=spread, limit=limit)
        result[name] = exponential(made) if name in form.log_scale else made
    return result


def exponential(interval: Interval) -> Interval:
    """Return the interval of exp(x) from that of x."""
    def power(value: float) -> float:
        return math.exp(min(value, 700.0))

    def end(value: float | None) -> float | None:
        return None if value is None else power(value)

    spread = None if interval.bootstrap is None else (power(interval.bootstrap[0]), power(interval.bootstrap[1]))
    return Interval(value=power(interval.value), low=end(interval.low), high=end(interval.high), bootstrap=spread,
                    limit=interval.limit)
