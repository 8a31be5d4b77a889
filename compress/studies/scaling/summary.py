"""The report of a study, in three forms: tables on the screen, a Markdown summary, and fit.json with all numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from compress.studies.scaling.analysis import Analysis, Section, Tradeoff
from compress.studies.scaling.fitting import Fit
from compress.studies.scaling.forms import Array
from compress.studies.scaling.frontier import band
from compress.studies.scaling.intervals import Interval
from compress.studies.scaling.prediction import predict
from compress.studies.scaling.ranking import JudgedForm, Ranking, SPLIT_TITLES
from compress.studies.scaling.runs import Runs
from metadata.files import write_atomically, write_json

TableRows = list[list[str]]


def number(value: float | None) -> str:
    """Format a number for display: four digits, thousands separated; `?` for None."""
    if value is None or not math.isfinite(value):
        return "?"
    if value == 0:
        return "0"
    if 1000 <= abs(value) < 1e7:
        return f"{float(f'{value:.4g}'):,.0f}"
    return f"{value:.4g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def span(low: float | None, high: float | None) -> str:
    """Format an interval for display; an open end is a dash."""
    return f"{'-' if low is None else number(low)} to {'-' if high is None else number(high)}"


def verdict(name: str, interval: Interval) -> str:
    """Return the verdict on a parameter; for an uncertain amplitude, the factor to which it is known."""
    low, high = interval.low, interval.high
    if name != "E" and low and high and low > 0 and high / low > 10:
        return f"known to a factor of {number(float(f'{math.sqrt(high / low):.2g}'))}"
    return interval.verdict


# ------------------------------------------------------------------------------------------------------- tables


def ranking_rows(ranking: Ranking, splits: Iterable[str]) -> tuple[list[str], TableRows]:
    """Return header and rows: mean absolute errors in percent, best form first."""
    used = [name for name in splits if any(name in form.splits for form in ranking.forms)]
    rows = []
    for form in ranking.forms:
        errors = [form.splits[name].error_percent if name in form.splits else None for name in used]
        mark = " =" if form.name in ranking.ties else ""
        rows.append([form.name + mark, *map(percent, (form.held_out_percent, *errors, form.in_sample_percent))])
    return ["form", "held out", *(SPLIT_TITLES[name] for name in used), "in sample"], rows


def percent(value: float | None) -> str:
    """Format a percentage; `too few` for None."""
    return "too few" if value is None else f"{value:.2f}"


def parameter_rows(section: Section, form: JudgedForm) -> tuple[list[str], TableRows]:
    """Return header and rows: value, profile interval, bootstrap interval and verdict of each parameter."""
    rows = [[name, number(interval.value), span(interval.low, interval.high),
             span(*interval.bootstrap) if interval.bootstrap else "", verdict(name, interval)]
            for name, interval in section.intervals[form.name].items()]
    return ["parameter", "value", "95 % interval", "bootstrap", "verdict"], rows


def frontier_rows(analysis: Analysis, tradeoff: Tradeoff, most: int = 7) -> tuple[list[str], TableRows]:
    """Return header and rows: N*, D* and the loss at budgets over the range of the runs and ten times beyond."""
    data = analysis.joint.data
    chosen = np.unique(np.linspace(0, len(tradeoff.best.compute) - 1, most).round().astype(int))
    n, d = band(tradeoff.draws.n), band(tradeoff.draws.d)
    rows = []
    for index in chosen:
        values = {"N": float(tradeoff.best.n[0, index]), "D": float(tradeoff.best.d[0, index]),
                  "C": float(tradeoff.best.compute[index])}
        beyond = [f"{name} x{value / float(data.values[name].max()):.2g}" for name, value in values.items()
                  if value > 1.05 * float(data.values[name].max())]
        rows.append([f"{values['C']:.2e}".replace("e+", "e"), number(values["N"]), span(n[0][index], n[1][index]),
                     number(values["D"]), span(d[0][index], d[1][index]), number(float(tradeoff.best.loss[0, index])),
                     ", ".join(beyond)])
    return ["C", "N*", "95 %", "D*", "95 %", analysis.runs.target, "beyond the data"], rows


def noise_lines(analysis: Analysis) -> list[str]:
    """Return lines that compare the noise between seeds with the scatter around the chosen fit."""
    data = analysis.joint.data
    repeated = data.runs[data.runs > 1]
    lines = [f"noise between seeds: {100 * data.seed_noise:.2f} % of the {analysis.runs.target} (pooled standard "
             f"deviation of {int(repeated.sum())} runs of the {len(repeated)} configurations that were repeated; taken to "
             "be the same for the others)" if data.seed_noise is not None else
             "noise between seeds: not known, no configuration was repeated with another seed"]
    if analysis.chosen:
        fit = analysis.chosen.fit
        scatter = analysis.chosen.scatter_percent
        lines.append(f"scatter around the {fit.form.name} fit: {scatter:.2f} % ({len(data)} configurations, {fit.dof} "
                     f"degrees of freedom; Huber's delta {100 * fit.delta:.2f} %)")
        lines += misfit_lines(analysis.chosen)
    return lines


def misfit_lines(form: JudgedForm) -> list[str]:
    """Return a warning if the points lie further from a fit than noise explains: then its intervals are unreliable."""
    noise = form.fit.data.seed_noise
    return [] if not noise or form.scatter_percent <= 300 * noise else [
        f"{form.name}: the scatter ({form.scatter_percent:.2f} %) is more than three times the noise between seeds: the "
        "form misses something that is there, and its intervals do not know it"]


def verdict_lines(analysis: Analysis) -> list[str]:
    """Return lines that name the best form, the forms that cannot be distinguished from it, and the skipped forms."""
    lines = []
    ranking = analysis.joint.ranking
    if ranking and analysis.chosen:
        best = ranking.winner
        lines.append(f"{best.name} predicts held-out points best ({percent(best.held_out_percent)} % over "
                     f"{ranking.tested_on} configurations, each in one split or more)"
                     if not ranking.untested else
                     f"not ranked: too few points to test {', '.join(ranking.untested)} on held-out ones; {best.name} has "
                     "the smallest scatter around those it was fitted to, which says little")
        lines += [f"= {name} cannot be told from it: {reason}" for name, reason in ranking.ties.items()]
        if analysis.chosen is not best:
            lines.append(f"what follows is of the form that was asked for, {analysis.chosen.name}")
    for section in (analysis.joint, *analysis.single):
        lines += [f"not fitted, {text}" for text in section.skipped]
    return lines


def exponent_line(tradeoff: Tradeoff) -> str:
    """Return a line with the exponents of the frontier."""
    n, d = tradeoff.n_exponent, tradeoff.d_exponent
    unsure = "" if n.identified else "; the data do not identify how a budget is best spent"
    return (f"compute-optimal at {tradeoff.rule}: N* ~ C^{n.value:.3f} ({span(n.low, n.high)}), "
            f"D* ~ C^{d.value:.3f} ({span(d.low, d.high)}){unsure}")


def sources(runs: Runs) -> str:
    """Return the column from which each variable was read."""
    return ", ".join(f"{role} from {'1 - ' if runs.from_accuracy and role == runs.target else ''}{name}"
                     for role, name in runs.columns.items())


# ------------------------------------------------------------------------------------------------------- screen


def print_titled(console: Console, title: str, header: Sequence[str], rows: TableRows) -> None:
    """Print a table with columns of words aligned left and numbers aligned right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
                  collapse_padding=True)
    words = {"form", "parameter", "verdict", "beyond the data"}
    for name in header:
        table.add_column(name, justify="left" if name in words else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_summary(console: Console, analysis: Analysis) -> None:
    """Print the verdicts; the Markdown summary also has the parameters of every form."""
    runs = analysis.runs
    console.print(sources(runs), highlight=False)
    console.print(f"{len(runs.runs)} runs of {len(analysis.joint.data)} configurations; {len(runs.left_out)} rows left out",
                  highlight=False)
    for note in analysis.notes:
        console.print(f"note: {note}", style="yellow", highlight=False)
    console.print()
    if analysis.joint.ranking:
        print_titled(console, "mean absolute relative error (%); held out: the mean of what is to its right",
                    *ranking_rows(analysis.joint.ranking, SPLIT_TITLES))
    for line in (*verdict_lines(analysis), *noise_lines(analysis)):
        console.print(line, highlight=False)
    console.print()
    if analysis.chosen:
        form = analysis.chosen
        print_titled(console, f"{form.name}: {form.fit.form.formula}", *parameter_rows(analysis.joint, form))
    for section in analysis.single:
        if section.ranking:
            # Show all forms if they cannot be ranked.
            for form in section.ranking.forms if section.ranking.untested else [section.ranking.winner]:
                missed = "too few points to hold any out" if form.held_out_percent is None else (
                    f"{percent(form.held_out_percent)} % held out")
                print_titled(console, f"{section.title}: {form.fit.form.formula} ({missed}, {form.in_sample_percent:.2f} % "
                            "in sample)", *parameter_rows(section, form))
                for line in misfit_lines(form):
                    console.print(line, highlight=False)
    if analysis.tradeoff:
        console.print(exponent_line(analysis.tradeoff), highlight=False)
        header, rows = frontier_rows(analysis, analysis.tradeoff)
        narrow = console.width < 110
        keep = [index for index, name in enumerate(header) if not (narrow and name == "95 %")]
        print_titled(console, "", [header[index] for index in keep], [[row[index] for index in keep] for row in rows])


def print_prediction(console: Console, runs: Runs, chosen: Fit, forms: dict[str, Fit], ranking: Ranking, n: float, d: float,
                     epochs: float | None, network: str = "") -> None:
    """Print a prediction: its intervals, how far it lies beyond the runs, and the predictions of the other forms.

    Args:
        console: the console to print to.
        runs: the fitted runs.
        chosen: the fit that predicts.
        forms: the fits of all forms by name.
        ranking: the held-out errors of the forms.
        n: the number of parameters.
        d: the number of training examples.
        epochs: the epochs for the compute that is printed; None takes those of the runs.
        network: the network with N parameters, in words.
    """
    found = predict(chosen, n, d)
    passes = epochs if epochs is not None else runs.passes
    console.print(f"{network}N = {n:,.12g}, D = {d:,.12g}, {runs.compute_rule(passes)}: compute {n * d * passes:.3g}",
                  highlight=False)
    console.print(f"predicted {runs.target}: {number(found.loss)} by the {chosen.form.name} form, fitted to "
                  f"{len(chosen.data)} configurations", style="bold", highlight=False)
    console.print(f"95 % interval: {span(*found.mean)} for the mean over seeds, {span(*found.run)} for one run",
                  highlight=False)
    judged = next(entry for entry in ranking.forms if entry.name == chosen.form.name)
    errors = judged.held_out_percent
    if found.beyond:
        reach = " and ".join(f"{name} {factor:.2g} times" for name, factor in found.beyond.items())
        console.print(f"an extrapolation: {reach} beyond the runs"
                      + (f"; held-out points were missed by {percent(errors)} % on average" if errors is not None else "")
                      + "; the interval holds if the form does", style="yellow", highlight=False)
    else:
        console.print("inside the range of the runs", highlight=False)
    others = {name: float(entry.predict({"N": np.array([n]), "D": np.array([d])})[0]) for name, entry in forms.items()
              if name != chosen.form.name}
    if others:
        console.print("other forms: " + ", ".join(
            f"{name} {number(value)}{' (cannot be told from the best)' if name in ranking.ties else ''}"
            for name, value in others.items()), highlight=False)
    for line in (*misfit_lines(judged), *runs.notes):
        console.print(line, style="yellow", highlight=False, soft_wrap=True)
    if epochs is not None:
        console.print("the forms see N and D alone: epochs change C, not the prediction", highlight=False)


# ----------------------------------------------------------------------------------------------------- Markdown


def markdown_table(header: Sequence[str], rows: TableRows) -> list[str]:
    """Return the lines of a Markdown table with its first column aligned left."""
    return ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1),
            *("| " + " | ".join(row) + " |" for row in rows), ""]


def markdown(analysis: Analysis, plots: Sequence[Path]) -> str:
    """Return the summary as Markdown."""
    runs = analysis.runs
    lines = [f"# Scaling of the {runs.target}", "",
             f"`{runs.path.name}`: {len(runs.runs)} runs of {len(analysis.joint.data)} configurations; {sources(runs)}; "
             + ("C = N * D * epochs." if "epochs" in runs.columns else f"{runs.compute_rule(runs.passes)}."), "",
             "Intervals are 95 %: profiles of the robust cost, calibrated with F(1, n - p); the bootstrap of the residuals "
             "stands beside them. Errors are mean absolute relative errors in percent. Forms are ranked by points that "
             "they did not see. `=` marks those that cannot be told from the first: they are apart by less than the noise "
             "between seeds, or by what Student's t over the held-out configurations, each counted once, allows. The "
             "points of a split share the error of one fit, and the first form was chosen by the errors that are stated "
             "for it: "
             "both make a ranking look surer than it is.", ""]
    if analysis.joint.ranking:
        lines += ["## Forms", "", *markdown_table(*ranking_rows(analysis.joint.ranking, SPLIT_TITLES))]
    lines += [*(f"- {line}" for line in (*verdict_lines(analysis), *noise_lines(analysis))), ""]
    for section in (analysis.joint, *analysis.single):
        if section.ranking:
            lines += [f"## {section.title[0].upper()}{section.title[1:]}", ""]
            if section is not analysis.joint:
                lines += markdown_table(*ranking_rows(section.ranking, SPLIT_TITLES))
            for form in section.ranking.forms:
                lines += [f"**{form.name}**: `{form.fit.form.formula}`", "",
                          *markdown_table(*parameter_rows(section, form)), *misfit_lines(form), ""]
    if analysis.tradeoff:
        lines += ["## Compute-optimal frontier", "", f"{exponent_line(analysis.tradeoff)}, by the "
                  f"{analysis.chosen.name if analysis.chosen else ''} form.", "",
                  *markdown_table(*frontier_rows(analysis, analysis.tradeoff))]
    if analysis.notes or runs.left_out:
        lines += ["## Rows", "", *(f"- {note}" for note in analysis.notes), ""]
    if plots:
        lines += ["## Plots", "", *(f"![{path.stem}]({path.name})" for path in plots), ""]
    return "\n".join(lines).rstrip() + "\n"


# --------------------------------------------------------------------------------------------------------- JSON


def plain(value: Any) -> Any:
    """Convert to JSON types; NaN and infinities become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def _interval(interval: Interval) -> dict[str, Any]:
    return {"value": interval.value, "low": interval.low, "high": interval.high, "bootstrap": interval.bootstrap,
            "identified": interval.identified, "verdict": interval.verdict}


def _section(section: Section) -> dict[str, Any]:
    forms = []
    for form in section.ranking.forms if section.ranking else []:
        fit = form.fit
        forms.append({
            "name": form.name, "formula": fit.form.formula, "points": len(fit.data), "degrees_of_freedom": fit.dof,
            "parameters": {name: _interval(value) for name, value in section.intervals[form.name].items()},
            "huber_delta": fit.delta, "scale": fit.scale, "run_noise": fit.run_noise,
            "in_sample_percent": form.in_sample_percent, "held_out_percent": form.held_out_percent,
            "splits": {name: {"edge": split.edge, "points": len(split.observed), "error_percent": split.error_percent,
                              "observed": split.observed, "predicted": split.predicted}
                       for name, split in form.splits.items()}})
    return {"title": section.title, "forms": forms, "skipped": section.skipped,
            "ties": section.ranking.ties if section.ranking else {},
            "tested_on": section.ranking.tested_on if section.ranking else 0,
            "noise_percent": section.ranking.noise_percent if section.ranking else None}


def _band(values: Array) -> dict[str, Any]:
    low, high = band(values)
    return {"low": low, "high": high}


def to_json(analysis: Analysis) -> dict[str, Any]:
    """Return the content of fit.json."""
    runs, tradeoff, data = analysis.runs, analysis.tradeoff, analysis.joint.data
    content: dict[str, Any] = {
        "schema": 1, "source": runs.path.name, "target": runs.target, "columns": runs.columns, "ceiling": analysis.ceiling,
        "runs": len(runs.runs), "seed_noise": data.seed_noise, "notes": analysis.notes,
        "left_out": [{"line": row.line, "reason": row.reason} for row in runs.left_out],
        "points": {**data.values, runs.target: np.exp(data.log_loss), "runs": data.runs},
        "chosen": analysis.chosen.name if analysis.chosen else None,
        "joint": _section(analysis.joint), "single": [_section(section) for section in analysis.single], "frontier": None}
    if tradeoff:
        content["frontier"] = {
            "passes": tradeoff.passes, "rule": tradeoff.rule, "n_exponent": _interval(tradeoff.n_exponent),
            "d_exponent": _interval(tradeoff.d_exponent), "C": tradeoff.best.compute,
            "N": {"value": tradeoff.best.n[0], **_band(tradeoff.draws.n)},
            "D": {"value": tradeoff.best.d[0], **_band(tradeoff.draws.d)},
            runs.target: {"value": tradeoff.best.loss[0], **_band(tradeoff.draws.loss)}}
    result = plain(content)
    assert isinstance(result, dict)
    return result


def write_all(analysis: Analysis, folder: Path, draw: bool = True) -> list[Path]:
    """Write summary.md, fit.json and, if `draw`, the plots; return the paths of the plots."""
    from compress.studies.scaling.plots import draw_all

    folder.mkdir(parents=True, exist_ok=True)
    plots = draw_all(analysis, folder) if draw else []
    write_atomically(folder / "summary.md", markdown(analysis, plots).encode())
    write_json(folder / "fit.json", to_json(analysis))
    return plots
