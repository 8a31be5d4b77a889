"""How a run is repeated: its resolved settings as a recipe, and the command."""

from __future__ import annotations

import contextlib
import json
import shlex
from typing import Any

import yaml

from compress.pipeline.config import RunConfig, read_recipe, resolve
from compress.settings import Plain, RECIPES, flattened, recipe_names
from metadata.errors import UserError

RECIPE = "recipe.yaml"


class _Dumper(yaml.SafeDumper):
    """Quotes each text that recipes would read as a number, such as 1e3, which is none to YAML 1.1."""


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
    "tag:yaml.org,2002:str", text, style=None if Plain(text).value == text else "'"))


def as_recipe(config: RunConfig) -> str:
    """Return a run's settings as a recipe that resolves to the same run in any `run_dir`."""
    content = yaml.dump(config.model_dump(mode="json", exclude={"run_dir"}), Dumper=_Dumper, sort_keys=False,
                        allow_unicode=True, width=120)
    return f"# the run {config.name} as it was resolved: python -m compress run {RECIPE} repeats it\n{content}"


def repeating_command(config: RunConfig) -> str:
    """Return the command that repeats a run: a packaged recipe with its overrides, or the recipe in the run's folder.

    A recipe of the user's own is at a path that the configuration does not know, and may have changed since.
    """
    if config.recipe in recipe_names(RECIPES):
        overrides = _overrides(RunConfig.model_validate(read_recipe(config.recipe)), config)
        with contextlib.suppress(UserError):  # a value that a command line cannot say
            if overrides is not None and resolve(config.recipe, overrides) == config:
                return shlex.join(["python", "-m", "compress", "run", config.recipe, *overrides])
    where = [] if config.run_dir == RunConfig.model_fields["run_dir"].default else [f"run_dir={config.run_dir}"]
    return shlex.join(["python", "-m", "compress", "run", str(config.run_dir / config.name / RECIPE), *where])


def _overrides(base: RunConfig, config: RunConfig) -> list[str] | None:
    """Return what turns a recipe into a run's configuration, as `key=value`; None where overrides cannot say it."""
    names = [next(iter(entry)) for entry in config.stages]
    if names != [next(iter(entry)) for entry in base.stages]:
        return None
    found = _differing("", *(settings.model_dump(mode="json", exclude={"stages"}) for settings in (base, config)))
    for index, (name, before, now) in enumerate(zip(names, base.stages, config.stages, strict=True)):
        number = f"#{names[:index + 1].count(name)}" if names.count(name) > 1 else ""
        found += _differing(f"{name}{number}.", before[name], now[name])
    return found


def _differing(prefix: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    was = flattened(before)
    return [f"{prefix}{key}={value if isinstance(value, str) else json.dumps(value, default=str)}"
            for key, value in flattened(now).items() if key and (key not in was or was[key] != value)]
