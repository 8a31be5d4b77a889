"""Robust fitting of scaling laws: a grid search with non-negative least squares, then a bounded Levenberg-Marquardt.

The solver handles many problems at once (starts, bootstrap replicates, points of a profile): a thousand fits take less than
a second, which makes profile intervals affordable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from compress.studies.scaling.forms import Array, Form, Mask, Indices

HUBER = 2.0  # residuals beyond 2 standard deviations count linearly; for Gaussian noise this costs 1 % of efficiency
FINEST = 1e-6  # lower limit of the noise relative to a loss; data without noise would have no scale
TOLERANCE = 1e-10


@dataclass(frozen=True, kw_only=True)
class Observations:
    """One point for each configuration: the mean over the seeds.

    Attributes:
        values: "N" parameters, "D" examples, "C" compute, each (points,).
        log_loss: mean over the seeds of the log of the loss, (points,).
        runs: the number of seeds of each point, (points,).
        seed_noise: standard deviation of the log loss between seeds, or None if no configuration is repeated.
        squares: sum of the squared deviations of the seeds from their mean, (points,); None if unknown.
    """

    values: dict[str, Array]
    log_loss: Array
    runs: Array
    seed_noise: float | None = None
    squares: Array | None = None

    def __len__(self) -> int:
        return len(self.log_loss)

    def take(self, chosen: Mask | Indices) -> Observations:
        """Return a part of the points, with the noise of all; `chosen` is a mask or an index."""
        return replace(self, values={name: value[chosen] for name, value in self.values.items()},
                       log_loss=self.log_loss[chosen], runs=self.runs[chosen],
                       squares=None if self.squares is None else self.squares[chosen])

    def held_apart(self, chosen: Mask) -> tuple[Observations, Observations]:
        """Return the remaining points, with the noise of their own seeds only, and the chosen, held-out points."""
        rest = self.take(~chosen)
        if rest.squares is not None:
            rest = replace(rest, seed_noise=pooled_noise(rest.squares, rest.runs))
        return rest, self.take(chosen)


def pooled_noise(squares: Array, runs: Array) -> float | None:
    """Return the standard deviation of the log loss between seeds, pooled over configurations; None without repetitions.

    Args:
        squares: sums of the squared deviations of the seeds from their mean, (points,).
        runs: numbers of seeds, (points,).
    """
    freedom = float((runs - 1).sum())
    return float(np.sqrt(squares.sum() / freedom)) if freedom else None


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A form fitted to points.

    Attributes:
        theta: the inner parameters of the form, (P,).
        root_weights: square roots of the weights of the points, (points,); the weights average to 1.
        scale: robust standard deviation of the weighted residuals of log loss.
        delta: the residual at which Huber's loss becomes linear, in log loss.
        cost: sum of Huber's losses, in units of squared log loss (halved).
        spread: variance; twice the rise of the cost divided by the spread follows F(1, n - p).
        run_noise: standard deviation of the log loss of a single run around the fit.
    """

    form: Form
    data: Observations
    theta: Array
    root_weights: Array
    scale: float
    delta: float
    cost: float
    spread: float
    run_noise: float

    @property
    def dof(self) -> int:
        """Degrees of freedom: points minus parameters."""
        return len(self.data) - len(self.theta)

    @property
    def inputs(self) -> Array:
        """Inputs of the form at the points."""
        return self.form.inputs(self.data.values)

    @property
    def residuals(self) -> Array:
        """Observed minus fitted log loss, (points,)."""
        return np.asarray(self.data.log_loss - self.form.evaluate(self.theta[None], self.inputs)[0][0])

    def predict(self, values: dict[str, Array]) -> Array:
        """Return the loss at other points, (points,)."""
        return np.asarray(self.form.predict(self.theta[None], values)[0])


def huber(residuals: Array, delta: float) -> Array:
    """Return Huber's loss, r^2/2 up to delta and linear beyond, summed over the last axis.

    The loss is summed, not averaged, because the stopping rule of an optimizer would take the small gradients of a mean for
    the optimum.
    Source: Huber 1964; used on log loss by Hoffmann et al. 2022, section D.2.
    """
    size = np.abs(residuals)
    return np.asarray(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum(axis=-1))


Pull = Callable[[Array, Indices], tuple[Array, Array, Array]]


def minimise(form: Form, starts: Array, inputs: Array, log_loss: Array, root_weights: Array, delta: float,
             pull: Pull | None = None, steps: int = 120) -> tuple[Array, Array]:
    """Minimise by Levenberg-Marquardt with Huber's weights and bounds, for many problems at once.

    Args:
        form: the form to fit.
        starts: (problems, P).
        inputs: (points, variables).
        log_loss: (problems, points) or (1, points).
        root_weights: square roots of the weights, (points,).
        delta: the threshold of Huber's loss.
        pull: an additional cost; maps theta (k, P) and the indices of the problems (k,) to cost (k,), gradient (k, P) and
            Gauss-Newton matrix (k, P, P).
        steps: the maximum number of steps.

    Returns:
        theta (problems, P) and the costs without the pull (problems,).
    """
    count = len(starts)
    log_loss = np.broadcast_to(log_loss, (count, log_loss.shape[-1]))
    theta = np.clip(starts, form.lower, form.upper)
    damping = np.full(count, 1e-3)
    live = np.arange(count)

    def residuals_at(where: Array, numbers: Indices) -> tuple[Array, Array, Array]:
        value, slopes = form.evaluate(where, inputs)
        rest = (value - log_loss[numbers]) * root_weights
        cost = huber(rest, delta)
        return rest, slopes * root_weights[:, None], cost

    plain = residuals_at(theta, live)[2]
    cost = plain + (pull(theta, live)[0] if pull else 0)
    for _ in range(steps):
        at = theta[live]
        rest, slopes, _ = residuals_at(at, live)
        weight = np.minimum(1, delta / np.maximum(np.abs(rest), 1e-300))
        weighted = slopes * weight[:, :, None]
        gradient = (weighted * rest[:, :, None]).sum(axis=1)
        matrix = weighted.transpose(0, 2, 1) @ slopes
        if pull:
            _, more_gradient, more_matrix = pull(at, live)
            gradient, matrix = gradient + more_gradient, matrix + more_matrix
        stuck = ((at <= form.lower) & (gradient > 0)) | ((at >= form.upper) & (gradient < 0))
        free = ~stuck
        matrix *= free[:, :, None] & free[:, None, :]
        diagonal = np.einsum("kii->ki", matrix)
        largest = diagonal.max(axis=1, keepdims=True)
        diagonal += damping[live][:, None] * diagonal + 1e-14 * largest + 1e-300 + stuck * (largest + 1)
        step = np.linalg.solve(matrix, -(gradient * free)[:, :, None])[:, :, 0]
        # A step that leaves the bounds ends there, and no exponent or logarithm moves by more than 2 at once.
        target = np.clip(at + np.clip(step, -2, 2), form.lower, form.upper)
        new_plain = residuals_at(target, live)[2]
        new_cost = new_plain + (pull(target, live)[0] if pull else 0)
        better = new_cost < cost[live]
        gain = cost[live] - new_cost
        moved = np.abs(target - at).max(axis=1)
        done = (better & (gain <= TOLERANCE * (cost[live] + 1e-300))) | (moved <= 1e-12) | (damping[live] > 1e12)
        accepted = live[better]
        theta[accepted], cost[accepted], plain[accepted] = target[better], new_cost[better], new_plain[better]
        damping[live] = np.where(better, np.maximum(damping[live] / 5, 1e-12), damping[live] * 6)
        live = live[~done]
        if not len(live):
            break
    return theta, plain


def robust_scale(residuals: Array, parameters: int) -> float:
    """Return the standard deviation of the noise from the median absolute residual, widened for the fitted parameters.

    With fewer than five degrees of freedom the median is useless, and the root mean square is used.
    """
    spare = len(residuals) - parameters
    if spare < 5:
        return max(float(np.sqrt((residuals**2).sum() / max(spare, 1))), FINEST)
    return max(1.4826 * float(np.median(np.abs(residuals))) * float(np.sqrt(len(residuals) / spare)), FINEST)


def fit(form: Form, data: Observations, start: Array | None = None) -> Fit:
    """Fit a form with Huber's loss on the residuals of log loss, from the best points of a grid.

    The scale of the noise is estimated during the fit: Huber's delta is twice the robust scale of the residuals, or twice
    the noise between seeds if that is larger, because no fit can be closer than this noise. The weight of a point grows
    with the number of seeds as far as seeds explain the scatter: the variance of a point is that of the misfit plus that
    between seeds divided by the number of seeds.

    Args:
        form: the form to fit.
        data: at least `form.needed` points.
        start: parameters to start from instead of the grid, (P,).
    """
    assert len(data) >= form.needed
    inputs, parameters = form.inputs(data.values), len(form.inner)
    weights = np.ones(len(data))
    noise = data.seed_noise or 0.0
    floor_scale = noise * float(np.sqrt((1 / data.runs).mean()))
    starts = form.starts(inputs, data.log_loss) if start is None else start[None]
    rest = data.log_loss - form.evaluate(starts, inputs)[0]
    rough = np.median(np.abs(rest), axis=1)
    best = starts[np.argsort(rough + np.sqrt((rest**2).mean(axis=1)))[:12]]
    scale = max(float(robust_scale(data.log_loss - form.evaluate(best[:1], inputs)[0][0], parameters)), floor_scale)
    misfit = 0.0
    for turn in range(6):
        delta = HUBER * scale
        thetas, costs = minimise(form, best, inputs, data.log_loss, np.sqrt(weights), delta)
        best = thetas[np.argsort(costs)[:4 if turn == 0 else 1]]
        rest = data.log_loss - form.evaluate(best[:1], inputs)[0][0]
        if turn == 0 and noise:
            misfit = max(robust_scale(rest, parameters)**2 - floor_scale**2, 0.0)
            weights = 1 / (misfit + noise**2 / data.runs)
            weights /= weights.mean()
        new = max(robust_scale(rest * np.sqrt(weights), parameters), floor_scale)
        settled = turn and abs(new - scale) < 0.02 * scale
        if settled:
            break
        scale = new
    theta, cost = best[0], float(costs.min())
    rest = (data.log_loss - form.evaluate(theta[None], inputs)[0][0]) * np.sqrt(weights)
    spread = _spread(rest, delta, parameters)
    # A configuration with one seed has the largest variance; its weight converts the weighted scale to that of one run.
    single = misfit + noise**2
    run_noise = np.sqrt(spread * single * float((1 / (misfit + noise**2 / data.runs)).mean())) if noise else np.sqrt(spread)
    return Fit(form=form, data=data, theta=theta, root_weights=np.sqrt(weights), scale=scale, delta=delta, cost=cost,
               spread=spread, run_noise=float(run_noise))


def _spread(rest: Array, delta: float, parameters: int) -> float:
    """Return the variance that calibrates the rise of Huber's cost: E[psi^2] / E[psi'], with n - p and Huber's correction.

    Source: Schrader and Hettmansperger 1980 (tests by the rise of a robust cost); Huber 1973, section 6 (the correction).
    """
    count = len(rest)
    inside = float((np.abs(rest) <= delta).mean()) or 1 / count
    correction = 1 + parameters / count * (1 - inside) / inside
    total = float((np.clip(rest, -delta, delta)**2).sum())
    return max(correction**2 * total / max(count - parameters, 1) / inside, FINEST**2)
