"""The base of all settings: immutable configurations, YAML, packaged recipes, and one-line errors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from metadata.closest import closest
from metadata.errors import UserError, describe_validation_error

RECIPES = Path(__file__).parent / "recipes"


class _NoDuplicates(yaml.SafeLoader):
    """A YAML loader that refuses a key that is given twice; the plain loader silently takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(problem=f"the key {key!r} is given twice",
                                                        problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """Return the content of a YAML text.

    Raises:
        yaml.YAMLError: the text is not YAML, or a mapping has a key twice.
    """
    return yaml.load(text, _NoDuplicates)  # a SafeLoader: data only


class Config(BaseModel):
    """Base class of all settings. Settings are immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    # Keys that do not change the result, or only its last bits.
    WHERE: ClassVar[frozenset[str]] = frozenset()

    def difference(self, before: Self) -> list[str]:
        """Return the keys whose values differ, as `a.b: 1 -> 2`, without those in `WHERE`."""
        mine, theirs = _flatten(self.model_dump(mode="json")), _flatten(before.model_dump(mode="json"))
        return [f"{key}: {theirs.get(key)} -> {mine.get(key)}" for key in [*mine, *(theirs.keys() - mine.keys())]
                if mine.get(key) != theirs.get(key) and key.split(".")[0] not in self.WHERE]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        value = {str(index): entry for index, entry in enumerate(value)}
    if isinstance(value, dict) and value:
        return {key: leaf for name, part in value.items()
                for key, leaf in _flatten(part, f"{prefix}.{name}" if prefix else str(name)).items()}
    return {prefix: value}


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """Return the names of the packaged recipes in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_mapping(name: str, folder: Path, where: str) -> tuple[str, dict[str, Any]]:
    """Return the name and content of a packaged recipe by bare name, or of a YAML file by path.

    Args:
        name: of the recipe, or a path that ends in .yaml or .yml.
        folder: where the packaged recipes are.
        where: beginning of an error, such as the flag that gave the name.

    Raises:
        UserError: there is no such recipe (with the closest match) or file, or the file is not a YAML mapping.
    """
    path, known = Path(name), recipe_names(folder)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{where} {name}: there is no such file")
    elif name in known:
        path = folder / f"{name}.yaml"
    else:
        raise UserError(f"{where} {name!r}: unknown{closest(name, known)} (known: {', '.join(known)}; or a path that "
                        "ends in .yaml)")
    try:
        content = load_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{where} {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} {path}: expected a mapping of keys to values, got {type(content).__name__}")
    return path.stem, content


def settings_error(where: str, error: ValidationError, known: Iterable[str]) -> UserError:
    """Return a one-line error for a setting that pydantic refused; an unknown key comes with the closest match."""
    # A misspelt key is often missing too: report the unknown key first.
    if unknown := next((found for found in error.errors() if found["type"] == "extra_forbidden"), None):
        key = ".".join(str(part) for part in unknown["loc"])
        return UserError(f"{where}: unknown key {key!r}{closest(str(unknown['loc'][-1]), known)}")
    return UserError(f"{where}: {describe_validation_error(error)}")
