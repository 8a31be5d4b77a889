"""Verbs of the pipeline: `run`, `plan`, `recipes`, `stages`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from compress.pipeline.run import RunOutcome
    from compress.settings import Config

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="name of a packaged recipe (see `recipes`), or path of a "
                                                                  ".yaml file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...",
                                                       help="settings to change, such as prune.ratio=0.4 seed=1")]


def run(recipe: RecipeName, overrides: Overrides = None,
        update: Annotated[bool, typer.Option("--update", help="make finished stages again that changed settings, "
                                                      "data, files or code affect")] = False,
        ) -> None:
    """Run a recipe from teacher to scored submission. The same command continues an interrupted run."""
    from compress.training.trackers import terminal
    from compress.pipeline.config import resolve
    from compress.pipeline.run import run_pipeline

    console = terminal()
    print_outcome(console, run_pipeline(resolve(recipe, overrides or []), console, update))


def print_outcome(console: Console, outcome: RunOutcome) -> None:
    """Print the ledger of a finished run, its warnings, its scores and its files."""
    from compress.cli.tables import print_ledger

    print_ledger(console, outcome.rows)
    for text in outcome.warnings:
        console.print(f"warning: {text}", style="bold red", highlight=False, soft_wrap=True)
    if outcome.results:
        console.print(f"total score {outcome.results['total_score']:.3f}, guarded "
                      f"{outcome.results['details']['guarded_score']:.3f}", highlight=False)
    for what, name in (("submission", "submission"), ("results", "results.json"), ("report", "report.html"),
                       ("as text", "report.md"), ("plot", "plot.png")):
        if (path := outcome.folder / name).exists():
            console.print(f"{what + ':':12}{path}", highlight=False, soft_wrap=True)


def plan(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Check a recipe and its data, and print what would run. Train nothing and write nothing."""
    from compress.training.trackers import Tracker, terminal
    from compress.pipeline.config import resolve
    from compress.pipeline.folder import standing
    from compress.pipeline.plan import make_plan

    console = terminal()
    tracker = Tracker(console)
    planned = make_plan(resolve(recipe, overrides or []), tracker)
    for text in (*planned.splits.warnings, *planned.sketch.warnings):
        tracker.warn(text)
    card = planned.splits.card
    console.print(f"{planned.config.recipe}: {card.name}, {card.num_classes} classes, {list(card.input_shape)}, "
                  f"{card.counts}", highlight=False)
    for (name, stage), line in zip(planned.stages, planned.sketch.lines, strict=True):
        console.print(f"{name:22}{line}", highlight=False, soft_wrap=True)
        console.print(f"{'':22}{json.dumps(stage.model_dump(mode='json'))}", style="dim", highlight=False, soft_wrap=True)
    for text in standing(planned):
        console.print(text, highlight=False, soft_wrap=True)


def recipes() -> None:
    """List the packaged recipes."""
    from compress.settings import RECIPES, recipe_names

    for name in recipe_names():
        first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
        typer.echo(f"{name:30}{first.removeprefix('#').strip()}")


def stages() -> None:
    """List the stages, their settings and their defaults."""
    from compress.pipeline.stage import stage_class, stage_names

    for name in stage_names():
        kind = stage_class(name)
        typer.echo(f"{name}: {(kind.__doc__ or '').strip().splitlines()[0]}")
        _print_settings(kind, "    ")


def _print_settings(kind: type[Config], indent: str, defaults: Config | None = None) -> None:
    """Print the settings of a class. `defaults` is what the setting that holds them defaults to, if it has its own."""
    from compress.settings import Config

    for key, info in kind.model_fields.items():
        default = info.default if defaults is None else getattr(defaults, key)
        if isinstance(info.annotation, type) and issubclass(info.annotation, Config):
            typer.echo(f"{indent}{key}: {info.description or ''}".rstrip())
            _print_settings(info.annotation, indent + "  ", default if isinstance(default, Config) else None)
        else:
            typer.echo(f"{indent}{key} = {default!r}  {info.description or ''}".rstrip())
