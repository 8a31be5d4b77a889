"""What a run is made of: every default lives here or in a stage; recipes hold differences, overrides hold fewer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, ValidationError

from compress.settings import Config, RECIPES, load_yaml, read_mapping, settings_error
from metadata.closest import closest
from metadata.errors import UserError, first_line


class DataConfig(Config):
    """Which images."""

    name: str = Field("digits", description="data set, see loaders/")
    root: Path | None = Field(None, description="where its files are: an image folder or torchvision's files")
    download: bool = Field(False, description="let torchvision fetch a missing set")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of train held out, class by class")
    num_classes: int | None = Field(None, description="refuse a folder with another number of classes")
    channels: Literal[1, 3] | None = Field(None, description="3 takes grey images as RGB; the set's own unless given")
    image_size: int | None = Field(None, gt=0, description="pixels of the model's square input; the set's own unless given")
    resize: int | None = Field(None, gt=0, description="pixels of the shorter side; the set's own unless given")
    crop: int | None = Field(None, gt=0, description="pixels of the central square; the set's own unless given")
    mean: list[float] | None = Field(None, description="a channel; the set's own unless given")
    std: list[float] | None = Field(None, description="a channel; the set's own unless given")
    skip_unreadable: bool = Field(False, description="leave damaged images out, and say how many")
    memory_limit_gb: float = Field(4.0, gt=0, description="splits that decode to more stream from disk")


class RunConfig(Config):
    """A whole run, resolved: enough to repeat it."""

    recipe: str = Field(description="the recipe it came from")
    name: str = Field(description="the run's folder below run_dir", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run_dir: Path = Field(Path("runs"), description="where runs are kept")
    seed: int = Field(0, ge=0, lt=2**32, description="of the split, the weights, the order and the augmentation")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one")
    threads: int = Field(0, ge=0, description="CPU threads; 0: all that the process may use")
    data: DataConfig = DataConfig()
    stages: list[dict[str, dict[str, Any]]] = Field(min_length=1, description="stage names with their settings, in order")

    WHERE: ClassVar = frozenset({"run_dir", "threads", "device", "recipe"})


def read_recipe(name: str) -> dict[str, Any]:
    """The content of a pipeline's recipe, packaged or a file.

    Raises:
        UserError: see `read_mapping`; or there is no list of stages.
    """
    stem, content = read_mapping(name, RECIPES, "recipe")
    if not isinstance(content.get("stages"), list):
        raise UserError(f"recipe {name}: expected a list of stages under the key stages")
    content["stages"] = [_stage_entry(entry, Path(name)) for entry in content["stages"]]
    return {"recipe": stem, "name": stem, **content}


def _stage_entry(entry: Any, path: Path) -> dict[str, dict[str, Any]]:
    if isinstance(entry, str):
        return {entry: {}}
    if isinstance(entry, dict) and len(entry) == 1:
        (name, options), = entry.items()
        if isinstance(options or {}, dict):
            return {str(name): options or {}}
    raise UserError(f"recipe {path}: stages: expected a name or one name with its settings, got {entry!r}")


def resolve(recipe: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a recipe and applies `key=value` overrides, `prune.ratio=0.4` for a stage's or the data's.

    A stage that occurs twice is addressed by its place among its likes: `finetune#2.train.epochs=3`.

    Raises:
        UserError: unknown recipe or key (with the closest match), or a value of the wrong type. Keys inside a stage
            are checked by the pipeline, which knows the stages.
    """
    content = read_recipe(recipe)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r}: expected key=value, such as prune.ratio=0.4")
        try:
            value = load_yaml(text)
        except yaml.YAMLError as error:
            raise UserError(f"override {override!r}: not a YAML value: {first_line(error)}") from error
        _apply(content, key, value)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise settings_error(f"recipe {recipe}", error, [*RunConfig.model_fields, *DataConfig.model_fields]) from error


def _apply(content: dict[str, Any], key: str, value: Any) -> None:
    head, *rest = key.split(".")
    if head in RunConfig.model_fields and head != "stages":
        target: dict[str, Any] = content
        path = [head, *rest]
    else:
        name, _, place = head.partition("#")
        likes = [entry[name] for entry in content["stages"] if name in entry]
        if not likes or not rest:
            known = [*RunConfig.model_fields, *(name for entry in content["stages"] for name in entry)]
            raise UserError(f"override {key!r}: unknown key {head!r}{closest(head, known)} (known: {', '.join(known)})")
        if len(likes) > 1 and not place:
            raise UserError(f"override {key!r}: the stage {name} occurs {len(likes)} times; say {name}#1."
                            f"{'.'.join(rest)} or another place")
        if place and not (place.isdigit() and 1 <= int(place) <= len(likes)):
            raise UserError(f"override {key!r}: the stage {name} occurs {len(likes)} times, there is no #{place}")
        target, path = likes[int(place or 1) - 1], rest
    for part in path[:-1]:
        if not isinstance(target.setdefault(part, {}), dict):
            raise UserError(f"override {key!r}: {part!r} is a value, not a group of settings")
        target = target[part]
    target[path[-1]] = value
