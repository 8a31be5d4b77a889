"""Files and folders that are whole or not there: what writes leave, and what is left where one was cut short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metadata.files import write_atomically
from metadata.locks import appearing, remove_leftovers
from tests.helpers.commands import PROJECT


def test_a_folder_appears_when_it_is_complete_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "made"
    (folder.parent / ".made.part" / "old").mkdir(parents=True)  # of a process that was killed
    with pytest.raises(KeyboardInterrupt), appearing(folder) as partial:
        (partial / "half").write_text("")
        raise KeyboardInterrupt
    assert not list(folder.parent.iterdir())
    with appearing(folder) as partial:
        (partial / "whole").write_text("")
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["whole"] and list(folder.parent.iterdir()) == [folder]


def test_leftovers_go_and_the_rest_stays(tmp_path: Path) -> None:
    for name in (".a.csv.x1.part", ".b.json.x2.part", "a.csv", ".lock", "part", "own.part"):
        (tmp_path / name).write_text("")
    (tmp_path / ".set-1.part").mkdir()
    (tmp_path / ".set-1.part" / "images.npy").write_text("")
    remove_leftovers(tmp_path, "a.csv")
    assert not (tmp_path / ".a.csv.x1.part").exists() and (tmp_path / ".b.json.x2.part").exists()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "a.csv", "own.part", "part"]


def test_write_atomically_replaces_or_leaves_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]
    assert path.stat().st_mode & 0o044
    script = ("import resource, sys; from pathlib import Path; from metadata.files import write_atomically\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
              "try: write_atomically(Path(sys.argv[1]), bytes(5000))\n"
              "except OSError as error: print(type(error).__name__)")
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=PROJECT,
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "OSError" and path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]
