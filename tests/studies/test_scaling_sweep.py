"""Sweeps of scaling experiments: what is skipped and resumed, what dies, and a table that survives its writers."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compress.studies import workers
from compress.studies.scaling import sweeps
from compress.studies.scaling.plans import read_plan
from compress.studies.scaling.rows import BusyError, COLUMNS, Results
from metadata.errors import UserError
from metadata.formats import read_csv
from tests.helpers.commands import Compress, PROJECT, assert_one_line_error
from tests.studies.test_scaling_experiment import without_seconds

COMMON = {"dataset": "digits", "batch_size": 64, "num_epochs": 3, "test_freq": 1, "checkpoint_seconds": 0}
SMALL = {"kind": "data", "dataset_sizes": [100, 200], "width": 2, "depth": 1}


def write_plan(path: Path, *parts: dict[str, Any], **common: Any) -> Path:
    path.write_text(json.dumps({**COMMON, **common, "sweeps": list(parts)}))  # JSON is YAML
    return path


def start(*arguments: object) -> subprocess.Popen[str]:
    """A command that Ctrl-C reaches, even where the tests themselves run in the background and are deaf to it."""
    return subprocess.Popen([sys.executable, "-m", "compress", "scaling", *map(str, arguments)], cwd=PROJECT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def children(process: int) -> dict[int, str]:
    """Its worker processes; multiprocessing has one more, which looks after its resources."""
    try:
        found = [int(word) for task in Path(f"/proc/{process}/task").iterdir()
                 for word in (task / "children").read_text().split()]
        return {child: words for child in found if "spawn_main" in (words := Path(f"/proc/{child}/cmdline").read_text())}
    except (FileNotFoundError, ProcessLookupError):
        return {}


def wait_for(process: subprocess.Popen[str], happened: Any) -> None:
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def trained_since(base: Path, moment: float) -> bool:
    """Whether a checkpoint was written after a moment."""
    with suppress(FileNotFoundError):  # a point was over and its checkpoint is gone
        return any(file.stat().st_mtime > moment for file in base.glob("results/checkpoints/*/*.pth"))
    return False


# ---------------------------------------------------------------------------------------------------------- the table

WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
from compress.studies.scaling.rows import Results

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


def test_a_damaged_table_is_an_error_of_one_line(compress: Compress, tmp_path: Path) -> None:
    path = write_plan(tmp_path / "plan.yaml", SMALL, base_dir=str(tmp_path / "out"))
    table = tmp_path / "out" / "results" / "final_data.csv"
    table.parent.mkdir(parents=True)
    table.write_bytes(b"\xff\xfebad")
    assert_one_line_error(compress("scaling", "sweep", path), str(table), "damaged, expected a CSV file")


def test_points_that_another_sweep_runs_are_not_taken_for_done(compress: Compress, tmp_path: Path) -> None:
    base = tmp_path / "out"
    path = write_plan(tmp_path / "plan.yaml", SMALL, base_dir=str(base))
    results = Results(base)
    results.create()
    point = read_plan(str(path)).points(lambda width, depth: 1000)[0]
    with results.claimed(point.id):
        done = compress("scaling", "sweep", path, "--workers", "1")
    assert done.returncode == 2 and "1 of 2 points are still run by another sweep" in done.stderr, done.stdout + done.stderr


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
        from compress.studies.scaling.rows import Results
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


# ------------------------------------------------------------------------------------------------------- whole sweeps


def test_plan_and_sweep_tell_what_is_done(compress: Compress, tmp_path: Path) -> None:
    base = tmp_path / "out"
    path = write_plan(tmp_path / "plan.yaml", SMALL, seeds=[0, 1], base_dir=str(base))
    done = compress("scaling", "plan", path, "--workers", "1")
    assert done.returncode == 0 and done.stdout.count("2 to do") == 2 and "about" in done.stdout, done.stderr
    assert not (base / "results" / "final_data.csv").exists()
    compress("scaling", "run", "--dataset", "digits", "--base_dir", base, "--threads", "1", "--batch_size", "64",
             "--num_epochs", "3", "--test_freq", "1", "--width", "2", "--depth", "1", "--dataset_size", "100")
    done = compress("scaling", "sweep", path, "--workers", "1")
    assert done.returncode == 0 and "4 points, 1 of them finished before" in done.stdout, done.stdout + done.stderr
    assert "3/3 " in done.stdout and "seeds" in done.stdout
    rows = read_csv(base / "results" / "final_data.csv")
    assert sorted((row["D"], row["seed"]) for row in rows) == [("100", "0"), ("100", "1"), ("200", "0"), ("200", "1")]
    assert len(list((base / "results" / "runs").glob("*.csv"))) == 4
    assert {row["id"] for row in rows[1:3]} != {row["id"] for row in rows if row["D"] == "100"}  # the longest come first
    before = (base / "results" / "final_data.csv").read_bytes()
    assert "4 of them finished before" in compress("scaling", "sweep", path).stdout
    assert (base / "results" / "final_data.csv").read_bytes() == before
    assert "2 done" in compress("scaling", "plan", path).stdout
    write_plan(path, SMALL, seeds=[0, 1], base_dir=str(base), num_epochs=2)  # all of the configuration counts
    study = sweeps.open_study(read_plan(str(path)), Console(file=io.StringIO()))
    assert list(study.states().values()) == ["to do"] * 4


def test_a_killed_worker_is_a_failed_row_and_the_sweep_goes_on(tmp_path: Path) -> None:
    base = tmp_path / "out"
    long = {"kind": "width", "widths": [8], "dataset_size": 1400, "num_epochs": 2000, "test_freq": 2000}
    path = write_plan(tmp_path / "plan.yaml", SMALL, long, base_dir=str(base))
    with start("sweep", path, "--workers", "1") as process:
        wait_for(process, lambda: list(base.glob("results/checkpoints/w8-*/*.pth")))
        worker, = children(process.pid)
        os.kill(worker, signal.SIGKILL)
        out, err = process.communicate()
    assert process.returncode == 1, out + err
    rows = {row["D"]: row for row in read_csv(base / "results" / "final_data.csv")}
    assert {size: row["status"] for size, row in rows.items()} == {"1400": "failed", "100": "done", "200": "done"}
    assert "killed by SIGKILL, perhaps for want of memory" in rows["1400"]["message"] and "killed by SIGKILL" in out
    assert int(rows["1400"]["N"]) > 0 and rows["1400"]["seconds"] == ""
    with start("sweep", path, "--workers", "1") as process:  # it is tried again, from its checkpoint
        wait_for(process, lambda: children(process.pid))
        worker, = children(process.pid)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130 and err == "interrupted; the same command continues\n", err
    assert "3 points, 2 of them finished before" in out and not Path(f"/proc/{worker}").exists()
    assert list(base.glob("results/checkpoints/w8-*/*.pth"))
    assert len(read_csv(base / "results" / "final_data.csv")) == 3


@pytest.mark.slow
def test_workers_do_not_outlive_a_sweep_that_was_killed(tmp_path: Path) -> None:
    base = tmp_path / "out"
    path = write_plan(tmp_path / "plan.yaml", {"kind": "width", "widths": [8], "dataset_size": 1400, "num_epochs": 2000},
                      base_dir=str(base))
    with start("sweep", path, "--workers", "1") as process:
        wait_for(process, lambda: list(base.glob("results/checkpoints/*/*.pth")))
        worker, = children(process.pid)
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


# Work for the pool alone; a spawned process imports it by name.
def some_work(task: str, report: workers.Report) -> str:
    report(0.5)
    if task == "mistake":
        raise UserError("expected this, got that")
    if task == "torch":
        raise RuntimeError("out of memory\nand more")
    if task == "bug":
        raise KeyError("unforeseen")
    if task == "exit":
        os._exit(3)
    return task.upper()


def test_every_way_to_fail_is_an_outcome() -> None:
    tasks = ["a", "mistake", "bug", "b", "torch", "exit", "c"]
    seen: dict[str, workers.TaskOutcome[str, str]] = {}
    told: set[str] = set()
    workers.run_local(some_work, tasks, 2, lambda outcome: seen.update({outcome.task: outcome}),
                    lambda task, share: told.add(task))
    assert {name: seen[name].result for name in tasks} == {"a": "A", "b": "B", "c": "C", "mistake": None, "bug": None,
                                                           "torch": None, "exit": None}
    assert seen["mistake"].failure == "expected this, got that"
    assert seen["torch"].failure == "RuntimeError: out of memory"
    assert seen["bug"].failure == "the worker process ended with exit status 1: KeyError: 'unforeseen'"
    assert seen["exit"].failure.startswith("the worker process ended with exit status 3")
    assert {"a", "b", "c"} <= told


@pytest.mark.slow
def test_a_sweep_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    grid = {"kind": "joint", "widths": [2, 4], "depths": [1], "dataset_sizes": [300, 1000]}
    whole = write_plan(tmp_path / "whole.yaml", grid, seeds=[0, 1], num_epochs=40, base_dir=str(tmp_path / "whole"))
    rows = sweeps.run_sweep(read_plan(str(whole)), Console(file=io.StringIO()), workers=2)
    assert len(rows) == 8 and all(row["status"] == "done" for row in rows)
    base = tmp_path / "killed"
    path = write_plan(tmp_path / "plan.yaml", grid, seeds=[0, 1], num_epochs=40, base_dir=str(base))
    chance = random.Random(0)
    for _ in range(6):
        begun = time.time()
        with start("sweep", path, "--workers", "2") as process:
            wait_for(process, lambda begun=begun: trained_since(base, begun))
            time.sleep(chance.uniform(0, 1))
            os.kill(chance.choice([process.pid, *children(process.pid)]), signal.SIGKILL)  # the sweep, or a worker
            time.sleep(chance.uniform(0, 1))
            process.kill()
            process.communicate()
    with start("sweep", path, "--workers", "2") as process:
        _, err = process.communicate()
    assert process.returncode == 0, err
    for name in ("final_data.csv", *(f"runs/{row['id']}.csv" for row in rows)):
        ours, theirs = (sorted(without_seconds(tmp_path / folder / "results" / name), key=str)
                        for folder in ("whole", "killed"))
        assert ours == theirs
    assert not list((base / "results" / "checkpoints").iterdir())


# --------------------------------------------------------------------------------------------------------------- Ray


def descendants(process: int) -> list[int]:
    """A process and all that it and they have started, the youngest first."""
    try:
        found = [int(word) for task in Path(f"/proc/{process}/task").iterdir()
                 for word in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [*(other for child in found for other in descendants(child)), process]


def kill_machine(node: subprocess.Popen[bytes]) -> None:
    for process in descendants(node.pid):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    node.wait()


@contextmanager
def ray_machines(*options: str) -> Iterator[tuple[str, Callable[[], subprocess.Popen[bytes]]]]:
    """A Ray cluster of one machine with these options: its address, and a function that adds a machine like it."""
    pytest.importorskip("ray")
    ray = Path(sys.executable).with_name("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, machines = f"127.0.0.1:{port}", []

    def start_machine(*arguments: str) -> subprocess.Popen[bytes]:
        machines.append(subprocess.Popen([ray, "start", "--block", "--disable-usage-stats", *options, *arguments],
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return machines[-1]

    # Ray's sockets have long names, and the system takes short ones only.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        try:
            start_machine("--head", "--port", str(port), "--include-dashboard", "false", "--temp-dir", folder)
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.5)
            yield address, lambda: start_machine("--address", address)
        finally:
            for machine in machines:
                kill_machine(machine)


@pytest.mark.slow
def test_ray_gives_the_points_of_a_lost_machine_to_another(tmp_path: Path) -> None:
    base = tmp_path / "out"
    sizes = {"kind": "data", "dataset_sizes": [300, 400, 500, 600], "width": 4, "depth": 1}
    path = write_plan(tmp_path / "plan.yaml", sizes, num_epochs=100, test_freq=20, base_dir=str(base))
    with ray_machines("--num-cpus", "1") as (address, add_machine):
        second = add_machine()
        with start("sweep", path, "--ray", address) as process:
            wait_for(process, lambda: len(list(base.glob("results/checkpoints/*/*.pth"))) >= 2)  # one on each machine
            kill_machine(second)
            out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    rows = read_csv(base / "results" / "final_data.csv")
    assert sorted(row["D"] for row in rows) == ["300", "400", "500", "600"]
    assert {row["status"] for row in rows} == {"done"}


RAY_GPU = """
import sys
import ray
from compress.studies import workers
def gpus(task, report):
    return ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
for on_gpu in (None, False):
    workers.run_ray(gpus, ["task"], sys.argv[1], lambda outcome: print(on_gpu, outcome.result, outcome.failure), on_gpu)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("count", "taken"), [("1", "['0']"), ("0", "[]")])
def test_ray_tasks_take_a_gpu_each_where_the_cluster_has_any(count: str, taken: str) -> None:
    with ray_machines("--num-cpus", "2", "--num-gpus", count) as (address, _):  # Ray believes what it is told
        done = subprocess.run([sys.executable, "-c", RAY_GPU, address], cwd=PROJECT, capture_output=True, text=True,
                              check=True, timeout=300)
    assert done.stdout.splitlines() == [f"None {taken} ", "False [] "]


RAY_LOCAL = """
from compress.studies import workers
from tests.studies.test_scaling_sweep import some_work
tasks = ["a", "mistake", "bug", "torch"]
workers.run_ray(some_work, tasks, "local", lambda outcome: print(outcome.task, outcome.result, outcome.failure, sep="|"))
"""


@pytest.mark.slow
def test_ray_on_this_machine_fails_like_local_processes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    done = subprocess.run([sys.executable, "-c", RAY_LOCAL], cwd=PROJECT, capture_output=True, text=True, check=True)
    seen = {line.split("|")[0]: line.split("|")[1:] for line in done.stdout.splitlines()}
    assert seen["a"] == ["A", ""] and seen["mistake"] == ["None", "expected this, got that"]
    assert seen["torch"] == ["None", "RuntimeError: out of memory"] and "KeyError: 'unforeseen'" in seen["bug"][1]


def test_ray_cluster_that_is_not_there(compress: Compress, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    path = write_plan(tmp_path / "plan.yaml", SMALL, base_dir=str(tmp_path / "out"))
    for address in ("127.0.0.1:9", "127.0.0.1:many"):
        done = compress("scaling", "sweep", path, "--ray", address)
        assert_one_line_error(done, f"--ray {address}: no Ray cluster there")
