"""An evaluator that is told to stop: it says so in the result, and leaves no folder and no process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import model_loader
from metadata.machine import stat_fields
from tests.attacks.conftest import alarm
from tests.helpers.commands import PROJECT
from tests.helpers.processes import descendants
from tests.helpers.walls import WEAK_FLAGS


def ends(process: int) -> bool:
    """Whether a process ends within ten seconds; one that nobody waits for has ended, too."""
    for _ in range(200):
        try:
            if stat_fields(process)[0] == b"Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_an_evaluator_that_hangs_fails_its_test(tmp_path: Path) -> None:
    """The alarm of these tests is no error that the evaluator would turn into a result."""
    arguments = ["--submission_dir", "s", "--data_dir", "d", "--output_file", str(tmp_path / "results.json")]
    with pytest.raises(AssertionError, match="did not end within 1 s"), alarm(1):
        model_loader.main(arguments, lambda options: time.sleep(30))


@pytest.mark.parametrize(("number", "kind"), [
    (signal.SIGTERM, "code"), *(pytest.param(number, kind, marks=pytest.mark.slow) for number, kind in (
        (signal.SIGINT, "code"), (signal.SIGTERM, "task"), (signal.SIGHUP, "code")))])
def test_told_to_stop(number: signal.Signals, kind: str, code: Path, few: Path, tmp_path: Path,
                      stopping_signals: None) -> None:
    temporary, output = tmp_path / "temporary", tmp_path / "results.json"
    temporary.mkdir()
    if kind == "task":
        (tmp_path / "solution.py").write_text("while True: pass")
        flags = ["--task", "imagenet_pareto_2_5m", "--solution", str(tmp_path / "solution.py")]
    else:
        (code / "model.py").write_text("while True: pass")
        flags = ["--submission_dir", str(code), "--data_dir", str(few), "--allow_code"]
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "model_loader.py"), *flags, *WEAK_FLAGS, "--output_file", str(output)],
        env={**os.environ, "TMPDIR": str(temporary)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:  # until foreign code runs
            started = descendants(process.pid)
            if any(line.count("/child.py ") and "bwrap" not in line for line in started.values()):
                break
            time.sleep(0.05)
        time.sleep(1)
        started |= descendants(process.pid)
        assert process.poll() is None and any("/child.py " in line for line in started.values()), started
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number and "Traceback" not in error, (process.returncode, error)
    assert json.loads(output.read_text())["details"]["status"].startswith("failed: ")
    assert list(temporary.iterdir()) == []
    assert [started[each] for each in started if not ends(each)] == []
