"""Ray clusters: lost machines, GPUs, failures, and addresses where no cluster answers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from metadata.formats import read_csv
from tests.helpers.commands import Compress, PROJECT, assert_one_line_error
from tests.helpers.processes import descendants
from tests.helpers.sweeps import SMALL, start, wait_for, write_plan


def kill_machine(node: subprocess.Popen[bytes]) -> None:
    for process in [*reversed(descendants(node.pid)), node.pid]:  # the youngest first
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
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # Ray 2.60 asks for a token of the user's, who has none here
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


@pytest.mark.slow
def test_ray_gives_the_candidates_of_a_lost_machine_to_another(tmp_path: Path) -> None:
    """A search whose race runs on two machines, one of which is lost in the first round."""
    changes = [f"{stage}.train.epochs=3" for stage in ("teacher", "distill")] + [
        "teacher.floor=0", "teacher.options.width=8", "distill.options.width=8", "distill.control=false",
        "search.samples=6", "search.train.checkpoint_seconds=0", f"run_dir={tmp_path}", "name=searched"]
    stage = tmp_path / "searched" / "03-search"
    with ray_machines("--num-cpus", "1") as (address, add_machine):
        second = add_machine()
        command = [sys.executable, "-m", "compress", "search", "slim_resnet18_digits", "--size_kb", "60", "--minutes", "1",
                   "--backend", "torch", "--ray", address, *changes]
        with subprocess.Popen(command, cwd=PROJECT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            wait_for(process, lambda: list(stage.glob("checkpoint-heat-*.pth")))
            kill_machine(second)
            out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    rows = read_csv(stage / "front.csv")
    assert "failed" not in {row["status"] for row in rows} and "answer" in {row["status"] for row in rows}
    assert sum(row["round"] != "0" for row in rows) > 2


RAY_GPU = """
import sys
import ray
from compress.training import workers
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
from compress.training import workers
from tests.helpers.work import some_work
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
