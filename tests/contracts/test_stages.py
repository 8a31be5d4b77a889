"""Every stage file keeps the contract: one class, documented settings, frozen, and annotations that `plan` can read."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from compress.pipeline.config import resolve
from compress.pipeline.plan import parse_stages
from compress.pipeline.stage import KINDS, Stage, signature, stage_class, stage_names
from compress.settings import Config, RECIPES, recipe_names


@pytest.mark.parametrize("name", stage_names())
def test_stage_contract(name: str) -> None:
    kind = stage_class(name)
    assert issubclass(kind, Stage) and kind.__doc__
    takes, gives = signature(kind)
    assert set(takes) <= set(KINDS) and gives and set(gives) <= set(KINDS) - {type(None)}
    for key, info in kind.model_fields.items():
        nested = isinstance(info.annotation, type) and issubclass(info.annotation, Config)
        assert info.description or nested, f"{name}.{key} has no description"
    with pytest.raises(ValidationError):
        kind.model_validate({"no_such_key": 1})
    stage = kind()
    with pytest.raises(ValidationError):
        stage.ratio = 0.1  # type: ignore[attr-defined]


def test_the_stages_of_the_design_are_there() -> None:
    assert set(stage_names()) >= {"teacher", "distill", "prune", "finetune", "quantize_dynamic", "export",
                                  "package", "evaluate"}


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_parse_and_say_what_they_are(name: str) -> None:
    config = resolve(name)
    stages = parse_stages(config)
    assert stages[0][0] == "01-teacher" and stages[-1][0].endswith("-evaluate")
    text = (RECIPES / f"{name}.yaml").read_text()
    assert text.startswith("# ") and len(text.splitlines()) <= 40
