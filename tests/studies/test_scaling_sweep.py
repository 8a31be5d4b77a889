"""Sweeps of scaling experiments: points that are skipped, resumed, killed and interrupted."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from compress.studies.scaling.plans import read_plan
from compress.studies.scaling.results import Results
from compress.studies.scaling.sweep import open_study, run_sweep
from metadata.formats import read_csv
from tests.helpers.commands import Compress, assert_one_line_error
from tests.helpers.sweeps import SMALL, start, wait_for, without_seconds, worker_processes, write_plan


@contextmanager
def meanwhile(happened: Callable[[], Any], act: Callable[[], None]) -> Iterator[None]:
    """Acts once, from a thread, when something has happened in the block; raises what `act` raises."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if happened():
                return act()
            time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield
        finally:
            over.set()
    watching.result()


def trained_since(base: Path, moment: float) -> bool:
    """Whether a checkpoint was written after a moment."""
    with suppress(FileNotFoundError):  # a point was over and its checkpoint is gone
        return any(file.stat().st_mtime > moment for file in base.glob("results/checkpoints/*/*.pth"))
    return False


# ------------------------------------------------------------------------------------------------- damaged and busy


def test_a_damaged_table_is_an_error_of_one_line(compress: Compress, tmp_path: Path) -> None:
    path = write_plan(tmp_path / "plan.yaml", SMALL, base_dir=str(tmp_path / "out"))
    table = tmp_path / "out" / "results" / "final_data.csv"
    table.parent.mkdir(parents=True)
    table.write_bytes(b"\xff\xfebad")
    assert_one_line_error(compress("scaling", "sweep", path), str(table), "damaged, expected a CSV file")


@pytest.mark.slow
def test_points_that_another_sweep_runs_are_not_taken_for_done(compress: Compress, tmp_path: Path) -> None:
    base = tmp_path / "out"
    path = write_plan(tmp_path / "plan.yaml", SMALL, base_dir=str(base))
    results = Results(base)
    results.create()
    point = read_plan(str(path)).points(lambda width, depth: 1000)[0]
    with results.claimed(point.id):
        done = compress("scaling", "sweep", path, "--workers", "1")
    assert done.returncode == 2 and "1 of 2 points are still run by another sweep" in done.stderr, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------- whole sweeps


@pytest.mark.slow
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
    study = open_study(read_plan(str(path)), Console(file=io.StringIO()))
    assert list(study.states().values()) == ["to do"] * 4


def test_a_killed_worker_is_a_failed_row_and_the_sweep_goes_on(compress: Compress, tmp_path: Path) -> None:
    base = tmp_path / "out"
    long = {"kind": "width", "widths": [8], "dataset_size": 1400, "num_epochs": 2000, "test_freq": 2000}
    path = write_plan(tmp_path / "plan.yaml", SMALL, long, base_dir=str(base))
    sweep = ("scaling", "sweep", path, "--workers", "1")
    killed: list[int] = []

    def kill_worker() -> None:
        worker, = multiprocessing.active_children()
        assert worker.pid is not None
        killed.append(worker.pid)
        os.kill(worker.pid, signal.SIGKILL)

    with meanwhile(lambda: list(base.glob("results/checkpoints/w8-*/*.pth")), kill_worker):
        done = compress(*sweep)
    assert len(killed) == 1 and done.returncode == 1, done.stdout + done.stderr
    rows = {row["D"]: row for row in read_csv(base / "results" / "final_data.csv")}
    assert {size: row["status"] for size, row in rows.items()} == {"1400": "failed", "100": "done", "200": "done"}
    assert "killed by SIGKILL, perhaps for lack of memory" in rows["1400"]["message"]
    assert "killed by SIGKILL" in done.stdout
    assert int(rows["1400"]["N"]) > 0 and rows["1400"]["seconds"] == ""

    restarted = time.time()  # the failed point is tried again, from its checkpoint, and interrupted
    before, = base.glob("results/checkpoints/w8-*/*.pth")
    steps = torch.load(before, weights_only=True)["step"]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # background tests would ignore Ctrl-C
    try:
        with meanwhile(lambda: trained_since(base, restarted), lambda: os.kill(os.getpid(), signal.SIGINT)):
            done = compress(*sweep)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert done.returncode == 130 and done.stderr == "interrupted; the same command continues\n", done.stderr
    assert "3 points, 2 of them finished before" in done.stdout and not multiprocessing.active_children()
    assert torch.load(before, weights_only=True)["step"] > steps
    assert len(read_csv(base / "results" / "final_data.csv")) == 3


@pytest.mark.slow
def test_workers_do_not_outlive_a_sweep_that_was_killed(tmp_path: Path) -> None:
    base = tmp_path / "out"
    path = write_plan(tmp_path / "plan.yaml", {"kind": "width", "widths": [8], "dataset_size": 1400, "num_epochs": 2000},
                      base_dir=str(base))
    with start("sweep", path, "--workers", "1") as process:
        wait_for(process, lambda: list(base.glob("results/checkpoints/*/*.pth")))
        worker, = worker_processes(process.pid)
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.slow
def test_a_sweep_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    grid = {"kind": "joint", "widths": [2, 4], "depths": [1], "dataset_sizes": [300, 1000]}
    whole = write_plan(tmp_path / "whole.yaml", grid, seeds=[0, 1], num_epochs=40, base_dir=str(tmp_path / "whole"))
    rows = run_sweep(read_plan(str(whole)), Console(file=io.StringIO()), workers=2)
    assert len(rows) == 8 and all(row["status"] == "done" for row in rows)
    base = tmp_path / "killed"
    path = write_plan(tmp_path / "plan.yaml", grid, seeds=[0, 1], num_epochs=40, base_dir=str(base))
    chance = random.Random(0)
    for _ in range(6):
        begun = time.time()
        with start("sweep", path, "--workers", "2") as process:
            wait_for(process, lambda begun=begun: trained_since(base, begun))
            time.sleep(chance.uniform(0, 1))
            os.kill(chance.choice([process.pid, *worker_processes(process.pid)]), signal.SIGKILL)  # the sweep, or a worker
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
