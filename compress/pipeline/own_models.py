"""A stage's student, which may be in the user's own files: the network, and the content that its identity holds."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path

from torch import fx, nn

from architectures.architecture import Architecture
from architectures.describe import lower
from architectures.named import FILE, files_of
from architectures.onnx_network.runtime import RunOnnxFile
from compress.pipeline.identity import code_hash
from metadata.errors import UserError
from metadata.files import sha256
from metadata.records import DatasetCard


def content_of_model(name: str) -> dict[str, str]:
    """Return hashes of the files that decide a model of this name, by their names; nothing for a model of the project.

    A file of code counts by its statements, with those of its neighbours that it imports.
    """
    found: dict[str, str] = {}
    with contextlib.suppress(UserError):  # `check` reports a missing file
        for path in files_of(name):
            found |= _of_code(path) if name.startswith(FILE) else {path.name: sha256(path)}
    return found


def _of_code(start: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    waiting = [start]
    while waiting:
        path = waiting.pop()
        name = str(path.relative_to(start.parent))
        if name in found:
            continue
        try:
            source = path.read_text()
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # `check` reports it
            found[name] = sha256(path)
            continue
        found[name] = code_hash(source)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            begin = f"{node.module or ''}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                parts = [part for part in f"{begin}{alias.name}".split(".") if part]
                for folder in {start.parent, path.parent}:
                    waiting += _files(folder, parts)
    return dict(sorted(found.items()))


def _files(folder: Path, parts: list[str]) -> list[Path]:
    """Return the files of a folder that an import of a dotted name runs."""
    found = []
    for count in range(1, len(parts) + 1):
        path = folder.joinpath(*parts[:count])
        found += [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
    return found


def as_student(module: nn.Module, card: DatasetCard, name: str) -> tuple[Architecture, fx.GraphModule]:
    """Return a module as a graph of the layer table, with its weights, in eval mode.

    Raises:
        UserError: the layer table does not hold it (the operator of an ONNX file is named), or its logits are not one for
            each class of the data.
    """
    if isinstance(module, RunOnnxFile):
        raise UserError(f"student {name}: it is no network of layers; {module.remarks[-1]}; as a teacher it works")
    found = lower(module.eval(), card.input_shape)
    if found.architecture.num_classes != card.num_classes:
        raise UserError(f"student {name}: expected logits (N, {card.num_classes}), got (N, "
                        f"{found.architecture.num_classes}); build it for the {card.num_classes} classes of the data")
    return found.architecture, found.build()
