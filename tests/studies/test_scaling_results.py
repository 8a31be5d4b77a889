"""The files of a scaling study: a table that survives its writers, and points that one process at a time may run."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from compress.studies.scaling.results import BusyError, COLUMNS, Results
from metadata.errors import UserError
from metadata.formats import read_csv
from tests.helpers.commands import PROJECT

WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
from compress.studies.scaling.results import Results

results, kills, chance = Results(Path(sys.argv[1])), int(sys.argv[2]), random.Random(0)
results.create()

def writer(number):
    pid = os.fork()
    if pid:
        return pid
    told = os.open(f"{sys.argv[1]}/told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for place in range(10 ** 6):
        name = f"{number}-{place % 40}"  # a few new rows, then the same ones again
        results.record({"id": name, "status": "done", "width": number, "message": "x" * 300})
        os.write(told, f"{name}\\n".encode())

started, alive = 3, {writer(number): number for number in range(3)}
for _ in range(kills):
    time.sleep(chance.uniform(0, 0.03))
    rows = results.rows()  # whole at any moment
    assert all(len(row["message"]) == 300 and row["id"].startswith(row["width"] + "-") for row in rows.values())
    victim = chance.choice(sorted(alive))
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    del alive[victim]
    alive[writer(started)] = started
    started += 1
for pid in alive:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


def test_no_row_is_lost_or_torn_when_writers_are_killed_a_hundred_times(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WRITERS, str(tmp_path), "100"], cwd=PROJECT, check=True, timeout=300)
    results = Results(tmp_path)
    told = set((tmp_path / "told").read_text().split())
    rows = results.rows()
    assert len(told) >= 50 and told <= set(rows)
    # A writer may have been killed between its row and its word; no more than one row each.
    assert len(set(rows) - told) <= 103
    content = read_csv(results.table)
    assert len(content) == len(rows) and all(tuple(row) == COLUMNS for row in content)
    results.record({"id": "last", "status": "done"})  # and what the killed ones left goes
    assert not list(results.folder.glob(".*.part"))


def test_a_failure_replaces_nothing_that_is_over(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.create()
    for status, kept in (("failed", "failed"), ("done", "done"), ("failed", "done"), ("diverged", "diverged")):
        results.record({"id": "a", "status": status})
        assert results.rows()["a"]["status"] == kept
    results.table.write_text("id,status\na,done,more\n")
    with pytest.raises(UserError, match="line 2: more cells than the header"):
        results.rows()


def test_a_point_is_run_by_one_process_at_a_time(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.create()
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from compress.studies.scaling.results import Results
        with Results(Path({str(tmp_path)!r})).claimed("a"):
            print("held", flush=True)
            sys.stdin.read()""")], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin and holder.stdout and holder.stdout.readline()
    with results.claimed("b"):
        pass
    with pytest.raises(BusyError, match="another process is running it"), results.claimed("a"):
        pass
    holder.kill()
    holder.communicate()
    with results.claimed("a"):
        pass
