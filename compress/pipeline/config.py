"""The configuration of a run. Defaults are here or in a stage; a recipe holds differences, and overrides hold fewer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError

from compress.settings import Config, Plain, RECIPES, read_argument, read_as, read_mapping, settings_error
from compress.training.data_settings import DataSettings
from compress.training.settings import TrainingSettings
from loaders.request import Request
from metadata.closest import closest
from metadata.errors import UserError


class DataConfig(DataSettings):
    """The data of a run."""

    name: str = Field("digits", description="a set of loaders/; image_folder recognizes the format of any images")
    root: Path | None = Field(None, description="where the set is: a folder, a CSV, tars, torchvision's files")
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="share of the training images held out, class by "
                                       "class; 0 only for data that have a validation folder")

    WHERE: ClassVar = DataSettings.WHERE | {"root"}

    def request(self, **others: Any) -> Request:
        """Return the settings as the loaders take them; `others` are such as `seed` and `workers`."""
        return super().request(name=self.name, root=self.root, validation_fraction=self.validation_fraction, **others)


class RunConfig(Config):
    """One run, resolved. The configuration is enough to repeat the run."""

    recipe: str = Field(description="recipe that the run came from")
    name: str = Field(description="folder of the run below run_dir", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run_dir: Path = Field(Path("runs"), description="folder of all runs")
    seed: int = Field(0, ge=0, lt=2**32, description="of the split, the weights, the order and the augmentation")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is a CUDA device")
    threads: int = Field(0, ge=0, description="CPU threads; 0: all that the process may use")
    data: DataConfig = DataConfig()
    stages: list[dict[str, dict[str, Any]]] = Field(min_length=1, description="stage names with their settings, in order")

    WHERE: ClassVar = frozenset({"run_dir", "threads", "device", "recipe"})


def read_recipe(name: str) -> dict[str, Any]:
    """Return the content of a pipeline's recipe, packaged or a file.

    Raises:
        UserError: the recipe cannot be read (see `read_mapping`), or has no list of stages.
    """
    stem, content = read_mapping(name, RECIPES, "recipe")
    if not isinstance(content.get("stages"), list):
        raise UserError(f"recipe {name}: expected a list of stages under the key stages")
    content["stages"] = [_stage_entry(entry, Path(name)) for entry in content["stages"]]
    return {"recipe": stem, "name": stem, **read_as(RunConfig, content)}


def _stage_entry(entry: Any, path: Path) -> dict[str, dict[str, Any]]:
    if isinstance(entry, Plain | str):
        return {str(read_as(str, entry)): {}}
    if isinstance(entry, dict) and len(entry) == 1:
        (name, options), = entry.items()
        options = {} if isinstance(options, Plain) and options.value is None else options
        if isinstance(options, dict):
            return {str(name): read_as(_settings_of(str(name)), options)}
    raise UserError(f"recipe {path}: stages: expected a name or one name with its settings, got {entry!r}")


def _settings_of(stage: str) -> Any:
    """Return the class of a stage's settings, or Any for an unknown stage, which the plan refuses."""
    from compress.pipeline.stage import stage_class  # imports torch, which not every reader of a recipe needs

    try:
        return stage_class(stage)
    except UserError:
        return Any


def resolve(recipe: str, overrides: Iterable[str | tuple[str, Any]] = ()) -> RunConfig:
    """Read a recipe and apply overrides, such as `prune.ratio=0.4` for a setting of a stage or the data.

    Args:
        recipe: a packaged recipe by name, or a YAML file by path.
        overrides: `key=value` as on the command line, or a key and its value. A stage that occurs more than once is
            addressed by its number: `finetune#2.train.epochs=3`.

    Raises:
        UserError: an unknown recipe or key (with the closest match), or a value of the wrong type. The plan checks the
            keys inside a stage.
    """
    return _resolved(recipe, read_recipe(recipe), overrides)


def changed(config: RunConfig, overrides: Iterable[str | tuple[str, Any]]) -> RunConfig:
    """Return a configuration with overrides applied, as `resolve` does."""
    return _resolved(config.recipe, config.model_dump(), overrides)


def _resolved(recipe: str, content: dict[str, Any], overrides: Iterable[str | tuple[str, Any]]) -> RunConfig:
    for override in overrides:
        if isinstance(override, tuple):
            key, value = override
        else:
            key, equals, value = override.partition("=")
            if not equals or not key:
                raise UserError(f"override {override!r}: expected key=value, such as prune.ratio=0.4")
        _apply(content, key, value)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise settings_error(f"recipe {recipe}", error, [*RunConfig.model_fields, *DataConfig.model_fields]) from error


def _apply(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of the run, or of a stage, in the content of a recipe; a text is read as the type of its setting asks."""
    head, *rest = key.split(".")
    if head in RunConfig.model_fields and head != "stages":
        target: dict[str, Any] = content
        kind: Any
        path, kind = [head, *rest], RunConfig
    else:
        name, _, number = head.partition("#")
        group = [entry[name] for entry in content["stages"] if name in entry]
        if head == "stages" or (group and not rest):
            raise UserError(f"override {key!r}: give the settings of a stage one by one, such as "
                            f"{name if group else next(iter(content['stages'][0]))}.KEY=VALUE")
        if not group:
            known = [*RunConfig.model_fields, *(name for entry in content["stages"] for name in entry)]
            raise UserError(f"override {key!r}: unknown key {head!r}{closest(head, known)} (known: {', '.join(known)})")
        if len(group) > 1 and not number:
            raise UserError(f"override {key!r}: the stage {name} occurs {len(group)} times; say {name}#1."
                            f"{'.'.join(rest)} or another number")
        if number and not (number.isdigit() and 1 <= int(number) <= len(group)):
            raise UserError(f"override {key!r}: the stage {name} occurs {len(group)} times, there is no #{number}")
        target, path, kind = group[int(number or 1) - 1], rest, _settings_of(name)
    if isinstance(value, str):
        value = read_argument(_kind_of(path, kind), value, f"override {key}={value}")
    for part in path[:-1]:
        if not isinstance(target.setdefault(part, {}), dict):
            raise UserError(f"override {key!r}: {part!r} is a value, not a group of settings")
        target = target[part]
    if path[-2:-1] == ["train"]:  # the override and the recipe may use different names of one setting
        merged = TrainingSettings.merged(target, {path[-1]: value})
        target.clear()
        target.update(merged)
    else:
        target[path[-1]] = value


def _kind_of(path: list[str], kind: Any) -> Any:
    """Return the annotation of a setting, or Any where no class states one."""
    for part in path:
        kind = kind.kinds().get(part, Any) if isinstance(kind, type) and issubclass(kind, Config) else Any
    return kind
