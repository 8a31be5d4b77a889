"""Folders with code, of any size and with weights stored in any way: they are scored, and what is said of them is true."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compress.evaluation import sandbox
from tests.helpers.verdicts import Evaluate, assert_refused

ALLOW = "--allow_code"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "folder"))


def append(folder: Path, code: str) -> None:
    """Adds lines to the end of model.py."""
    with (folder / "model.py").open("a") as file:
        file.write(f"\n{code}\n")


# The sandbox looks into the folder once a second; the code makes it look.
@pytest.mark.parametrize(("code", "said"), [
    ("import os\nos.remove('one.bin')\nopen('new', 'wb').write(bytes(2**15))", None),
    ("for i in range(8):\n    open(f'new{i}', 'wb').write(bytes(2**14))", "the code wrote more than 65,536 bytes"),
    ("for i in range(20):\n    open(f'new{i}', 'wb').close()", "the code made more than 10 files"),
])
def test_the_copy_of_a_folder_is_not_what_the_code_wrote(code: str, said: str | None, folder: Path, evaluate: Evaluate,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SCRATCH_BYTES", 2**16)
    monkeypatch.setattr(sandbox, "MAX_SCRATCH_ENTRIES", 10)
    (folder / "one.bin").write_bytes(bytes(2**18))
    (folder / "many").mkdir()
    for index in range(20):
        (folder / "many" / f"{index}.txt").write_text("x")
    append(folder, f"{code}\nimport time\ntime.sleep(1.8)")
    outcome = evaluate(folder, ALLOW)
    if said:
        assert_refused(outcome, said)
    else:
        assert outcome[0] == 0, outcome[2]
