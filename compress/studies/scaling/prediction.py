"""Predict the loss of a configuration that was not run, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from compress.studies.scaling.fitting import Fit
from compress.studies.scaling.intervals import LEVEL, profile


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The predicted loss of a configuration that was not run.

    Attributes:
        loss: the loss at the best fit.
        mean: 95 % interval of the mean over seeds; an end is None if the data do not bound it.
        run: 95 % interval of one run, which includes the noise.
        beyond: the factor by which N and D lie beyond the points, such as {"N": 4.0}; empty inside their range.
    """

    loss: float
    mean: tuple[float | None, float | None]
    run: tuple[float | None, float | None]
    beyond: dict[str, float]


def predict(best: Fit, n: float, d: float) -> Prediction:
    """Predict the loss of a model with n parameters on d examples.

    The interval of the mean is the profile interval of the prediction. For the interval of a run, the noise is added in
    quadrature, with the quantile of Student's t for the degrees of freedom of the fit.
    """
    values = {"N": np.array([n]), "D": np.array([d]), "C": np.array([n * d])}
    inputs = best.form.inputs(values)
    interval = profile(best, [lambda theta: best.form.evaluate(theta, inputs)[0][:, 0]])[0]
    noise = float(stats.t.ppf((1 + LEVEL) / 2, best.dof)) * best.run_noise
    low, high = (None if end is None else abs(end - interval.value) for end in (interval.low, interval.high))

    def end(width: float | None, sign: int, more: float) -> float | None:
        return None if width is None else math.exp(interval.value + sign * math.hypot(width, more))

    beyond = {}
    for name, value in (("N", n), ("D", d)):
        smallest, largest = float(best.data.values[name].min()), float(best.data.values[name].max())
        if value > largest * (1 + 1e-9) or value < smallest * (1 - 1e-9):
            beyond[name] = max(value / largest, smallest / value)
    return Prediction(loss=math.exp(interval.value), mean=(end(low, -1, 0), end(high, 1, 0)),
                      run=(end(low, -1, noise), end(high, 1, noise)), beyond=beyond)
