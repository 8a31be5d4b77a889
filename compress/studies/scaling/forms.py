"""The functional forms of scaling laws: their values, derivatives, reported parameters and starting points.

Every form is evaluated for many parameter sets at once, on the logarithm of the loss, because the noise of a loss is
relative. The inner parameters use powers of N / N0 and D / D0, with N0 and D0 in the middle of the data, and the logarithms
of the contributions of the terms there. So the inner parameters have similar sizes and weak correlations. `reported`
converts them to the published parameters.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Indices = NDArray[np.intp]

EXPONENTS = (0.01, 3.0)  # a slower power looks like a constant, a faster one like a step
NEGLIGIBLE, HUGE = 1e-7, 1e4  # contribution of a term in the middle of the data, relative to the loss there
START_EXPONENTS = np.geomspace(0.04, 2.4, 10)


@dataclass(frozen=True, kw_only=True)
class FrontierTerms:
    """The two terms of the trade-off: exp(log_x) N^-x + exp(log_y) N^cross D^-y; fields (sets,)."""

    log_x: Array
    x: Array
    log_y: Array
    y: Array
    cross: Array


class Form:
    """A functional form.

    Attributes:
        name: the name in tables and for `--form`.
        formula: the formula for display.
        variables: a part of "N", "D", "C".
        inner: names of the fitted parameters.
        names: names of the reported parameters.
        log_scale: the names of those that `reported` returns as logarithms (amplitudes).
        lower, upper: bounds of the inner parameters, (P,).
    """

    name: str
    formula: str
    variables: tuple[str, ...]
    inner: tuple[str, ...]
    names: tuple[str, ...]
    log_scale: frozenset[str]
    lower: Array
    upper: Array
    centre: Array  # (variables,) log of N0, D0 or C0

    @property
    def needed(self) -> int:
        """The number of configurations that a fit needs: one more than parameters, to leave one for the noise."""
        return len(self.inner) + 1

    def inputs(self, values: dict[str, Array]) -> Array:
        """Return log(variable / centre), (points, variables)."""
        return np.stack([np.log(values[name]) for name in self.variables], axis=1) - self.centre

    def evaluate(self, theta: Array, inputs: Array) -> tuple[Array, Array]:
        """Return the log of the loss, (sets, points), and its derivatives, (sets, points, P), at theta (sets, P).

        Args:
            theta: parameter sets, (sets, P).
            inputs: (points, variables), or (sets, points, variables) if each set has its own points.
        """
        raise NotImplementedError

    def predict(self, theta: Array, values: dict[str, Array]) -> Array:
        """Return the loss, (sets, points) for theta (sets, P)."""
        return np.asarray(np.exp(self.evaluate(theta, self.inputs(values))[0]))

    def reported(self, theta: Array) -> Array:
        """Return the parameters of `names`, amplitudes as logarithms: (sets, len(names)) for theta (sets, P)."""
        raise NotImplementedError

    def starts(self, inputs: Array, log_loss: Array) -> Array:
        """Return parameter sets to start from, one for each point of a grid over the nonlinear parameters, (grid, P)."""
        raise NotImplementedError

    def frontier_terms(self, theta: Array) -> FrontierTerms:
        """Return the terms of the compute-optimal trade-off; joint forms only."""
        raise NotImplementedError

    def _amplitude_bounds(self, log_loss: Array) -> tuple[float, float]:
        middle = float(np.median(log_loss))
        return middle + math.log(NEGLIGIBLE), middle + math.log(HUGE)


def _non_negative(columns: Array, target: Array) -> Array:
    """Return non-negative least squares; the columns are scaled first, so that rounding does not drop any."""
    scale = np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
    return np.asarray(nnls(columns / scale, target)[0] / scale)


class PowerSum(Form):
    """E + A/N^a [+ B/D^b], in one or two variables, with E >= 0 or without E; optionally bounded by the loss of guessing.

    The bounded form E + (ceiling - E) h/(1 + h) with h = A/N^a + B/D^b goes from E to the ceiling: the loss of a network
    that has learned nothing is the loss of guessing, whereas the plain sum grows without bound.

    Source: Hestness et al. 2017 (one variable); Hoffmann et al. 2022, equation 2 (the sum in two).

    Args:
        variables: such as ("N", "D").
        values: the variables of the data, for centre and bounds.
        log_loss: the log of the loss of the data, (points,).
        floor: whether there is an E.
        ceiling: the loss of guessing, or None for the plain sum.
    """

    def __init__(self, name: str, variables: tuple[str, ...], values: dict[str, Array], log_loss: Array, floor: bool,
                 ceiling: float | None = None) -> None:
        assert floor or ceiling is None
        self.name, self.variables, self.floor, self.ceiling = name, variables, floor, ceiling
        amplitudes = tuple("AB"[:len(variables)])
        exponents = ("alpha", "beta")[:len(variables)]
        self.inner = (("E",) if floor else ()) + tuple(f"log {name}" for name in amplitudes) + exponents
        self.names = (("E",) if floor else ()) + amplitudes + exponents
        self.log_scale = frozenset(amplitudes)
        powers = " + ".join(f"{amplitude}/{variable}^{exponent}" for amplitude, variable, exponent in
                            zip(amplitudes, variables, exponents, strict=True))
        self.formula = (f"E + ({ceiling:.4g} - E) h/(1 + h), h = {powers}" if ceiling is not None else
                        f"E + {powers}" if floor else powers)
        self.centre = np.array([float(np.log(values[name]).mean()) for name in variables])
        low, high = self._amplitude_bounds(log_loss) if ceiling is None else (math.log(NEGLIGIBLE), math.log(HUGE))
        top = (1 - 1e-9) * (math.inf if ceiling is None else ceiling)
        count = len(variables)
        self.lower = np.array([0.0] * floor + [low] * count + [EXPONENTS[0]] * count)
        self.upper = np.array([top] * floor + [high] * count + [EXPONENTS[1]] * count)

    def evaluate(self, theta: Array, inputs: Array) -> tuple[Array, Array]:
        count, first = len(self.variables), int(self.floor)
        base = theta[:, :1] if self.floor else np.zeros((len(theta), 1))
        logs, exponents = theta[:, first:first + count], theta[:, first + count:]
        terms = np.exp(np.clip(logs[:, None, :] - exponents[:, None, :] * inputs, -700, 300))  # (sets, points, variables)
        h = terms.sum(axis=2)
        if self.ceiling is None:
            loss, slope, from_base = base + h, np.ones_like(h), np.ones_like(h)
        else:
            share = h / (1 + h)
            loss = base + (self.ceiling - base) * share
            slope, from_base = (self.ceiling - base) / (1 + h) ** 2, 1 - share
        loss = np.maximum(loss, 1e-300)
        relative = (slope / loss)[:, :, None] * terms
        parts = [relative, -inputs * relative]
        if self.floor:
            parts.insert(0, (from_base / loss)[:, :, None])
        return np.log(loss), np.concatenate(parts, axis=2)

    def reported(self, theta: Array) -> Array:
        count, first = len(self.variables), int(self.floor)
        result = theta.copy()
        result[:, first:first + count] += theta[:, first + count:] * self.centre
        return result

    def starts(self, inputs: Array, log_loss: Array) -> Array:
        # Given the exponents, the loss without a ceiling is linear in E, A and B: E is a column of ones. With a ceiling,
        # h = (L - E) / (ceiling - L) is linear in A and B, given E as well.
        loss, count = np.exp(log_loss), len(self.variables)
        found = []
        lowest = min(float(loss.min()), self.ceiling or math.inf)
        floors = [0.0] if self.ceiling is None else [share * lowest for share in (0, 0.3, 0.6, 0.85, 0.97)]
        for floor, exponents in itertools.product(floors, itertools.product(START_EXPONENTS, repeat=count)):
            columns = np.exp(-inputs * np.array(exponents))
            if self.ceiling is None:
                if self.floor:
                    columns = np.hstack([np.ones((len(loss), 1)), columns])
                solution = _non_negative(columns / loss[:, None], np.ones(len(loss)))
                floor, amplitudes = (solution[0], solution[1:]) if self.floor else (0.0, solution)
            else:
                seen = np.minimum(loss, 0.98 * self.ceiling + 0.02 * floor)  # noise lifts some above the ceiling
                h = (seen - floor) / (self.ceiling - seen)
                weight = (self.ceiling - floor) / (1 + h) ** 2 / seen  # d log L / dh
                amplitudes = _non_negative(columns * weight[:, None], h * weight)
            found.append([floor] * self.floor + list(np.log(np.maximum(amplitudes, 1e-4 * loss.mean()))) + list(exponents))
        return np.clip(np.array(found), self.lower, self.upper)

    def frontier_terms(self, theta: Array) -> FrontierTerms:
        # Both forms grow with h, so that their minima are those of h.
        values = self.reported(theta)[:, int(self.floor):]
        return FrontierTerms(log_x=values[:, 0], x=values[:, 2], log_y=values[:, 1], y=values[:, 3],
                             cross=np.zeros(len(theta)))


class Overfitting(Form):
    """E + A/N^alpha + B N^gamma/D^beta: the cost of too few data grows with the network, gamma >= 0.

    The other forms fall with N at every D. The cross-entropy of a network that memorizes few images does not: the network
    becomes ever more confident in its mistakes. This form is the simplest in which the error from too few data depends on
    the size of the network, as a variance does. With gamma = 0 it is the additive form.
    """

    name, formula, variables = "overfitting", "E + A/N^alpha + B N^gamma/D^beta", ("N", "D")
    inner = ("E", "log A", "log B", "alpha", "beta", "gamma")
    names = ("E", "A", "B", "alpha", "beta", "gamma")
    log_scale = frozenset({"A", "B"})
    GAMMAS = (0.0, 0.1, 0.3, 0.7)

    def __init__(self, values: dict[str, Array], log_loss: Array) -> None:
        self.centre = np.array([float(np.log(values[name]).mean()) for name in self.variables])
        low, high = self._amplitude_bounds(log_loss)
        self.lower = np.array([0.0, low, low, EXPONENTS[0], EXPONENTS[0], 0.0])
        self.upper = np.array([math.inf, high, high, EXPONENTS[1], EXPONENTS[1], 1.0])

    @property
    def needed(self) -> int:
        """More than the number of parameters requires: with fewer points, holding some out would leave too few to fit."""
        return 2 * len(self.inner)

    def evaluate(self, theta: Array, inputs: Array) -> tuple[Array, Array]:
        n, d = inputs[..., 0], inputs[..., 1]  # (points,) or (sets, points)
        floor, log_a, log_b, alpha, beta, gamma = (theta[:, index, None] for index in range(6))
        a = np.exp(np.clip(log_a - alpha * n, -700, 300))
        b = np.exp(np.clip(log_b - beta * d + gamma * n, -700, 300))
        loss = np.maximum(floor + a + b, 1e-300)
        a, b = a / loss, b / loss
        return np.log(loss), np.stack([1 / loss, a, b, -n * a, -d * b, n * b], axis=2)

    def reported(self, theta: Array) -> Array:
        result = theta.copy()
        result[:, 1] += theta[:, 3] * self.centre[0]
        result[:, 2] += theta[:, 4] * self.centre[1] - theta[:, 5] * self.centre[0]
        return result

    def starts(self, inputs: Array, log_loss: Array) -> Array:
        # Given the exponents, the loss is linear in E, A and B.
        loss, found = np.exp(log_loss), []
        n, d = inputs[:, 0], inputs[:, 1]
        for alpha, beta, gamma in itertools.product(START_EXPONENTS[::2], START_EXPONENTS[::2], self.GAMMAS):
            columns = np.stack([np.ones(len(loss)), np.exp(-alpha * n), np.exp(gamma * n - beta * d)], axis=1)
            floor, *amplitudes = _non_negative(columns / loss[:, None], np.ones(len(loss)))
            found.append([floor, *np.log(np.maximum(amplitudes, 1e-4 * loss.mean())), alpha, beta, gamma])
        return np.clip(np.array(found), self.lower, self.upper)

    def frontier_terms(self, theta: Array) -> FrontierTerms:
        values = self.reported(theta)
        return FrontierTerms(log_x=values[:, 1], x=values[:, 3], log_y=values[:, 2], y=values[:, 4], cross=values[:, 5])


class Kaplan(Form):
    """((Nc/N)^(alpha_N/alpha_D) + Dc/D)^alpha_D, which has no irreducible term.

    The form is the norm with exponent 1/alpha_D of two power laws, p (N/N0)^-alpha_N and q (D/D0)^-alpha_D, whose
    parameters are fitted: Nc = N0 p^(1/alpha_N), Dc = D0 q^(1/alpha_D).

    Source: Kaplan et al. 2020, equation 1.5.
    """

    name, formula, variables = "kaplan", "((Nc/N)^(alpha_N/alpha_D) + Dc/D)^alpha_D", ("N", "D")
    inner = ("log p", "log q", "alpha_N", "alpha_D")
    names = ("Nc", "Dc", "alpha_N", "alpha_D")
    log_scale = frozenset({"Nc", "Dc"})

    def __init__(self, values: dict[str, Array], log_loss: Array) -> None:
        self.centre = np.array([float(np.log(values[name]).mean()) for name in self.variables])
        low, high = self._amplitude_bounds(log_loss)
        self.lower = np.array([low, low, EXPONENTS[0], EXPONENTS[0]])
        self.upper = np.array([high, high, EXPONENTS[1], EXPONENTS[1]])

    def evaluate(self, theta: Array, inputs: Array) -> tuple[Array, Array]:
        powers = theta[:, None, :2] - theta[:, None, 2:] * inputs  # logs of the two power laws, (sets, points, 2)
        sharp = theta[:, 3][:, None, None]
        top = powers.max(axis=2, keepdims=True)
        parts = np.exp((powers - top) / sharp)
        total = parts.sum(axis=2, keepdims=True)
        share = parts / total  # (sets, points, 2)
        log_sum = np.log(total)
        log_loss = (top + sharp * log_sum)[:, :, 0]
        by_exponent = -inputs * share
        # d/d(sharp) of sharp * log sum exp(powers / sharp), powers held
        by_exponent[:, :, 1] += log_sum[:, :, 0] - (share * (powers - top)).sum(axis=2) / sharp[:, :, 0]
        return log_loss, np.concatenate([share, by_exponent], axis=2)

    def reported(self, theta: Array) -> Array:
        return np.concatenate([self.centre + theta[:, :2] / theta[:, 2:], theta[:, 2:]], axis=1)

    def starts(self, inputs: Array, log_loss: Array) -> Array:
        # Given both exponents, L^(1/alpha_D) is linear in Nc^(alpha_N/alpha_D) and Dc.
        found = []
        middle = float(log_loss.mean())
        for first, second in itertools.product(START_EXPONENTS, repeat=2):
            powers = (-inputs * np.array([first, second]) - (log_loss - middle)[:, None]) / second
            solution = _non_negative(np.exp(np.clip(powers, -200, 200)), np.ones(len(powers)))
            found.append([*(middle + second * np.log(np.maximum(solution, 1e-90))), first, second])
        return np.clip(np.array(found), self.lower + 1e-3, self.upper)

    def frontier_terms(self, theta: Array) -> FrontierTerms:
        values = self.reported(theta)
        ratio = theta[:, 2] / theta[:, 3]
        return FrontierTerms(log_x=ratio * values[:, 0], x=ratio, log_y=values[:, 1], y=np.ones(len(theta)),
                             cross=np.zeros(len(theta)))


def joint_forms(values: dict[str, Array], log_loss: Array, ceiling: float | None) -> list[Form]:
    """Return the joint forms in N and D for the data; the bounded form only if the ceiling is known.

    Args:
        values: "N" and "D", each (points,).
        log_loss: (points,).
        ceiling: the loss of guessing (ln K, or 1 - 1/K for the error), or None.
    """
    forms: list[Form] = [PowerSum("additive", ("N", "D"), values, log_loss, floor=True)]
    if ceiling is not None:
        forms.append(PowerSum("bounded", ("N", "D"), values, log_loss, floor=True, ceiling=ceiling))
    return [*forms, Kaplan(values, log_loss), Overfitting(values, log_loss)]


def single_forms(variable: str, values: dict[str, Array], log_loss: Array) -> list[Form]:
    """Return the power law in one variable, without and with an irreducible term."""
    options: dict[str, Any] = {"variables": (variable,), "values": values, "log_loss": log_loss}
    return [PowerSum(f"power of {variable}", floor=False, **options),
            PowerSum(f"power of {variable} + E", floor=True, **options)]
