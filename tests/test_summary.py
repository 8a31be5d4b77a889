"""The end of a test run's report: where it ran, and what it skipped, left out, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metadata.machine import machine
from tests.helpers import summary

TESTS = """import pytest
@pytest.mark.parametrize("number", range(4))
def test_numbers(number):
    if number > 1: pytest.skip("two are enough")
@pytest.mark.skipif(True, reason="needs another CPU")
def test_other(): pass
@pytest.mark.slow
def test_slow(): pass
"""


def test_a_run_says_where_it_ran_and_what_it_left_out_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_told_apart.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: long\n")
    capsys.readouterr()
    assert pytest.main(["-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(tmp_path),
                        "-c", str(tmp_path / "pytest.ini"), str(tmp_path)], plugins=[summary]) == 0
    said = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(said) if "where this ran" in line)
    assert said[start + 1] == summary.where()
    assert said[start + 2:start + 5] == ["2 skipped: two are enough", "1 skipped: needs another CPU",
                                         "1 left out: by 'not slow'; make slow runs them"]


def test_the_line_names_the_cpu_and_what_it_is_capped_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    line = summary.where()
    for part in (machine()["cpu"], f"{machine()['cores']} of", torch.backends.cpu.get_cpu_capability(), torch.__version__,
                 "ONEDNN_MAX_CPU_ISA=AVX2", *machine()["flags"]):
        assert part in line
