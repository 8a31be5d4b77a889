"""The folder that foreign code writes to is removed, whatever the code made of it and whatever ended the evaluator."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from compress.evaluation import scratch
from tests.helpers.commands import PROJECT

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="the sandbox is Linux's")


def test_closed_folders_are_removed(tmp_path: Path) -> None:
    closed = tmp_path / "a" / "closed"
    closed.mkdir(parents=True)
    (closed / "file").write_text("x")
    closed.chmod(0o300)
    scratch.remove(tmp_path / "a")
    assert not (tmp_path / "a").exists()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from compress.evaluation.scratch import DiskScratch
open(os.path.join(DiskScratch(False).outside, "x"), "w").close()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_only_the_folders_of_dead_evaluators_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for _ in range(2):
        subprocess.run([sys.executable, "-B", "-c", KILLED, str(PROJECT)], env=os.environ | {"TMPDIR": str(tmp_path)},
                       check=False, timeout=60)
        stale, = tmp_path.iterdir()  # the second has removed the first's
    assert stale.name.startswith(scratch.FOLDERS)
    alive, others = scratch.DiskScratch(False), [tmp_path / "sandbox-mine", tmp_path / f"{scratch.FOLDERS}link"]
    others[0].mkdir()
    others[1].symlink_to(others[0])
    (tmp_path / f"{scratch.FOLDERS}file").write_text("x")
    again = scratch.DiskScratch(False)
    assert {path.name for path in tmp_path.iterdir()} == {
        os.path.basename(alive.outside), os.path.basename(again.outside), "sandbox-mine", f"{scratch.FOLDERS}link",
        f"{scratch.FOLDERS}file"}
    alive.close()
    again.close()
    assert len([*tmp_path.iterdir()]) == 3
