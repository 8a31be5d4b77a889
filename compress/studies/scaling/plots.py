"""The plots of a study as PNG and SVG: loss against N, D and C, isoFLOP curves, residuals, frontier, held-out points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from compress.studies.scaling.analysis import Analysis, Section
from compress.studies.scaling.forms import Array
from compress.studies.scaling.frontier import band, optimum
from compress.studies.scaling.ranking import JudgedForm, SPLIT_TITLES
from metadata.formats import write_figure

NAMES = {"N": "parameters N", "D": "training examples D"}
CURVES = 6  # maximum number of levels of the other variable; more are indistinguishable
MARKERS = "osD^v"
DOTS: dict[str, Any] = {"s": 26, "edgecolor": "white", "linewidth": 0.6}


def draw_all(analysis: Analysis, folder: Path) -> list[Path]:
    """Draw every plot for which the analysis has fits.

    Returns:
        The PNG files; each has an SVG file beside it.
    """
    import matplotlib
    matplotlib.use("Agg")

    drawn = []
    for index, variable in enumerate("ND"):
        if analysis.chosen or analysis.single[index].ranking:
            drawn.append(_against(analysis, variable, folder / f"loss_{variable.lower()}.png"))
    if analysis.chosen or analysis.single[2].ranking:
        drawn.append(_against_compute(analysis, folder / "loss_c.png"))
    if analysis.chosen:
        drawn += [_isoflop(analysis, analysis.chosen, folder / "isoflop.png"),
                  _residuals(analysis, analysis.chosen, folder / "residuals.png"),
                  _frontier(analysis, analysis.chosen, folder / "frontier.png")]
        if any(split.predicted is not None for split in analysis.chosen.splits.values()):
            drawn.append(_held_out(analysis, folder / "held_out.png"))
    return drawn


@contextmanager
def _canvas(path: Path, columns: int = 1, size: tuple[float, float] = (8.0, 5.2), **options: Any) -> Iterator[Any]:
    """Yield the axes of a figure that is written at the end of the block."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False, **options)
    for axis in axes[0]:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    yield axes[0]
    write_figure(path, figure, dpi=130, svg=True)


def _label_log(axis: Any, low: float, high: float) -> None:
    """Set readable ticks on a logarithmic axis: 0.5, 0.7, 1, not 5 x 10^-1; over many decades only powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(high / low) if high > low > 0 else 1.0
    if decades < 3:
        fine = ((1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9) if decades < 0.6 else
                (1, 1.5, 2, 3, 4, 6, 8) if decades < 1 else (1, 2, 5) if decades < 2 else (1, 3))
        axis.set_major_locator(LogLocator(subs=fine, numticks=30))
        axis.set_major_formatter(FuncFormatter(lambda value, _: brief(value)))
        axis.set_minor_formatter(NullFormatter())


def compute_label(analysis: Analysis) -> str:
    """Return the label of the compute axis."""
    column = analysis.runs.columns.get("C")
    return f"compute C ({column})" if column else "compute C = N · D · epochs"


def brief(value: float) -> str:
    """Format a number for a label: 0.35, 1,200, 50k, 2.4M, 16B, 7.2e13."""
    if value >= 1e12:
        return scientific(value)
    if value < 1e4:
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    if value < 1e6:
        return f"{value / 1e3:.3g}k"
    return f"{value / 1e6:.3g}M" if value < 1e9 else f"{value / 1e9:.3g}B"


def scientific(value: float) -> str:
    """Format a budget, such as 7.2e11."""
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def _levels(values: Array, most: int = CURVES) -> Array:
    """Return at most `most` of the distinct values, including both ends."""
    levels = np.unique(values)
    return levels if len(levels) <= most else levels[np.unique(np.linspace(0, len(levels) - 1, most).round().astype(int))]


def _colours(values: Array) -> tuple[Any, Any]:
    """Return shades from light to dark and their logarithmic scale, without the palest shades, which vanish on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    low, high = float(values.min()), float(values.max())
    return (ListedColormap(colormaps["viridis"](np.linspace(0.88, 0, 256))),
            LogNorm(low, high if high > low else low * 1.01))


def _colour_bar(axis: Any, shades: Any, norm: Any, label: str) -> None:
    from matplotlib.cm import ScalarMappable

    bar = axis.figure.colorbar(ScalarMappable(norm, shades), ax=axis, pad=0.015, aspect=30)
    bar.set_label(label)
    _label_log(bar.ax.yaxis, norm.vmin, norm.vmax)


def _frame(axis: Any, x: Sequence[float] | Array, y: Sequence[float] | Array, labels: tuple[str, str]) -> None:
    """Set logarithmic axes whose limits fit the points, not the bands."""
    axis.set(xscale="log", yscale="log", xlabel=labels[0], ylabel=labels[1])
    for which, values in ((axis.set_xlim, x), (axis.set_ylim, y)):
        low, high = float(np.min(values)), float(np.max(values))
        pad = (high / low) ** 0.06 if high > low else 1.3
        which(low / pad, high * pad)
    _label_log(axis.xaxis, *axis.get_xlim())
    _label_log(axis.yaxis, *axis.get_ylim())


def _legend(axis: Any, **options: Any) -> None:
    """Place the legend below the axes, where there are no data."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False, fontsize=9, **{"ncols": 3, **options})


def _left_out(analysis: Analysis, axis: Any, variable: str) -> list[float]:
    """Draw crosses for rows that are left out but have numbers; return the losses of the crosses."""
    highest = 1.5 * float(np.exp(analysis.joint.data.log_loss.max()))
    shown = [(row.n if variable == "N" else row.d, row.loss) for row in analysis.runs.left_out
             if row.n and row.d and row.loss and row.loss < highest and not row.reason.startswith("repeats")]
    if not shown or analysis.runs.target != "loss":
        return []
    axis.plot(*zip(*shown, strict=True), linestyle="none", marker="x", color="C3", label="left out of the fits")
    return [loss for _, loss in shown if loss]


def _against(analysis: Analysis, variable: str, path: Path) -> Path:
    """Draw loss against N or D, coloured by the other, with the curves of the joint fit, or of the power law if none."""
    data, other = analysis.joint.data, "D" if variable == "N" else "N"
    loss, x = np.exp(data.log_loss), data.values[variable]
    xs = np.geomspace(x.min() / 1.3, x.max() * 1.3, 80)
    shades, norm = _colours(data.values[other])
    with _canvas(path) as (axis,):
        if analysis.chosen:
            form, draws = analysis.chosen.fit.form, analysis.joint.draws[analysis.chosen.name]
            for level in _levels(data.values[other]):
                values = {variable: xs, other: np.full_like(xs, level)}
                colour = shades(norm(level))
                axis.fill_between(xs, *band(form.predict(draws, values)), color=colour, alpha=0.18, linewidth=0)
                axis.plot(xs, analysis.chosen.fit.predict(values), color=colour, linewidth=1.5)
            axis.plot([], [], color="0.4", linewidth=1.5, label=f"{form.name} fit with 95 % band, at some {other}")
        else:
            _draw_single(axis, analysis.single["ND".index(variable)], variable, xs)
        axis.scatter(x, loss, c=data.values[other], cmap=shades, norm=norm, zorder=3, **DOTS)
        crosses = _left_out(analysis, axis, variable)
        _frame(axis, x, [*loss, *crosses], (NAMES[variable], analysis.runs.target))
        _legend(axis)
        _colour_bar(axis, shades, norm, NAMES[other])
        axis.set_title(f"{analysis.runs.target} against {NAMES[variable]}")
    return path


def _draw_single(axis: Any, section: Section, variable: str, xs: Array, colour: str = "C3") -> None:
    if section.ranking:
        best = section.ranking.winner.fit
        curves = best.form.predict(section.draws[best.form.name], {variable: xs})
        axis.fill_between(xs, *band(curves), color=colour, alpha=0.15, linewidth=0)
        axis.plot(xs, best.predict({variable: xs}), color=colour, linewidth=1.4, linestyle="--",
                  label=f"{best.form.name} ({section.title.partition(' ')[2]})")


def _against_compute(analysis: Analysis, path: Path) -> Path:
    """Draw loss against compute, coloured by N, with the best loss of the fit for each budget and the power law."""
    data, frontier = analysis.joint.data, analysis.tradeoff
    loss, x = np.exp(data.log_loss), data.values["C"]
    shades, norm = _colours(data.values["N"])
    with _canvas(path) as (axis,):
        for level in np.unique(data.values["N"]):
            own = np.flatnonzero(data.values["N"] == level)
            own = own[np.argsort(x[own])]
            axis.plot(x[own], loss[own], color=shades(norm(level)), linewidth=0.8, alpha=0.6)
        if frontier and analysis.chosen:
            axis.fill_between(frontier.best.compute, *band(frontier.draws.loss), color="black", alpha=0.12, linewidth=0)
            axis.plot(frontier.best.compute, frontier.best.loss[0], color="black", linewidth=1.6,
                      label=f"best by the {analysis.chosen.name} fit, {frontier.rule}")
        _draw_single(axis, analysis.single[2], "C", np.geomspace(x.min() / 1.3, x.max() * 1.3, 80))
        axis.scatter(x, loss, c=data.values["N"], cmap=shades, norm=norm, zorder=3, **DOTS)
        _frame(axis, x, loss, (compute_label(analysis), analysis.runs.target))
        _legend(axis, ncols=2)
        _colour_bar(axis, shades, norm, NAMES["N"])
        axis.set_title(f"{analysis.runs.target} against compute; thin lines join points of equal N")
    return path


def _isoflop(analysis: Analysis, chosen: JudgedForm, path: Path) -> Path:
    """Draw loss against N at equal compute: curves of the fit, their minima, and the observed points near each budget."""
    assert analysis.tradeoff
    data, passes = analysis.joint.data, analysis.tradeoff.passes
    loss = np.exp(data.log_loss)
    compute = data.values["N"] * data.values["D"] * passes  # counted as for the curves
    budgets = np.geomspace(float(np.quantile(compute, 0.1)), float(np.quantile(compute, 0.95)), 5)
    shades, norm = _colours(budgets)
    ends = data.values["N"].min() / 3, data.values["N"].max() * 3
    best = optimum(chosen.fit, chosen.fit.theta[None], budgets, passes)
    drawn_y, drawn_x = [], []
    with _canvas(path) as (axis,):
        for index, budget in enumerate(budgets):
            xs = np.geomspace(*ends, 160)
            values = {"N": xs, "D": budget / passes / xs}
            inside = (values["D"] > data.values["D"].min() / 3) & (values["D"] < data.values["D"].max() * 3)
            if inside.sum() < 2:
                continue
            values, colour = {name: value[inside] for name, value in values.items()}, shades(norm(budget))
            curve = chosen.fit.predict(values)
            axis.fill_between(values["N"], *band(chosen.fit.form.predict(analysis.joint.draws[chosen.name], values)),
                              color=colour, alpha=0.15, linewidth=0)
            axis.plot(values["N"], curve, color=colour, linewidth=1.5, label=f"C = {scientific(budget)}")
            near = np.abs(np.log(compute / budget)) < math.log(1.3)
            axis.scatter(data.values["N"][near], loss[near], color=colour, zorder=3, **DOTS)
            if ends[0] < best.n[0, index] < ends[1]:
                axis.plot(best.n[0, index], best.loss[0, index], marker="*", markersize=13, color=colour,
                          markeredgecolor="black", markeredgewidth=0.6, zorder=4, linestyle="none")
            drawn_x += [*values["N"]]
            drawn_y += [*curve, *loss[near]]
        if drawn_y:
            _frame(axis, drawn_x, drawn_y, (NAMES["N"], analysis.runs.target))
        _legend(axis)
        axis.set_title(f"isoFLOP curves of the {chosen.name} fit at {analysis.tradeoff.rule}\nstars: best N for the "
                       "budget; points: runs within 30 % of it, counted so", fontsize=11)
    return path


def _residuals(analysis: Analysis, chosen: JudgedForm, path: Path) -> Path:
    """Draw observed minus fitted, in percent, against N, D and the fitted loss; structure shows what the form misses."""
    data = analysis.joint.data
    fitted = np.exp(data.log_loss - chosen.fit.residuals)
    percent = 100 * np.expm1(chosen.fit.residuals)
    shades, norm = _colours(data.values["D"])
    noise = data.seed_noise
    with _canvas(path, 3, (13.0, 4.4), sharey=True) as axes:
        for axis, (values, label) in zip(axes, ((data.values["N"], NAMES["N"]), (data.values["D"], NAMES["D"]),
                                                (fitted, f"fitted {analysis.runs.target}")), strict=True):
            if noise:
                axis.axhspan(-200 * noise, 200 * noise, color="0.9", label="± 2 standard deviations between seeds")
            axis.axhline(0, color="black", linewidth=0.8)
            scatter = axis.scatter(values, percent, c=data.values["D"], cmap=shades, norm=norm, zorder=3, **DOTS)
            axis.set(xscale="log", xlabel=label)
            _label_log(axis.xaxis, *axis.get_xlim())
        axes[0].set_ylabel("observed against fitted (%)")
        if noise:
            axes[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=9)
        bar = axes[0].figure.colorbar(scatter, ax=list(axes), pad=0.01, aspect=30)
        bar.set_label(NAMES["D"])
        _label_log(bar.ax.yaxis, norm.vmin, norm.vmax)
        axes[1].set_title(f"residuals of the {chosen.name} fit")
    return path


def _frontier(analysis: Analysis, chosen: JudgedForm, path: Path) -> Path:
    """Draw N* and D* against compute with bands; shade the range beyond the data."""
    frontier, data = analysis.tradeoff, analysis.joint.data
    assert frontier
    last = float(data.values["C"].max())
    with _canvas(path, 2, (11.0, 4.8)) as axes:
        for axis, name, exponent, best, draws in (
                (axes[0], "N", frontier.n_exponent, frontier.best.n, frontier.draws.n),
                (axes[1], "D", frontier.d_exponent, frontier.best.d, frontier.draws.d)):
            seen = data.values[name]
            low, high = band(draws)
            axis.axhspan(seen.min(), seen.max(), color="C2", alpha=0.08, label=f"{name} that was run")
            axis.axvspan(last, 10 * frontier.best.compute[-1], color="0.92", label="more compute than was run")
            axis.fill_between(frontier.best.compute, low, high, color="C0", alpha=0.2, linewidth=0, label="95 % band")
            axis.plot(frontier.best.compute, best[0], color="C0", linewidth=1.8,
                      label=f"{name}* ~ C^{exponent.value:.2f}")
            axis.scatter(data.values["C"], seen, s=9, color="0.45", zorder=3, label="runs")
            _frame(axis, frontier.best.compute, np.concatenate([best[0], seen]),
                   (compute_label(analysis), f"compute-optimal {name}"))
            _legend(axis)
        axes[0].figure.suptitle(f"compute-optimal N and D by the {chosen.name} fit at {frontier.rule}")
    return path


def _held_out(analysis: Analysis, path: Path) -> Path:
    """Draw predicted against observed loss on held-out points, one panel for each split."""
    assert analysis.joint.ranking
    forms = analysis.joint.ranking.forms
    splits = [name for name in SPLIT_TITLES if any(name in form.splits and form.splits[name].predicted is not None
                                             for form in forms)]
    with _canvas(path, len(splits), (4.6 * len(splits), 5.0)) as axes:
        for axis, name in zip(axes, splits, strict=True):
            seen = []
            for index, form in enumerate(forms):
                split = form.splits[name]
                if split.predicted is None:
                    continue
                seen += [*split.observed, *split.predicted]
                axis.plot(split.observed, split.predicted, linestyle="none", marker=MARKERS[index], color=f"C{index}",
                          markersize=6, markeredgecolor="white", markeredgewidth=0.6, alpha=0.9,
                          label=f"{form.name}: {split.error_percent:.1f} %")
                edge = split.edge
            line = np.array([min(seen) / 1.2, max(seen) * 1.2])
            axis.fill_between(line, 0.95 * line, 1.05 * line, color="0.9", linewidth=0, zorder=0)
            axis.plot(line, line, color="black", linewidth=0.8, zorder=0)
            _frame(axis, seen, seen, (f"observed {analysis.runs.target}", f"predicted {analysis.runs.target}"))
            _legend(axis, ncols=2)
            count = int(forms[0].splits[name].chosen.sum())
            least = scientific(edge) if name == "C" else brief(edge)
            axis.set_title(f"{SPLIT_TITLES[name]} held out ({name} ≥ {least}, {count} points)",
                           fontsize=10)
        axes[0].figure.suptitle("predictions of points that were not fitted, with mean errors; grey: within 5 %")
    return path
