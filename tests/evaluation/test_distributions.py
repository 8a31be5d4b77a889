"""What foreign code may read of this machine: packages of the list without their data, and the libraries of programs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compress.evaluation.distributions import data_entries, installed_files, reach, top_entries
from compress.evaluation.shared_libraries import needed_libraries
from tests.helpers.commands import PROJECT

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="the sandbox is Linux's")


def test_only_the_packages_of_the_list_are_in_reach() -> None:
    inside, torch = reach(), importlib.util.find_spec("torch")
    assert torch and torch.origin and inside.covers(Path(torch.origin).resolve())
    assert inside.covers(Path(json.__file__).resolve()) and inside.covers(Path(sys.executable).resolve())
    for name in ("sklearn", "scipy", "pytest", "compress", "pydantic"):
        spec = importlib.util.find_spec(name)
        if spec and spec.origin:
            assert inside.covers(Path(spec.origin).resolve()) is None, name
    assert "torch" in inside.names and "torch" in inside.distributions and "pytest" not in inside.names
    assert all(inside.covers(Path(path)) for path, content in inside.rules() if content)
    assert inside.covers(PROJECT) is None and inside.covers(Path("/")) is None


def test_a_folder_that_packages_share_is_not_in_reach_as_a_whole(tmp_path: Path) -> None:
    info = tmp_path / "one-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: one\nVersion: 1.0\n")
    (info / "RECORD").write_text("../../bin/one,,\none/__init__.py,,\none/data/a.so,,\nshared/one/__init__.py,,\n"
                                 "single.py,,\n__pycache__/single.pyc,,\none.libs/b.so.1,,\none-1.0.dist-info/RECORD,,\n\"one/a,b.py\",,\n")
    entries, libraries = top_entries(installed_files(importlib.metadata.PathDistribution(info)))
    assert entries == {"one", "shared/one", "single.py", "one.libs", "one-1.0.dist-info"}
    assert libraries == ["one/data/a.so", "one.libs/b.so.1"]


def test_data_beside_the_code_of_a_package_are_told_by_name() -> None:
    """Folders of data as a whole; of folders with code, single files; of folders of tests, what lies right in them."""
    paths = ["a/__init__.py", "a/info/real_labels.json", "a/info/synsets.txt", "a/labels.py", "a/data/cifar.npz",
             "a/data/more/mnist.csv", "a/tests/__init__.py", "a/tests/natype.py", "a/tests/iris.txt", "a/tests/data/set.py",
             "a/tests/data/x.csv", "a/datasets/__init__.py", "a/datasets/digits.txt", "a/lib.so.1",
             "a-1.dist-info/labels.txt", "single.pth", "b_data/x.npy"]
    assert data_entries(paths) == {"a/info/real_labels.json", "a/data", "a/tests/iris.txt", "a/tests/data",
                                 "a/datasets/digits.txt", "b_data"}
    assert data_entries(["a/__init__.py", "a/config.yaml"]) == set()


def test_no_file_in_reach_holds_arrays_tables_or_labels() -> None:
    """By content, whatever the names say: archives, arrays, tables, and the known labels of ImageNet."""
    inside, found = reach(), []
    starts = (b"PK\3\4", b"\x1f\x8b", b"\x93NUMPY", b"\x89HDF", b"PAR1", b"ARROW1", b"BZh", b"\xfd7zXZ", b"\x89PNG",
              b"\xff\xd8\xff", b"MATLAB", b"SQLite")
    for folder in (Path(tree) for tree in inside.trees if "-packages" in tree):
        for path in (Path(above, name) for above, _, names in os.walk(folder) for name in names):
            if path.suffix in (".py", ".pyc", ".pyi", ".h", ".hpp", ".so") or inside.covers(path) is None:
                continue
            with path.open("rb") as file:
                found += [str(path)] if file.read(8).startswith(starts) or "labels" in path.name else []
    assert found == []


def test_libraries_are_those_that_the_loader_names() -> None:
    ldd = shutil.which("ldd")
    if ldd is None:
        pytest.skip("there is no ldd")
    said = subprocess.run([ldd, os.path.realpath(sys.executable)], capture_output=True, text=True, check=True).stdout
    named = {os.path.realpath(word) for line in said.splitlines() for word in line.split() if word.startswith("/")}
    assert named <= {os.path.realpath(path) for path in needed_libraries([os.path.realpath(sys.executable)])}
