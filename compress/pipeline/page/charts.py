"""The page's plots as figures of plotly. Colours are names of the style sheet, which page.js looks up for light and dark.

Texts of the user go through `html.escape`: plotly reads a part of HTML in the texts that it draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from compress.pipeline.page.content import Kind, MeasuredModel

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

KINDS: dict[Kind, tuple[str, dict[str, Any]]] = {  # the drawing order; what the legend says, and the marker
    "float candidate": ("float candidate", {"size": 8, "color": "var(--float-candidate)"}),
    "int8 candidate": ("int8 candidate", {"size": 8, "color": "var(--int8-candidate)"}),
    "control": ("control", {"size": 22, "color": "var(--surface)", "line": {"color": "var(--float)", "width": 1.5}}),
    "float": ("float", {"size": 22, "color": "var(--float)"}),
    "int8": ("int8", {"size": 22, "color": "var(--int8)"}),
    "test": ("test split", {"size": 12, "color": "var(--surface)", "symbol": "diamond",
                            "line": {"color": "var(--test)", "width": 1.5}})}
NUMBERED = ("control", "float", "int8")
LINES = [f"var(--line-{number})" for number in range(1, 7)]
SETTINGS = 8  # the most that a hover text shows
FAR_BELOW = 0.7  # of the best accuracy: models below do not decide the range that a plot begins with
FEW = 4.0  # ratio of the ends of a logarithmic axis below which it has more labels than 1, 2 and 5
WIDE = 10.0  # ratio of the largest and the smallest latency above which their axis is logarithmic


def front_by_bytes(models: Sequence[MeasuredModel]) -> Figure:
    """Return accuracy against the bytes of the weights, on a logarithmic axis."""
    figure = _front([(model.size_bytes, (model.size_bytes,) * 2, model) for model in models])
    figure.update_xaxes(title_text="bytes of the weights (log)", tickformat="~s",
                        **_logarithmic([model.size_bytes for model in models]))
    return figure


def front_by_latency(models: Sequence[MeasuredModel]) -> Figure:
    """Return accuracy against latency; models whose latency was not measured are left out."""
    points = [(time, model.spread_ms or (time, time), model) for model in models if (time := model.latency_ms)]
    times = [time for time, _, _ in points]
    figure = _front(points)
    if times and max(times) > WIDE * min(times):
        figure.update_xaxes(title_text="milliseconds an image (log)", tickformat="~g", **_logarithmic(times))
    else:
        figure.update_xaxes(title_text="milliseconds an image", rangemode="tozero")
    return figure


def _logarithmic(values: Sequence[float]) -> dict[str, Any]:
    """Return the settings of a logarithmic axis: labels at 1, 2 and 5, and at more where few of these would be."""
    few = not values or max(values) < FEW * min(values)
    return {"type": "log", **({} if few else {"dtick": "D2"})}


def _front(points: Sequence[tuple[float, tuple[float, float], MeasuredModel]]) -> Figure:
    """Return accuracy against a cost: the line of the models that none beats in both, and a point for each model.

    Args:
        points: of each model its cost and the ends of the cost's interval.
    """
    from plotly import graph_objects as go

    figure = go.Figure(layout=_layout("accuracy"))
    best = not_beaten([(cost, model.accuracy) for cost, _, model in points if model.kind != "test"])
    figure.add_scatter(x=[cost for cost, _ in best], y=[accuracy for _, accuracy in best], mode="lines", name="front",
                       line={"shape": "hv", "color": "var(--front)", "width": 1.5, "dash": "dot"}, hoverinfo="skip")
    for kind, (legend, marker) in KINDS.items():
        own = [point for point in points if point[2].kind == kind]
        # The number of a point is drawn with its trace: in traces of their own, the later point covers the number too.
        for place, part in enumerate([[point] for point in own] if kind in NUMBERED else [own] if own else []):
            faint = kind.endswith("candidate")
            figure.add_scatter(
                x=[cost for cost, _, _ in part], y=[model.accuracy for _, _, model in part], name=legend, legendgroup=kind,
                showlegend=place == 0, mode="markers+text" if kind in NUMBERED else "markers", marker=marker,
                text=[escape(model.number) for _, _, model in part], cliponaxis=False,
                textfont={"size": 11, "color": "var(--ink)" if kind == "control" else "var(--on-mark)"},
                customdata=[[model.target, _told(model)] for _, _, model in part],
                hovertemplate="%{customdata[1]}<extra></extra>",
                error_x=_bars([(cost, *spread) for cost, spread, _ in part], "var(--interval)", 0),
                error_y=_bars([(model.accuracy, *model.interval) for _, _, model in part],
                              "var(--faint)" if faint else "var(--interval)", 0 if faint else 4))
    shown = in_range([model for _, _, model in points])
    if shown:
        low, high = min(model.interval[0] for model in shown), max(model.interval[1] for model in shown)
        figure.update_yaxes(range=[low - 0.06 * (high - low), high + 0.06 * (high - low)])
    return figure


def _bars(values: Sequence[tuple[float, float, float]], colour: str, width: int) -> dict[str, Any]:
    """Return the bars of intervals; each is given with its value first, then its lower and its upper end."""
    return {"type": "data", "symmetric": False, "thickness": 1, "width": width, "color": colour,
            "array": [high - value for value, _, high in values], "arrayminus": [value - low for value, low, _ in values]}


def in_range(models: Sequence[MeasuredModel]) -> list[MeasuredModel]:
    """Return the models that decide the range of accuracies: a network that was just pruned often answers by chance."""
    best = max((model.accuracy for model in models), default=0.0)
    return [model for model in models if model.accuracy >= FAR_BELOW * best]


def not_beaten(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, accuracy) of which no other costs at most as much and is more accurate, from the cheapest on."""
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((cost, accuracy))
    return best


def _told(model: MeasuredModel) -> str:
    """Return what stands beside the pointer."""
    low, high = model.interval
    lines = [f"<b>{escape(model.name)}</b>",
             f"{model.accuracy:.2%} of {model.images:,} {'test' if model.kind == 'test' else 'validation'} images",
             f"95 %: {low:.2%} to {high:.2%}", f"{model.size_bytes:,} bytes"]
    lines += [f"{model.latency_ms:.3g} ms"] if model.latency_ms else []
    settings = [f"{escape(cut_short(key, 40))}: {escape(cut_short(value, 40))}" for key, value in model.settings.items()]
    return "<br>".join([*lines, *settings[:SETTINGS], *["..."] * (len(settings) > SETTINGS)])


def curves(trainings: Mapping[str, Sequence[Mapping[str, float]]], value: str, title: str) -> Figure:
    """Return a metric over the epochs of each training: of the validation images, and dotted of the training images."""
    from plotly import graph_objects as go

    figure = go.Figure(layout=_layout(title))
    for index, (name, epochs) in enumerate(trainings.items()):
        colour, label = LINES[index % len(LINES)], escape(name)
        for split, dash in (("validation", "solid"), ("train", "dot")):
            key = f"{split}_{value}"
            measured = [epoch for epoch in epochs if key in epoch]
            if measured:
                figure.add_scatter(
                    x=[int(epoch["epoch"]) for epoch in measured], y=[epoch[key] for epoch in measured], name=label,
                    mode="lines" if len(measured) > 1 else "markers", legendgroup=label, showlegend=split == "validation",
                    line={"color": colour, "width": 2 if split == "validation" else 1.2, "dash": dash},
                    hovertemplate=f"{label}, {split}, epoch %{{x}}: %{{y}}<extra></extra>")
    figure.update_xaxes(title_text="epoch")
    if value == "loss":
        losses = [loss for trace in figure.data for loss in trace.y if loss > 0]
        figure.update_yaxes(tickformat="~g", hoverformat=".4g", **_logarithmic(losses))
    return figure


def _layout(vertical: str) -> dict[str, Any]:
    axis = {"gridcolor": "var(--grid)", "linecolor": "var(--faint)", "zeroline": False, "automargin": True,
            "ticks": "outside", "tickcolor": "var(--faint)", "ticklen": 4, "title": {"standoff": 8}}
    accuracy = {"tickformat": ".4~p", "hoverformat": ".2%"} if vertical == "accuracy" else {}
    family = "system-ui, sans-serif"
    return {"template": "none", "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "height": 400,
            "font": {"family": family, "size": 12, "color": "var(--muted)"},
            "margin": {"l": 8, "r": 16, "t": 40, "b": 8}, "hovermode": "closest",
            "hoverlabel": {"bgcolor": "var(--surface)", "bordercolor": "var(--faint)", "align": "left",
                           "font": {"family": family, "color": "var(--ink)", "size": 12}},
            "modebar": {"orientation": "v", "bgcolor": "rgba(0,0,0,0)", "color": "var(--faint)",
                        "activecolor": "var(--muted)"},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "xaxis": axis, "yaxis": {**axis, **accuracy, "title": {"text": vertical, "standoff": 8}}}


def cut_short(value: Any, length: int = 80) -> str:
    """Return a value as a short text."""
    text = str(value)
    return text if len(text) <= length else f"{text[:length - 3]}..."
