"""The verb that looks at a model: `describe`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from architectures.architecture import Architecture


def describe(model: Annotated[str, typer.Argument(help="a model's name, a stage's folder or a submission")],
             options: Annotated[list[str] | None, typer.Argument(
                 metavar="[KEY=VALUE]...", help="num_classes=100, input_shape=3,32,32 and options of the model")] = None,
             ) -> None:
    """Print a model's architecture as JSON."""
    folder = Path(model).expanduser()
    architecture = _stored(folder) if folder.is_dir() else _named(model, options or [])
    typer.echo(json.dumps(architecture.to_json(), indent=2))


def _stored(folder: Path) -> Architecture:
    """Read the architecture of a stage's folder or of a submission."""
    from architectures.architecture import Architecture
    from metadata.errors import UserError
    from metadata.files import read_json
    from metadata.schemas import ARCHITECTURE_FILE

    path = next((folder / name for name in (ARCHITECTURE_FILE, "architecture.json") if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: no {ARCHITECTURE_FILE} or architecture.json in it")
    architecture: Architecture = read_json(path, Architecture)
    return architecture


def _named(model: str, options: list[str]) -> Architecture:
    """Make a model of the zoo and describe it."""
    from architectures.describe import describe as describe_module
    from architectures.zoo import families, make
    from metadata.errors import UserError

    settings = _parse(options)
    shape_text = str(settings.pop("input_shape", "3,224,224"))
    try:
        channels, height, width = (int(part) for part in shape_text.split(","))
    except ValueError as error:
        raise UserError(f"input_shape: expected three whole numbers such as 3,224,224, got {shape_text!r}") from error
    num_classes = settings.pop("num_classes", 1000)
    if not isinstance(num_classes, int) or min(num_classes, channels, height, width) < 1:
        raise UserError("num_classes and input_shape: expected positive whole numbers")
    if model in families() and "input_shape" in inspect.signature(families()[model]).parameters:
        settings["input_shape"] = (channels, height, width)  # a network of linear layers is built for one shape
    return describe_module(make(model, num_classes=num_classes, **settings), (channels, height, width))


def _parse(options: list[str]) -> dict[str, Any]:
    """Parse `key=value` options; values are YAML."""
    from compress.settings import read_argument
    from metadata.errors import UserError

    settings: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"{option!r}: expected key=value, such as width=16")
        settings[key] = read_argument(Any, value, repr(option))
    return settings
