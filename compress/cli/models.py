"""The verbs that look at a model: `describe`, and `import` for an ONNX file."""

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


def import_model(model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="an ONNX image classifier")],
                 settings: Annotated[list[str] | None, typer.Argument(
                     metavar="[KEY=VALUE]...", help="input_shape=3,224,224 for a file that leaves it open; settings of the "
                                                    "data, such as mean=[0.5,0.5,0.5]")] = None,
                 out: Annotated[Path | None, typer.Option(help="folder to write, imported_<file> unless given; it must not "
                                                               "exist")] = None,
                 data: Annotated[str | None, typer.Option(help="a data set: its images are compared, its test images "
                                                               "scored")] = None,
                 root: Annotated[Path | None, typer.Option(help="folder that holds the data set's files")] = None) -> None:
    """Make a network of an ONNX file: an architecture and weights, compared with ONNX Runtime. Its folder is a model."""
    from compress.cli.tables import print_imported
    from compress.pipeline.config import DataConfig
    from compress.pipeline.importing import import_onnx
    from compress.settings import validated_as
    from compress.training.trackers import Tracker, terminal
    from metadata.errors import UserError
    from metadata.machine import usable_cores

    given = dict(_pair(text) for text in settings or [])
    shape = given.pop("input_shape", None)
    given |= {key: str(value) for key, value in (("name", data), ("root", root)) if value is not None}
    if given and data is None:
        raise UserError(f"{min(given)}: a setting of the data, but no --data names a data set")
    tracker = Tracker(terminal())
    with tracker.progress("reading images") as advance:
        wanted = None if data is None else validated_as(DataConfig, given, "data").request(
            workers=usable_cores(), on_progress=advance)
        found = import_onnx(model, out or Path(f"imported_{model.stem}"), data=wanted,
                            input_shape=None if shape is None else _three_numbers(shape))
    print_imported(terminal(), model, found)


def _pair(option: str) -> tuple[str, str]:
    from metadata.errors import UserError

    key, equals, value = option.partition("=")
    if not equals:
        raise UserError(f"{option!r}: expected key=value, such as width=16")
    return key.removeprefix("data."), value


def _three_numbers(text: str) -> tuple[int, int, int]:
    """Return a shape (C, H, W) that is written as three numbers."""
    from architectures.build import MAX_ACTIVATION_ELEMENTS
    from metadata.errors import UserError

    try:
        channels, height, width = (int(part) for part in text.strip("[]").split(","))
    except ValueError as error:
        raise UserError(f"input_shape: expected three whole numbers such as 3,224,224, got {text!r}") from error
    if min(channels, height, width) < 1:
        raise UserError("input_shape: expected positive whole numbers")
    if channels * height * width > MAX_ACTIVATION_ELEMENTS:
        raise UserError(f"input_shape {text}: expected at most {MAX_ACTIVATION_ELEMENTS:,} numbers an image")
    return channels, height, width


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
    from architectures.named import is_own
    from architectures.zoo import families, fitted_options, make
    from metadata.errors import UserError

    settings = _parse(options)
    channels, height, width = _three_numbers(str(settings.pop("input_shape", "3,224,224")))
    num_classes = settings.pop("num_classes", 1000)
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UserError("num_classes and input_shape: expected positive whole numbers")
    if is_own(model):
        settings = fitted_options(model, settings, (channels, height, width))
    if model in families() and "input_shape" in inspect.signature(families()[model]).parameters:
        settings["input_shape"] = (channels, height, width)  # a network of linear layers is built for one shape
    architecture = describe_module(make(model, num_classes=num_classes, **settings), (channels, height, width))
    if architecture.num_classes != num_classes:  # a class of one's own may take no number
        raise UserError(f"model {model}: it has {architecture.num_classes:,} classes, num_classes says {num_classes:,}")
    return architecture


def _parse(options: list[str]) -> dict[str, Any]:
    """Parse `key=value` options; values are YAML."""
    from compress.settings import read_argument

    settings: dict[str, Any] = {}
    for option in options:
        key, value = _pair(option)
        settings[key] = read_argument(Any, value, repr(option))
    return settings
