"""Jobs on one card: they share it, end in time, continue, and do not stop one another. Every job is a real process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_card import Ended, Job, Limits, Sitting, plan
from tests.helpers.commands import PROJECT

LIMITS = Limits(minutes=0.5, parallel=8)
STUBBORN = """import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: pathlib.Path(sys.argv[1], "asked").touch())
other = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(100)"])
pathlib.Path(sys.argv[1], "child").write_text(str(other.pid))
while True:
    time.sleep(0.05)
"""
COUNTING = """import pathlib, sys, time
path = pathlib.Path(sys.argv[1], "sittings")
path.write_text(path.read_text() + "x" if path.is_file() else "x")
time.sleep(0 if path.read_text() == "xx" else 100)
"""


def job(name: str, code: str = "pass", placed: Sequence[str] = (), **changes: Any) -> Job:
    """A job that runs a line of Python."""
    settings = {"minutes": 0.01, "source": "a guess", "share": 0.5, "least": 0.01, **changes}
    return Job(name=name, command=[sys.executable, "-S", "-c", code], placed=placed, **settings)


def sit(out: Path, jobs: Sequence[Job], limits: Limits = LIMITS) -> dict[str, Ended]:
    """One sitting; what became of each job, by name."""
    ended = Sitting(out, limits, time.monotonic(), {"scale": 1.0}, print).run(jobs)
    assert [entry.job.name for entry in ended] == [one.name for one in jobs]
    return {entry.job.name: entry for entry in ended}


def record_of(out: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return content


def test_jobs_share_the_card_and_one_whose_time_is_a_result_has_it_alone(tmp_path: Path) -> None:
    nap = "import time; time.sleep(0.4)"
    jobs = [job("one", nap), job("two", nap), job("three", nap), job("alone", nap, share=1.0)]
    ended = sit(tmp_path, jobs)
    assert {entry.status for entry in ended.values()} == {"done"}
    beside = {name: record_of(tmp_path, name)["beside"] for name in ended}
    assert "two" in beside["one"] and "one" in beside["two"] and beside["alone"] == []
    assert not {"one", "two"} <= set(beside["three"])  # a third half has to wait for one of the two
    assert 0.4 <= record_of(tmp_path, "alone")["seconds"] < 20


def test_no_more_processes_than_allowed(tmp_path: Path) -> None:
    ended = sit(tmp_path, [job(name, share=0.1) for name in "abc"], Limits(minutes=0.5, parallel=1))
    assert [entry.record["beside"] for entry in ended.values()] == [[], [], []]


def test_a_record_says_what_ran_where_and_what_it_left(tmp_path: Path) -> None:
    one = job("one", "print('hello')", ["--data_root", "/somewhere"], goal=0.5, published="a paper",
              result=lambda: {"n": 3, "test_accuracy": 0.75, "loss": float("nan")})
    sit(tmp_path, [one])
    record = record_of(tmp_path, "one")
    assert record["command"] == "python -S -c 'print('\"'\"'hello'\"'\"')'" and record["status"] == "done"
    assert (record["n"], record["test_accuracy"], record["loss"], record["goal"]) == (3, 0.75, None, 0.5)
    assert record["machine"]["cores"] >= 1 and "torch" in record["versions"] and record["sittings"] == 1
    assert (tmp_path / "logs" / "one.log").read_text() == "hello\n"
    assert record["scale"] == 1.0 and record["estimate"] == "a guess"


def test_a_job_that_fails_is_recorded_with_its_last_lines_and_the_others_go_on(tmp_path: Path) -> None:
    def unreadable() -> dict[str, Any]:
        raise KeyError("test")

    jobs = [job("bad", "print('almost'); raise SystemExit('the reason')"), job("missing", missing="no data"),
            job("killed", "import os; os.kill(os.getpid(), 9)"), job("odd", result=unreadable), job("good")]
    ended = sit(tmp_path, jobs)
    assert {name: entry.status for name, entry in ended.items()} == {
        "bad": "failed", "missing": "left out", "killed": "failed", "odd": "failed", "good": "done"}
    assert record_of(tmp_path, "bad")["last_lines"] == ["almost", "the reason"] and ended["bad"].note == "exit code 1"
    assert "SIGKILL" in ended["killed"].note and ended["missing"].note == "no data" and "KeyError" in ended["odd"].note
    assert not (tmp_path / "missing.json").exists()
    repaired = [job("bad", "print('better')"), job("good", "raise SystemExit(9)", minutes=0.02)]
    again = sit(tmp_path, [repaired[0], jobs[-1]])
    assert again["bad"].status == "done" and again["good"].status == "recorded before"
    assert sit(tmp_path, repaired[1:])["good"].status == "failed"  # another command is another job


def running(process: str) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_the_deadline_stops_a_long_job_and_what_it_started_and_the_next_sitting_continues(tmp_path: Path) -> None:
    began = time.monotonic()
    long = job("long", STUBBORN, [str(tmp_path)], minutes=5.0)
    ended = sit(tmp_path, [long, job("late", minutes=3.0, least=2.0), job("short", minutes=0.001)],
                Limits(minutes=0.1, parallel=8))
    assert time.monotonic() - began < 30
    assert ended["long"].status == "unfinished" and "0.1 minutes are over" in ended["long"].note
    assert ended["late"].status == "left out" and "needs about 2.0 min" in ended["late"].note
    assert ended["short"].status == "done" and (tmp_path / "asked").exists()
    assert not running((tmp_path / "child").read_text())
    assert record_of(tmp_path, "long")["status"] == "unfinished"

    twice = job("twice", COUNTING, [str(tmp_path)], minutes=5.0)
    first = sit(tmp_path, [twice], Limits(minutes=0.1, parallel=1))["twice"].record
    second = sit(tmp_path, [twice])["twice"].record
    assert (first["status"], second["status"], second["sittings"]) == ("unfinished", "done", 2)
    assert second["seconds"] > first["seconds"] > 1
    assert sit(tmp_path, [twice])["twice"].status == "recorded before" and (tmp_path / "sittings").read_text() == "xx"


SITTING = """import sys, time
from pathlib import Path
from benchmarks.gpu_card import Job, Limits, Sitting
out, code = Path(sys.argv[1]), sys.argv[2]
job = Job(name="long", command=[sys.executable, "-S", "-c", code], placed=[str(out)], minutes=0.1, source="", share=1.0)
Sitting(out, Limits(minutes=5.0, parallel=1), time.monotonic(), {}, lambda text: print(text, flush=True)).run([job])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kill", [True, False], ids=["SIGKILL", "SIGTERM"])
def test_no_job_outlives_its_sitting(kill: bool, tmp_path: Path) -> None:
    code = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], 'pid').write_text(str(os.getpid())); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", SITTING, str(tmp_path), code], cwd=PROJECT, stdout=subprocess.PIPE,
                          text=True) as sitting:
        while not (tmp_path / "pid").is_file() or not (process := (tmp_path / "pid").read_text()):
            time.sleep(0.05)
        assert running(process)
        (sitting.kill if kill else sitting.terminate)()
        printed = sitting.stdout.read() if sitting.stdout else ""
    patience = time.monotonic() + 30
    while running(process) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not running(process) and record_of(tmp_path, "long")["status"] == "unfinished"
    assert kill or "stopped by SIGTERM; the same command continues" in printed


def test_the_plan_follows_the_rules_of_the_sitting() -> None:
    jobs = [job("one", minutes=2.0, least=1.0), job("two", minutes=3.0, least=1.0), job("absent", missing="no data"),
            job("alone", minutes=1.0, share=1.0), job("big", minutes=9.0, least=9.0), job("cut", minutes=9.0, least=1.0),
            job("half", minutes=8.0, least=4.0)]
    limits = Limits(minutes=10.0 + 1 / 6, parallel=2)  # the last ten seconds are for stopping
    planned = {entry.job.name: (round(entry.start, 3), round(entry.end, 3)) for entry in plan(jobs, {"half": 6.0}, limits)}
    assert planned == {"one": (0, 2), "two": (0, 3), "alone": (3, 4), "big": (3, 3), "cut": (4, 10), "half": (4, 6)}
    assert all(entry.start >= 1.5 for entry in plan(jobs, {}, limits, start=1.5))
