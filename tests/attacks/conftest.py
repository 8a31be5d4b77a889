"""An evaluation under attack: it must end, write its result, and leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import model_loader
from tests.evaluation.conftest import onnx_submission, original  # noqa: F401 - fixtures
from tests.helpers.verdicts import Evaluate
from tests.helpers.walls import WEAK_FLAGS

QUICK = ["--runs", "20", "--warmup", "2", "--time_limit_s", "60", "--memory_limit_mb", "2048"]
PATIENCE_S = 150  # an evaluation that takes longer hangs: none needs a tenth of this


class HangError(BaseException):
    """The time is over. Not an Exception: the evaluator must not take it for a fault of a submission or of the machine."""


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Interrupt a block that does not end, and raise AssertionError whatever the block makes of that."""
    rung = []

    def ring(number: int, frame: Any) -> None:
        rung.append(number)
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    except HangError as error:  # its traceback shows where the block hung
        raise AssertionError(f"the evaluator did not end within {seconds} s") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not rung, f"the evaluator did not end within {seconds} s, and took the alarm for something else"


@pytest.fixture
def attacked(few: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
             monkeypatch: pytest.MonkeyPatch) -> Iterator[Evaluate]:
    """Run the evaluator's command line on a folder: exit code, result, stderr. Its temporary folder is empty afterwards."""
    temporary, output = tmp_path / "temporary", tmp_path / "results.json"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def run(folder: Path, *flags: str, data: Path = few) -> tuple[int, dict[str, Any], str]:
        output.unlink(missing_ok=True)
        capfd.readouterr()
        with alarm(PATIENCE_S):
            code = model_loader.main(["--submission_dir", str(folder), "--data_dir", str(data), "--output_file",
                                      str(output), *QUICK, *flags, *(WEAK_FLAGS if "--allow_code" in flags else [])])
        said = capfd.readouterr()
        assert code in (0, 1) and "Traceback" not in said.err, (code, said.err)  # 2 would blame the user
        return code, json.loads(output.read_text()), said.err

    yield run
    assert list(temporary.iterdir()) == [], "the evaluator left something behind"


@pytest.fixture
def package(submission: Path, tmp_path: Path) -> Path:
    """A copy of the honest package, to be changed."""
    return Path(shutil.copytree(submission, tmp_path / "package"))


@pytest.fixture
def code(original: Path, tmp_path: Path) -> Path:  # noqa: F811 - the fixture
    """A copy of the same network as code, to be changed."""
    return Path(shutil.copytree(original, tmp_path / "code"))


@pytest.fixture(scope="session")
def honest(submission: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of the honest package."""
    output = tmp_path_factory.mktemp("honest") / "results.json"
    assert model_loader.main(["--submission_dir", str(submission), "--data_dir", str(few), "--output_file", str(output),
                              *QUICK]) == 0
    return dict(json.loads(output.read_text()))
