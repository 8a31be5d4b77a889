"""Rank the forms by their errors on held-out configurations, and compare the errors with the noise between seeds.

R^2 is useless here: for a loss that spans two decades, forms that miss the next model by 15 % have an R^2 of 0.99.

Limits of a ranking. All points of one split are predicted by one fit and share its error. They are less evidence than their
number suggests, and a difference between forms found here may not recur in another study. The best form is chosen by the
errors that are then stated for it, which makes them slightly too small. The noise between seeds is assumed to be the same
everywhere: configurations that ran once have the noise of the repeated configurations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from compress.studies.scaling.fitting import Fit, Observations, fit
from compress.studies.scaling.forms import Array, Form, Mask

SHARE = 0.2  # fraction of the configurations to hold out
SPLIT_TITLES = {"N": "largest N", "D": "largest D", "C": "largest compute"}


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """One split: the held-out points, and their predictions by a form that was fitted to the other points.

    Attributes:
        variable: "N", "D" or "C".
        edge: the smallest held-out value of the variable.
        chosen: which points were held out, (points,) bool.
        predicted: the predicted loss, (held,); None if too few points are left to fit.
        observed: the observed loss, (held,).
    """

    variable: str
    edge: float
    chosen: Mask
    predicted: Array | None
    observed: Array

    @property
    def errors(self) -> Array:
        """Relative errors, as fractions with their sign, (held,)."""
        assert self.predicted is not None
        return self.predicted / self.observed - 1

    @property
    def error_percent(self) -> float | None:
        """Mean absolute relative error in percent."""
        return None if self.predicted is None else 100 * float(np.abs(self.errors).mean())


@dataclass(frozen=True)
class JudgedForm:
    """A form, its fit to all points and its errors on each split.

    Attributes:
        fit: the fit to all points.
        splits: the possible splits, by variable.
    """

    fit: Fit
    splits: dict[str, HeldOut]

    @property
    def name(self) -> str:
        """The form's name."""
        return self.fit.form.name

    @property
    def in_sample_percent(self) -> float:
        """Mean absolute relative error on the fitted points, in percent."""
        return 100 * float(np.abs(np.expm1(-self.fit.residuals)).mean())

    @property
    def held_out_percent(self) -> float | None:
        """Mean error over the splits, in percent; None unless the form could be fitted in all splits."""
        errors = [split.error_percent for split in self.splits.values()]
        known = [error for error in errors if error is not None]
        return float(np.mean(known)) if known and len(known) == len(errors) else None

    @property
    def scatter_percent(self) -> float:
        """Standard deviation of the points around the fit, by degrees of freedom, in percent."""
        return 100 * math.sqrt(float((self.fit.residuals**2).sum()) / self.fit.dof)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Forms from best to worst.

    Attributes:
        forms: the forms in order.
        ties: names of the forms that cannot be distinguished from the first, with the reason.
        noise_percent: the error on the held-out points (on all points, if the forms could not be tested) that noise
            between seeds alone causes; None without repeated seeds.
        tested_on: the number of held-out configurations, each counted once; 0 if the forms could not be tested.
    """

    forms: list[JudgedForm]
    ties: dict[str, str]
    noise_percent: float | None
    tested_on: int

    @property
    def winner(self) -> JudgedForm:
        """The form with the lowest held-out error, or with the smallest scatter if not all forms could be tested."""
        return self.forms[0]

    @property
    def untested(self) -> list[str]:
        """Names of the forms with too few points to hold any out."""
        return [form.name for form in self.forms if form.held_out_percent is None]


def split_off(values: Array) -> Mask | None:
    """Select the points with the largest values: whole levels, at least one, as close to a fifth of the points as possible.

    Args:
        values: the values of the variable, (points,).

    Returns:
        The held-out points, (points,) bool; None if the variable does not vary.
    """
    levels = np.unique(values)
    if len(levels) < 2:
        return None
    counts = [int((values >= level).sum()) for level in levels[1:]]
    best = min(range(len(counts)), key=lambda index: (abs(counts[index] - SHARE * len(values)), counts[index]))
    return np.asarray(values >= levels[1:][best])


def judge(form: Form, data: Observations, variables: tuple[str, ...]) -> JudgedForm:
    """Fit a form to all points, and to the rest of the points when the largest N, D or C are held out.

    Args:
        form: the form; needs at least `form.needed` points.
        data: all points.
        variables: the variables to hold out by, of "N", "D", "C".
    """
    whole = fit(form, data)
    splits = {}
    for variable in variables:
        chosen = split_off(data.values[variable])
        if chosen is None:
            continue
        rest, held = data.held_apart(chosen)
        enough = len(rest) >= form.needed and all(len(np.unique(rest.values[name])) > 1 for name in form.variables)
        predicted = fit(form, rest).predict(held.values) if enough else None
        splits[variable] = HeldOut(variable=variable, edge=float(held.values[variable].min()), chosen=chosen,
                                   predicted=predicted, observed=np.exp(held.log_loss))
    return JudgedForm(whole, splits)


def rank(judged: list[JudgedForm]) -> Ranking:
    """Order forms by held-out error, and find the forms that the data cannot distinguish from the best.

    If any form could not be tested, all forms are ordered by their scatter around the points instead, which accounts for
    the number of parameters.

    Two forms cannot be distinguished if their held-out errors differ by less than the error that noise between seeds alone
    causes, or if the difference between them, configuration by configuration, scatters around zero (see `_doubt`). The
    noise comes from all seeds, because no form is fitted to the noise here.
    """
    held_out = {form.name: error for form in judged if (error := form.held_out_percent) is not None}
    tested = len(held_out) == len(judged)
    order = sorted(judged, key=lambda form: held_out[form.name] if tested else form.scatter_percent)
    best, ties = order[0], {}
    data = best.fit.data
    floor = None
    if data.seed_noise is not None:
        masks = [split.chosen for split in best.splits.values()] if tested else [np.ones(len(data), dtype=bool)]
        # The mean absolute value of a normal variable is sqrt(2/pi) of its deviation; a point is the mean of its seeds.
        sizes = [float(np.sqrt(1 / data.runs[mask]).mean()) for mask in masks]
        floor = 100 * math.sqrt(2 / math.pi) * data.seed_noise * float(np.mean(sizes))
    count = int(np.any([split.chosen for split in best.splits.values()], axis=0).sum()) if tested else 0
    for other in order[1:] if tested else []:
        difference = held_out[other.name] - held_out[best.name]
        if floor is not None and difference < floor:
            ties[other.name] = (f"{difference:.2g} points apart, less than noise between seeds alone makes any form err "
                                f"({floor:.2g})")
        elif count < 2:
            ties[other.name] = f"{difference:.2g} points apart on one held-out configuration, whose scatter is not known"
        elif _doubt(best, other) > 0.05:
            ties[other.name] = (f"{difference:.2g} points apart, which the scatter over the {count} held-out "
                                "configurations covers")
    return Ranking(forms=order, ties=ties, noise_percent=floor, tested_on=count)


def _doubt(best: JudgedForm, other: JudgedForm) -> float:
    """Return the p-value of the difference between the held-out errors of two forms (Student's t).

    The difference is the mean over the splits of the mean over their points. A configuration that several splits hold out
    counts once, with the sum of its parts, so that n is the number of configurations, not of predictions. With one split
    this is the paired t-test. Source: Cameron and Miller 2015, section II (sums by cluster).

    Args:
        best: a form that could be fitted in all splits.
        other: another such form.
    """
    splits = best.splits
    apart = {name: np.abs(other.splits[name].errors) - np.abs(split.errors) for name, split in splits.items()}
    difference = float(np.mean([values.mean() for values in apart.values()]))
    shares = np.zeros(len(best.fit.data))  # deviation of each configuration from its part of the difference
    for name, split in splits.items():
        shares[split.chosen] += (apart[name] - difference) / (len(splits) * len(apart[name]))
    count = int(np.any([split.chosen for split in splits.values()], axis=0).sum())
    error = math.sqrt(count / (count - 1) * float((shares**2).sum()))
    if error <= 1e-12 * abs(difference) or error == 0:  # all configurations have the same difference
        return 0.0 if difference else 1.0
    return float(2 * stats.t.sf(abs(difference) / error, count - 1))
