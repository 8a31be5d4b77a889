"""The import graph: what a module needs, found in its source without importing it."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.packaging.import_graph import ImportCycleError, import_closure, import_order, imported_modules, module_file
from tests.helpers.sources import plant


def test_every_way_to_import_is_found(tmp_path: Path) -> None:
    start = ("import json\nimport house.a\nfrom house import b\nfrom house.c import thing\nfrom . import d\n"
             "from .e import thing as other\ndef f():\n    from house.f import thing\n"
             "if TYPE_CHECKING:\n    from house.g import thing\n")
    root = plant(tmp_path, start=start, **dict.fromkeys("abcdefg", ""), unused="")
    assert set(imported_modules("house.start", root)) == {f"house.{name}" for name in "abcdefg"}
    assert set(import_closure("house.start", root)) == {"house.start", *(f"house.{name}" for name in "abcdefg")}


def test_what_lies_elsewhere_is_no_module_of_the_project(tmp_path: Path) -> None:
    root = plant(tmp_path, a="")
    assert module_file("json", root) is None and module_file("house.nothing", root) is None
    assert module_file("house.a", root) == root / "house" / "a.py"
    assert module_file("house", root) == root / "house" / "__init__.py"


def test_modules_come_behind_what_they_import(tmp_path: Path) -> None:
    root = plant(tmp_path, top="from house.left import x\nfrom house.right import y\n", left="from house.low import x\n",
                 right="from house.left import x\nfrom house.low import x\n", low="")
    assert import_order("house.top", root) == ["house.low", "house.left", "house.right", "house.top"]


def test_a_circle_has_a_closure_and_no_order(tmp_path: Path) -> None:
    root = plant(tmp_path, one="from house.two import x\n", two="from house.one import y\n")
    assert set(import_closure("house.one", root)) == {"house.one", "house.two"}
    with pytest.raises(ImportCycleError, match=r"house\.one -> house\.two -> house\.one|two -> house\.one -> house\.two"):
        import_order("house.one", root)


def test_a_stage_needs_its_own_imports_and_no_other_stage() -> None:
    needed = set(import_closure("compress.pipeline.stages.prune"))
    assert {"compress.pruning.prune", "architectures.layers.base", "metadata.files"} <= needed
    assert not any(name.startswith("compress.pipeline.stages.") for name in needed - {"compress.pipeline.stages.prune"})
    assert not any(name.startswith(("compress.cli", "compress.studies", "tests")) for name in needed)
