"""Write report.html: the template filled with what a run's folder holds, its style, its script and plotly's."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.evaluation.score import wilson
from compress.pipeline.folder import PAGE
from compress.pipeline.page.answers import compared, last_answers, worst_classes
from compress.pipeline.page.charts import curves, cut_short, front_by_bytes, front_by_latency, in_range
from compress.pipeline.page.content import (
    CANDIDATES, COVERAGE, FinishedRun, candidate_id, candidate_tables, measured_models, stage_id, trainings)
from compress.pipeline.repeat import RECIPE, as_recipe, repeating_command
from compress.settings import flattened
from metadata.errors import some_of
from metadata.files import write_atomically
from metadata.machine import machine, versions
from metadata.records import LedgerRow

TEXTS = Path(__file__).parent  # page.html, page.css and page.js lie beside this file
LONG = 24  # characters of a cell whose text may go over several lines


def write_page(run: FinishedRun) -> None:
    """Write report.html into the run's folder.

    Raises:
        OSError: the folder is full or read-only.
        UserError: a file of the run's folder is damaged, or an image cannot be read any more.
    """
    write_atomically(run.folder / PAGE, page(run).encode(errors="backslashreplace"))


def page(run: FinishedRun) -> str:
    """Return the page. The browser is told to run these two scripts and nothing else, and to ask for nothing."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), (TEXTS / "page.js").read_text()]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEXTS), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": _number, "percent": _percent, "cell": _cell, "columns": _columns,
                            "measurements": _measurements}
    environment.globals |= {"wilson": wilson, "stage_id": stage_id, "candidate_id": candidate_id}
    before, after = last_answers(run)
    return environment.get_template("page.html").render(
        run=run, policy=_policy(scripts), scripts=[Markup(script) for script in scripts],
        style=Markup((TEXTS / "page.css").read_text()), plots=_plots(run), stages=_stages(run), tiles=_tiles(run),
        off_range=_off_range(run), machine={**flattened(machine()), "threads of the run": run.config.threads or "all"},
        versions=versions(), command=repeating_command(run.config), recipe=as_recipe(run.config), recipe_file=RECIPE,
        worst=worst_classes(run, before, after) if after else None,
        comparison=compared(run, before, after) if before and after else None, last=after)


def _policy(scripts: Sequence[str]) -> str:
    """Return the Content-Security-Policy that allows the page's own scripts, styles and pictures alone."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'"


def _plots(run: FinishedRun) -> dict[str, str]:
    """Return the plots by their ids, as JSON that may stand inside HTML; training curves only where something trained."""
    from plotly.io import to_json

    models, trained = measured_models(run), trainings(run)
    figures = {"front-bytes": front_by_bytes(models), "front-latency": front_by_latency(models)}
    if trained:
        figures |= {"curves-accuracy": curves(trained, "accuracy", "accuracy"),
                    "curves-loss": curves(trained, "loss", "loss (log)")}
    return {name: to_json(figure) for name, figure in figures.items()}


def _off_range(run: FinishedRun) -> str:
    """Return the models that lie below what the plots show at first, in words."""
    models = measured_models(run)
    shown = in_range(models)
    return some_of([f"{model.name} ({model.accuracy:.2%})" for model in models if model not in shown], 6)


def _tiles(run: FinishedRun) -> list[tuple[str, str, str]]:
    """Return the figures on top: what, how much, and beside what; the last model against the first one."""
    rows = [record.rows[0] for record in run.records]
    first, last = rows[0], rows[-1]
    low, high = wilson(last.correct, last.images)
    return [("accuracy", f"{last.accuracy:.2%}", f"{last.images:,} {last.split} images, 95 %: {low:.1%} to {high:.1%}"),
            ("bytes of weights", *_beside(first, last.size_bytes, first.size_bytes, "{:,}")),
            ("latency", *_beside(first, last.latency_ms, first.latency_ms, "{:.3g}\N{NO-BREAK SPACE}ms")),
            ("MACs", *_beside(first, last.macs, first.macs, "{:,}"))]


def _beside(first: LedgerRow, now: float, before: float, form: str) -> tuple[str, str]:
    """Return a cost in words, and how many times less, or more, it is than the first model's."""
    if not before or not now or before == now:
        return form.format(now), ""
    ratio, word = (before / now, "less") if before > now else (now / before, "more")
    return form.format(now), f"{ratio:.3g} × {word} than the {first.stage}'s {form.format(before)}"


def _stages(run: FinishedRun) -> list[dict[str, Any]]:
    """Return what the page tells of each stage beside its ledger rows."""
    found = []
    for index, record in enumerate(run.records):
        chosen = run.chosen_settings(index)
        notes = {name: note for name, note in record.notes.items() if name not in (CANDIDATES, COVERAGE)}
        tables = {name: rows for name, rows in notes.items()
                  if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)}
        notes = {key: note for key, note in flattened({
            name: note for name, note in notes.items() if name not in tables}).items() if key}
        defaults = {key: value for key, value in flattened(record.config).items() if key and key not in chosen}
        found.append({"id": stage_id(index), "name": record.stage.partition("-")[2], "warnings": record.warnings,
                      "rows": record.rows, "is_int8": index >= run.quantized, "chosen": chosen,
                      "defaults": defaults, "notes": notes, "tables": tables,
                      "coverage": record.notes.get(COVERAGE, []), "candidates": candidate_tables(run, index)})
    return found


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the columns of a table of mappings, each with its class in the style sheet: numbers, texts or long texts."""
    found = []
    for key in dict.fromkeys(key for row in rows for key in row):
        texts = [_cell(row[key]) for row in rows if isinstance(row.get(key), str | dict | list)]
        found.append((key, "long text" if any(len(text) > LONG for text in texts) else "text" if texts else ""))
    return found


def _measurements(row: LedgerRow) -> dict[str, str]:
    """Return a ledger row in words."""
    low, high = wilson(row.correct, row.images)
    return {"accuracy": f"{row.accuracy:.2%}", "95 % interval": f"{low:.2%} to {high:.2%}",
            "right": f"{row.correct:,} of {row.images:,} {row.split} images", "bytes of weights": f"{row.size_bytes:,}",
            "latency, median": f"{row.latency_ms:.3f} ms",
            "latency, p5 to p95": f"{row.latency_p5_ms:.3f} to {row.latency_p95_ms:.3f} ms", "MACs": f"{row.macs:,}",
            "parameters": f"{row.parameters:,}", "seconds": f"{row.seconds:,.1f}"}


def _number(value: float | None, form: str = ",") -> str:
    """Return a number, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def _percent(value: float) -> str:
    return f"{value:.2%}"


def _cell(value: Any) -> str:
    """Return any value as the text of a cell."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_cell(part)}" for key, part in value.items()) or "–"
    if isinstance(value, list):
        return cut_short(", ".join(map(_cell, value)), 400) or "–"
    return f"{value:,}" if isinstance(value, int) else str(value) or "–"
