"""A stage's identity: what it is made from. A finished stage is kept while everything that decides its result is the same.

Places (`data.root`, `run_dir`, the path of a checkpoint), times and threads decide nothing. Files count by their bytes, and
source code by its statements, without comments, docstrings and layout.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.packaging.import_graph import ROOT, imported_modules, module_file
from compress.pipeline.config import RunConfig
from compress.pipeline.stage import Stage
from compress.settings import changes, flattened
from loaders.catalog import set_module
from loaders.content import content_changes
from metadata.errors import some_of
from metadata.files import sha256
from metadata.records import DatasetCard

# Modules that cannot change a stage's result: they print, report mistakes, or read settings, whose values count anyway.
WITHOUT_EFFECT = {"compress.settings", "compress.training.loggers", "compress.training.trackers", "loaders.content",
                  "metadata.closest", "metadata.errors", "metadata.locks"}
EARLIER_VERSION = "an earlier version of the toolkit made it, and did not record from what"

MadeFrom = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class StageIdentity:
    """What a stage is made from.

    Args:
        stage: the stage's name in a recipe, for messages.
        made_from: groups of what decides the result: `input` (the key of the stage before), `settings`, `data`, `content`
            (of the splits), `files` (that settings name), `read` (what the stage reads beside its settings) and `code`.
    """

    stage: str
    made_from: MadeFrom

    @functools.cached_property
    def key(self) -> str:
        """A hash of it all."""
        return hashlib.sha256(json.dumps(self.made_from, sort_keys=True).encode()).hexdigest()

    def changes(self, before: MadeFrom) -> list[str]:
        """Return what differs from what the stage was made from before, other than the stage before it; one text each."""
        if not before:
            return [EARLIER_VERSION]
        was, now = ({group: source.get(group, {}) for group in GROUPS} for source in (before, self.made_from))
        found = [_short(f"{self.stage}.{text}") for text in changes(was["settings"], now["settings"])]
        found += [_short(text) for text in changes(was["data"], now["data"])]
        found += [f"the data: {text}" for text in content_changes(was["content"], now["content"])]
        found += [f"{self.stage}.{key}: " + ("the file has other content" if key in was["files"].keys() & now["files"] else
                                             "a file -> None" if key in was["files"] else "None -> a file")
                  for key in _differing(was["files"], now["files"])]
        found += [_short(f"{self.stage} reads {text}") for text in changes(was["read"], now["read"])]
        if modules := _differing(was["code"], now["code"]):
            found.append(f"the toolkit's code changed: {some_of(modules, 3)}")
        return found


GROUPS = ("settings", "data", "content", "files", "read", "code")


def identities(stages: Iterable[tuple[str, Stage]], card: DatasetCard, config: RunConfig) -> list[StageIdentity]:
    """Return the identity of each stage, in order; each holds the key of the one before."""
    found: list[StageIdentity] = []
    for name, stage in stages:
        paths = {key for key in type(stage).model_fields if isinstance(getattr(stage, key), Path)}
        made_from: MadeFrom = {
            "settings": {key: value for key, value in flattened(stage.deciding()).items() if key not in paths},
            "files": {key: _hash_of_path(getattr(stage, key)) for key in sorted(paths)},
            "read": stage.reads(), "code": code_of([type(stage).__module__, *stage.modules()])}
        if found:
            made_from["input"] = {"key": found[-1].key}
        else:
            made_from |= {"data": _data(card, config), "content": {
                split: classes for split, classes in card.content.items() if split != "test"}}
            made_from["code"] |= code_of([set_module(card.name)])
        if stage.opens_test:
            made_from["content"] = {**made_from.get("content", {}), "test": card.content.get("test", {})}
        found.append(StageIdentity(stage=name.partition("-")[2], made_from=json.loads(json.dumps(made_from))))
    return found


def _data(card: DatasetCard, config: RunConfig) -> dict[str, Any]:
    """Return what decides how stages see the images, without the images themselves."""
    seen = card.model_dump(mode="json", exclude={"counts", "fingerprint", "content"})
    return flattened({"seed": config.seed, "data": {**seen, "validation_fraction": config.data.validation_fraction}})


def _hash_of_path(path: Path) -> str:
    """Return a hash of a file's bytes, or of those of all files in a folder with their names; "" if there is nothing."""
    if not path.is_dir():
        return sha256(path) if path.is_file() else ""
    files = {str(file.relative_to(path)): sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


# -------------------------------------------------------------------------------------------------------- source code


def code_of(modules: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """Return a hash of the code of some modules and of every module of the project that they import, directly or not."""
    found: dict[str, str] = {}
    waiting = [name for name in modules if name not in WITHOUT_EFFECT]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = _hash_of_module(name, root)
            waiting += [other for other in imported_modules(name, root) if other not in WITHOUT_EFFECT]
    return dict(sorted(found.items()))


@functools.cache
def _hash_of_module(module: str, root: Path) -> str:
    file = module_file(module, root)
    assert file is not None, module
    return code_hash(file.read_text())


def code_hash(source: str) -> str:
    """Return a short hash of Python source that comments, docstrings and layout do not change."""
    return hashlib.sha256(_spelled_out(ast.parse(source)).encode()).hexdigest()[:16]


def _spelled_out(node: Any) -> str:
    """Return a syntax tree as text. Empty parts are left out, because versions of Python differ in which there are."""
    if isinstance(node, list):
        return f"[{','.join(map(_spelled_out, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = {name: part for name, part in ast.iter_fields(node) if part is not None and part != []}
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False) is not None:
        parts["body"] = node.body[1:]
    return f"{type(node).__name__}({','.join(f'{name}={_spelled_out(part)}' for name, part in parts.items())})"
