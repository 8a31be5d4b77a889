"""The analysis of a study: fit and rank the forms, bound their parameters, and derive the compute-optimal frontier."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from compress.studies.scaling import frontier
from compress.studies.scaling.fitting import Fit, Observations
from compress.studies.scaling.forms import Array, Form, joint_forms, single_forms
from compress.studies.scaling.intervals import Interval, bootstrap, parameter_intervals
from compress.studies.scaling.ranking import JudgedForm, Ranking, SPLIT_TITLES, judge, rank
from compress.studies.scaling.runs import Runs
from metadata.closest import closest
from metadata.errors import UserError

JOINT = ("additive", "bounded", "kaplan", "overfitting")


@dataclass(kw_only=True)
class Section:
    """Forms of the same variables, fitted to the same points.

    Attributes:
        title: such as "N at D = 50,000".
        data: the points.
        ranking: the fitted forms, best first; None if no form could be fitted.
        skipped: the reasons why forms could not be fitted, one sentence each.
        intervals: the intervals of the parameters of each form.
        draws: the bootstrap of each form, (replicates, P).
    """

    title: str
    data: Observations
    ranking: Ranking | None = None
    skipped: list[str] = field(default_factory=list)
    intervals: dict[str, dict[str, Interval]] = field(default_factory=dict)
    draws: dict[str, Array] = field(default_factory=dict)


@dataclass(kw_only=True)
class Tradeoff:
    """The compute-optimal frontier of the chosen form.

    Attributes:
        passes: C / (N * D) of the budgets: the epochs, if compute is N * D * epochs.
        rule: the same in words.
        best: the optimum at the fit, one set.
        draws: the optima over the bootstrap.
        n_exponent, d_exponent: the exponents in N* ~ C^p and D* ~ C^(1 - p).
    """

    passes: float
    rule: str
    best: frontier.Optimum
    draws: frontier.Optimum
    n_exponent: Interval
    d_exponent: Interval


@dataclass(kw_only=True)
class Analysis:
    """The result of an analysis, from which files and tables are made."""

    runs: Runs
    ceiling: float | None
    joint: Section
    single: list[Section]
    chosen: JudgedForm | None
    tradeoff: Tradeoff | None
    notes: list[str]


def ceiling_of(target: str, classes: int | None) -> float | None:
    """Return the loss, or the error, of guessing among K classes: ln K, or 1 - 1/K."""
    if classes is None:
        return None
    return math.log(classes) if target == "loss" else 1 - 1 / classes


def joint_section(runs: Runs, ceiling: float | None) -> tuple[Section, list[Form]]:
    """Return the empty section of the joint forms, and the forms for which there are enough points."""
    data = runs.observations()
    section = Section(title="joint in N and D", data=data)
    for name in ("N", "D"):
        if len(np.unique(data.values[name])) < 2:
            section.skipped.append(f"joint forms need at least two values of N and of D; {name} does not vary (it is "
                                   f"{data.values[name][0]:,.12g} in every row)")
            return section, []
    forms = joint_forms(data.values, data.log_loss, ceiling)
    if ceiling is None:
        section.skipped.append("bounded: the loss of guessing is not known; give the number of classes with --classes")
    return section, _enough(section, forms)


def _enough(section: Section, forms: list[Form]) -> list[Form]:
    """Return the forms with enough points and distinct values; note the reasons for the others in `skipped`."""
    kept = []
    for form in forms:
        distinct = [len(np.unique(section.data.values[name])) for name in form.variables]
        if len(section.data) < form.needed:
            section.skipped.append(f"{form.name}: needs at least {form.needed} configurations (it has {len(form.inner)} "
                                   f"parameters), there are {len(section.data)}")
        elif len(distinct) == 1 and distinct[0] < len(form.inner):
            section.skipped.append(f"{form.name}: needs at least {len(form.inner)} values of {form.variables[0]}, there "
                                   f"are {distinct[0]}")
        else:
            kept.append(form)
    return kept


def _fill(section: Section, forms: list[Form], variables: tuple[str, ...], replicates: int, seed: int) -> None:
    judged = [judge(form, section.data, variables) for form in forms]
    if not judged:
        return
    section.ranking = rank(judged)
    for entry in section.ranking.forms:
        draws = bootstrap(entry.fit, replicates, seed)
        section.draws[entry.name] = draws
        section.intervals[entry.name] = parameter_intervals(entry.fit, draws)


def _single_sections(data: Observations) -> list[Section]:
    largest_n, largest_d = float(data.values["N"].max()), float(data.values["D"].max())
    return [Section(title=f"N at D = {largest_d:,.12g}", data=data.take(data.values["D"] == largest_d)),
            Section(title=f"D at N = {largest_n:,.12g}", data=data.take(data.values["N"] == largest_n)),
            Section(title="C along the observed frontier", data=data.take(frontier.empirical_frontier(data)))]


def choose(ranking: Ranking, wanted: str | None) -> JudgedForm:
    """Return the winner, or the wanted form.

    Raises:
        UserError: the wanted form is unknown, or could not be fitted.
    """
    if wanted is None:
        return ranking.winner
    fitted = {entry.name: entry for entry in ranking.forms}
    if wanted not in fitted:
        raise UserError(f"--form {wanted}: " + ("it could not be fitted to these data" if wanted in JOINT else
                                                f"unknown{closest(wanted, JOINT)}") + f" (fitted: {', '.join(fitted)})")
    return fitted[wanted]


def analyse(runs: Runs, classes: int | None = None, form: str | None = None, epochs: float | None = None,
            replicates: int = 500, seed: int = 0) -> Analysis:
    """Fit and rank every form for which there are enough runs, and compute the intervals.

    Args:
        runs: the result of `runs.read_runs`.
        classes: the number of classes, for the bounded form; None takes that of the runs.
        form: the joint form to use for the frontier; None takes the winner.
        epochs: the epochs on the compute-optimal frontier; None takes the median of the runs.
        replicates: the number of bootstrap replicates.
        seed: the seed of the bootstrap.

    Raises:
        UserError: too few runs for every form.
    """
    if epochs is not None and "C" in runs.columns:
        raise UserError(f"{runs.path}: --num_epochs {epochs:g}: this file has no epochs; its compute is column "
                        f"{runs.columns['C']}, with C = {runs.passes:.3g} N D")
    ceiling = ceiling_of(runs.target, classes or runs.classes)
    notes = list(runs.notes)
    each = [run.c / (run.n * run.d) for run in runs.runs]
    if max(each) > 1.01 * min(each):
        spent = epochs if epochs is not None else runs.passes
        other = "" if "C" in runs.columns else " (--num_epochs takes another)"
        notes.append(f"C / (N D) is from {min(each):.4g} to {max(each):.4g} in these runs; the forms do not see that, and "
                     f"the frontier and the isoFLOP curves count {spent:.4g} everywhere{other}")
    joint, forms = joint_section(runs, ceiling)
    _fill(joint, forms, tuple(SPLIT_TITLES), replicates, seed)
    data = joint.data
    if ceiling is not None and (above := int((data.log_loss > math.log(ceiling)).sum())):
        notes.append(f"{above} of {len(data)} configurations lie above the {runs.target} of guessing ({ceiling:.4g}), "
                     "which the bounded form cannot reach")
    single = _single_sections(data)
    for section, variable in zip(single, "NDC", strict=True):
        names = _enough(section, single_forms(variable, section.data.values, section.data.log_loss)
                        ) if len(np.unique(section.data.values[variable])) > 1 else []
        if not names and not section.skipped:
            section.skipped.append(f"{section.title}: one value of {variable}, nothing to fit")
        _fill(section, names, (variable,), replicates, seed)
    if joint.ranking is None and all(section.ranking is None for section in single):
        raise UserError(f"{runs.path}: {len(data)} configuration{'s' * (len(data) != 1)} and no form that can be fitted: "
                        f"{'; '.join(joint.skipped)}; a power law in one variable needs 3 with the other one held")
    if joint.ranking is None:
        if form is not None:
            raise UserError(f"{runs.path}: --form {form}: {'; '.join(joint.skipped)}")
        return Analysis(runs=runs, ceiling=ceiling, joint=joint, single=single, chosen=None, tradeoff=None, notes=notes)
    chosen = choose(joint.ranking, form)
    passes = epochs if epochs is not None else runs.passes
    budgets = np.geomspace(float(data.values["C"].min()), 10 * float(data.values["C"].max()), 60)
    best = frontier.optimum(chosen.fit, chosen.fit.theta[None], budgets, passes)
    draws = frontier.optimum(chosen.fit, joint.draws[chosen.name], budgets, passes)
    n_exponent, d_exponent = frontier.exponents(chosen.fit)
    tradeoff = Tradeoff(passes=passes, rule=runs.compute_rule(passes), best=best, draws=draws, n_exponent=n_exponent,
                        d_exponent=d_exponent)
    return Analysis(runs=runs, ceiling=ceiling, joint=joint, single=single, chosen=chosen, tradeoff=tradeoff, notes=notes)


def fit_for_prediction(runs: Runs, classes: int | None, form: str | None) -> tuple[Fit, dict[str, Fit], Ranking]:
    """Return the fit of the chosen form, all fits by name, and the ranking, without intervals and plots.

    Raises:
        UserError: no joint form can be fitted.
    """
    section, forms = joint_section(runs, ceiling_of(runs.target, classes or runs.classes))
    if not forms:
        raise UserError(f"{runs.path}: no joint form can be fitted, so nothing can be predicted: "
                        f"{'; '.join(section.skipped)}")
    ranking = rank([judge(entry, section.data, tuple(SPLIT_TITLES)) for entry in forms])
    return choose(ranking, form).fit, {entry.name: entry.fit for entry in ranking.forms}, ranking
