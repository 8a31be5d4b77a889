"""What an export format is, and the formats by name."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import Tensor

import compress.packaging.formats
from metadata.errors import UserError

ONNX_FORMAT = "onnx"


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """A format that an ONNX file of the toolkit is converted to. It is also a format of the evaluator, with the same name.

    Args:
        title: its name in prose.
        modules: the Python modules that convert and run it, each with the name to install it by.
        suffix: of the file that its runtime opens.
        check: raises UserError that names an operator which the format cannot express; takes a float network.
        convert: gives the content of each file by its suffix; takes a float network, or one in QDQ form.
        requirements: lines of a submission's requirements.txt.
        usage: Python that runs `{file}` on `images`, for the model card.
        open: gives a file on the format's own runtime as a function, where the evaluator has another way to run it.
    """

    title: str
    modules: dict[str, str]
    suffix: str
    check: Callable[[onnx.ModelProto], None]
    convert: Callable[[onnx.ModelProto], dict[str, bytes]]
    requirements: str
    usage: str
    open: Callable[[Path], Callable[[Tensor], Tensor]] | None = None


def format_names() -> list[str]:
    """Return the names of the formats: ONNX, and the files of `compress/packaging/formats/`."""
    found = (module.name for module in pkgutil.iter_modules(compress.packaging.formats.__path__))
    return [ONNX_FORMAT, *sorted(name for name in found if name != "base")]


def format_module(name: str) -> str:
    """Return the name of the module that holds a format."""
    return f"compress.packaging.formats.{name}"


def export_format(name: str) -> ExportFormat:
    """Return a format other than ONNX.

    Raises:
        UserError: a package that the format needs is not installed.
    """
    found: ExportFormat = importlib.import_module(format_module(name)).FORMAT
    missing = [package for module, package in found.modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"export.format {name}: not installed; pip install {' '.join(missing)}")
    return found
