"""The base of all settings: immutable configurations, YAML, packaged recipes, and one-line errors."""

from __future__ import annotations

import os
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from metadata.closest import closest
from metadata.errors import UserError, describe_validation_error, first_line

RECIPES = Path(__file__).parent / "recipes"

WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "true": True, "yes": True, "on": True, "false": False,
                                 "no": False, "off": False}
# YAML 1.2's numbers. YAML 1.1 also reads 5:32 as 332, 2024_05 as 202405 and 010 as 8, and does not read 1e-3.
INTEGER = re.compile(r"[-+]?[0-9]{1,4000}|0o[0-7]{1,4000}|0x[0-9a-fA-F]{1,4000}")
DECIMAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NO_NUMBER = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Plain:
    """A value without quotes in a YAML file. The type of its setting decides whether it is text, see `read_as`."""

    text: str

    def __repr__(self) -> str:
        return self.text

    @property
    def value(self) -> Any:
        """What the text means to YAML: a number, true, false, null, or the text itself."""
        if self.text in (word := self.text.lower(), word.capitalize(), word.upper()) and word in WORDS:
            return WORDS[word]
        if INTEGER.fullmatch(self.text):
            return int(self.text, 0 if self.text[:2] in ("0o", "0x") else 10)
        if DECIMAL.fullmatch(self.text):
            return float(self.text)
        if NO_NUMBER.fullmatch(self.text):
            return float(self.text.replace(".", ""))
        return self.text


class Argument(str):
    """A value as it was typed on the command line. The type of its setting decides how it is read, see `read_as`."""


class _Loader(yaml.SafeLoader):
    """A YAML loader that leaves plain values as they are written, and refuses a key that is given twice.

    The library's own loader takes the last of two equal keys, without a word.
    """

    yaml_implicit_resolvers: dict[Any, Any] = {}  # not those of YAML 1.1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(problem=f"the key {key!r} is given twice",
                                                        problem_mark=key_node.start_mark)
            seen.add(key)
        return {_key(key): value for key, value in super().construct_mapping(node, deep).items()}


_Loader.add_implicit_resolver("!plain", re.compile(""), None)
_Loader.add_constructor("!plain", lambda loader, node: Plain(node.value))


def _key(key: Any) -> Any:
    """Return a key of a mapping: the name of a setting, or the number of an epoch."""
    if not isinstance(key, Plain):
        return key
    return key.value if isinstance(key.value, int) and not isinstance(key.value, bool) else key.text


def _parsed(text: str) -> Any:
    content = yaml.load(text, _Loader)  # a SafeLoader: data only
    _refuse_circles(content, ())
    return content


def _refuse_circles(value: Any, above: tuple[int, ...]) -> None:
    """Raise YAMLError where a list or mapping holds itself, which YAML's anchors can express."""
    if id(value) in above:
        raise yaml.YAMLError("a list or mapping holds itself")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_circles(part, (*above, id(value)))


def load_yaml(text: str) -> Any:
    """Return the content of a YAML text, with the numbers of YAML 1.2 and `yes`, `no`, `on` and `off` as truth values.

    Raises:
        yaml.YAMLError: the text is not YAML, or a mapping has a key twice.
    """
    return read_as(Any, _parsed(text))


# --------------------------------------------------------------------------------- a value by the type of its setting


def read_as(kind: Any, value: Any) -> Any:
    """Return a value of a YAML file, or of the command line, as the type of its setting reads it.

    Text, names and paths are taken as they stand: `2024_05`, `007`, `1e3`, `yes` and `a #1` are text there. On the command
    line nothing at all, or `null`, is no value where the setting may have none, and nothing is an empty list or mapping. A
    list may be written with commas. Everything else is YAML.

    Args:
        kind: the annotation of the setting.
        value: a `Plain` or an `Argument`, or lists and mappings of such; other values are returned unchanged.

    Raises:
        yaml.YAMLError: the argument is not YAML.
    """
    kinds = _alternatives(kind)
    if isinstance(value, Argument):
        return _read_argument(kind, kinds, value)
    own = [part for part in kinds if part is not type(None)]
    if isinstance(value, Plain):
        no_value = value.value is None and len(own) < len(kinds)
        return value.text if not no_value and own and all(map(_is_text, own)) else value.value
    if isinstance(value, list):
        items = next((get_args(part)[0] for part in own if get_origin(part) is list), Any)
        return [read_as(items, item) for item in value]
    if isinstance(value, dict):
        values = next((get_args(part)[1] for part in own if get_origin(part) is dict), Any)
        named = {key: setting for part in own if _is_config(part) for key, setting in part.kinds().items()}
        return {key: read_as(named.get(key, values), entry) for key, entry in value.items()}
    return value


def _read_argument(kind: Any, kinds: list[Any], text: str) -> Any:
    own = [part for part in kinds if part is not type(None)]
    nothing = len(own) < len(kinds) and text.strip() in ("", "null")
    if all(map(_is_text, own)):
        unnamed = not text and not any(isinstance(part, type) and issubclass(part, str) for part in own)  # no path at all
        return None if nothing or unnamed else str(text)
    origins = {get_origin(part) or part for part in own}
    if not text.strip() and (dict in origins or any(map(_is_config, own))):
        return {}
    if list in origins and not text.lstrip().startswith("[") and (not nothing or not text.strip()):
        items = next((get_args(part)[0] for part in own if get_origin(part) is list), Any)
        return [read_as(items, Argument(part.strip())) for part in text.split(",") if text.strip()]
    return read_as(kind, _parsed(text))


def _alternatives(kind: Any) -> list[Any]:
    """Return the types of a union, without their annotations."""
    if get_origin(kind) is Annotated:
        return _alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [part for alternative in get_args(kind) for part in _alternatives(alternative)]
    return [kind]


def _is_text(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(choice, str) for choice in get_args(kind))
    return isinstance(kind, type) and issubclass(kind, str | os.PathLike)


def _is_config(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Config)


def read_argument(kind: Any, text: str, where: str) -> Any:
    """Return a value of the command line as the type of its setting reads it; see `read_as`.

    Raises:
        UserError: the value is not YAML; `where` the value stood begins the message.
    """
    try:
        return read_as(kind, Argument(text))
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not a YAML value: {first_line(error)}") from error


# ----------------------------------------------------------------------------------------------------------- settings

SomeConfig = TypeVar("SomeConfig", bound="Config")


class Config(BaseModel):
    """Base class of all settings. Settings are immutable, and an unknown key is an error. `~` begins a home folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    # Keys that say where or how fast, and do not change the result, or only its last bits.
    WHERE: ClassVar[frozenset[str]] = frozenset()

    @field_validator("*")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        return Path(os.path.expanduser(value)) if isinstance(value, Path) else value

    @classmethod
    def kinds(cls) -> dict[str, Any]:
        """Return the type of each setting, by each of its names."""
        own = {key: info.annotation for key, info in cls.model_fields.items()}
        return own | {info.validation_alias: info.annotation for info in cls.model_fields.values()
                      if isinstance(info.validation_alias, str)}

    def deciding(self) -> dict[str, Any]:
        """Return the settings that decide the result, as JSON values: all but those in `WHERE`."""
        content = self.model_dump(mode="json", exclude=set(self.WHERE))
        return {key: setting.deciding() if isinstance(setting := getattr(self, key), Config) else value
                for key, value in content.items()}

    def difference(self, before: Self) -> list[str]:
        """Return the keys whose values differ, as `a.b: 1 -> 2`, without those in `WHERE`."""
        return changes(before.deciding(), self.deciding())


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the keys whose values differ in nested mappings, as `a.b: 1 -> 2`."""
    mine, theirs = flattened(now), flattened(before)
    return [f"{key}: {theirs.get(key)} -> {mine.get(key)}" for key in [*mine, *(key for key in theirs if key not in mine)]
            if mine.get(key) != theirs.get(key)]


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings, and lists of mappings, as one mapping with keys such as `a.b`."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        value = {str(index): entry for index, entry in enumerate(value)}
    if isinstance(value, dict) and value:
        return {key: leaf for name, part in value.items()
                for key, leaf in flattened(part, f"{prefix}.{name}" if prefix else str(name)).items()}
    return {prefix: value}


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """Return the names of the packaged recipes in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_mapping(name: str, folder: Path, where: str) -> tuple[str, dict[str, Any]]:
    """Return the name and content of a packaged recipe by bare name, or of a YAML file by path; see `read_as`.

    Args:
        name: of the recipe, or a path that ends in .yaml or .yml.
        folder: where the packaged recipes are.
        where: beginning of an error, such as the flag that gave the name.

    Raises:
        UserError: there is no such recipe (with the closest match) or file, or the file is not a YAML mapping.
    """
    path, known = Path(os.path.expanduser(name)), recipe_names(folder)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{where} {name}: there is no such file")
    elif name in known:
        path = folder / f"{name}.yaml"
    else:
        raise UserError(f"{where} {name!r}: unknown{closest(name, known)} (known: {', '.join(known)}; or a path that "
                        "ends in .yaml)")
    try:
        content = _parsed(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{where} {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} {path}: expected a mapping of keys to values, got {type(content).__name__}")
    return path.stem, content


def validated_as(kind: type[SomeConfig], arguments: dict[str, str], where: str) -> SomeConfig:
    """Return settings that were typed on a command line, by their names.

    Raises:
        UserError: an unknown key (with the closest match), or a value that is not the setting's.
    """
    kinds = kind.kinds()
    try:
        return kind.model_validate({key: read_argument(kinds.get(key, Any), value, f"{where}.{key}")
                                    for key, value in arguments.items()})
    except ValidationError as error:
        raise settings_error(where, error, kinds) from error


def settings_error(where: str, error: ValidationError, known: Iterable[str]) -> UserError:
    """Return a one-line error for a setting that pydantic refused; an unknown key comes with the closest match."""
    # A misspelt key is often missing too: report the unknown key first.
    if unknown := next((found for found in error.errors() if found["type"] == "extra_forbidden"), None):
        key = ".".join(str(part) for part in unknown["loc"])
        return UserError(f"{where}: unknown key {key!r}{closest(str(unknown['loc'][-1]), known)}")
    return UserError(f"{where}: {describe_validation_error(error)}")
