"""A recipe with limits: what makes its student stays, and a search takes the place of what compresses it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from compress.pipeline.config import RunConfig, changed, resolve
from compress.training.distillation import TeacherLoss
from metadata.errors import UserError

STUDENTS = ("distill", "student")  # stages that give the student
ENDS = ("package", "evaluate")  # stages that follow the search


def search_config(recipe: str, overrides: Iterable[str], settings: dict[str, Any]) -> RunConfig:
    """Return the run of a recipe in which a stage `search` replaces all between the student and the package.

    A recipe that has a stage `search` keeps its stages, and the settings change that stage.

    Args:
        recipe: a packaged recipe by name, or a YAML file by path.
        overrides: `key=value`; those of the search begin with `search.`.
        settings: of the search; None is not given.

    Raises:
        UserError: see `resolve`; or the recipe makes no student.
    """
    overrides = list(overrides)
    given = {key: value for key, value in settings.items() if value is not None}
    own = [override for override in overrides if override.partition(".")[0] == "search"]
    config = resolve(recipe, [override for override in overrides if override not in own])
    entries = [(name, options) for entry in config.stages for name, options in entry.items()]
    names = [name for name, _ in entries]
    if "search" not in names:
        place = max((index for index, name in enumerate(names) if name in STUDENTS), default=None)
        if place is None:
            raise UserError(f"recipe {recipe}: it makes no student, and a search shrinks one; add a stage distill or "
                            "student")
        options = dict(entries)
        ends = [{name: options.get(name, {})} for name in ENDS]
        stages = [*config.stages[:place + 1], {"search": _inherited(entries[place:])}, *ends]
        named = {"name": f"{config.name}-search"} if config.name == config.recipe else {}
        config = config.model_copy(update={"stages": stages, **named})
    return changed(config, [*((f"search.{key}", value) for key, value in given.items()), *own])


def _inherited(entries: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return settings of the search that the replaced stages suggest: how they train, and by what method of distillation.

    Args:
        entries: the stage of the student, and the stages behind it.
    """
    found: dict[str, Any] = {}
    for name, options in entries:
        if name not in (*STUDENTS, "finetune"):
            continue
        if train := {key: value for key, value in options.get("train", {}).items() if key not in ("epochs", "num_epochs",
                                                                                                 "max_steps")}:
            found["train"] = {**train, "epochs": 1000}
        if options.get("method") not in ("attention", "features"):  # by features, which the search does not compare
            found |= {key: options[key] for key in TeacherLoss.model_fields if key in options}
    return found
