"""A pool of workers: run independent tasks in processes of this machine, or on a Ray cluster.

A task that fails, or whose process dies, has an outcome like any other task, and the other tasks continue. The caller
passes the work: a top-level function of a module that takes a task and a function to report progress.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Generic, TypeVar

from metadata.errors import UserError, first_line
from metadata.machine import usable_cores

PROJECT = Path(__file__).parents[2]

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[[float], None]  # takes the fraction of the task that is done, in [0, 1]
Work = Callable[[Task, Report], Result]


@dataclass(frozen=True)
class TaskOutcome(Generic[Task, Result]):
    """The outcome of a task: a result, or the reason why there is none."""

    task: Task
    result: Result | None
    failure: str = ""


OnOutcome = Callable[[TaskOutcome[Task, Result]], None]
OnProgress = Callable[[Task, float], None]

# Errors after which a worker process continues: mistakes of the user, disk errors, and the errors that torch raises when
# memory or a device fails. Any other error ends the process; the reason is then its exit status and last line of stderr.
EXPECTED = (UserError, OSError, RuntimeError, MemoryError)


# ------------------------------------------------------------------------------------------------- local processes


def process_context(module: str) -> ForkServerContext:
    """Return a context whose processes are forks of a server that has imported torch and a module, and run nothing.

    A fork of this process could use neither its threads nor CUDA, and a spawned process would spend seconds on imports.
    The server starts with the first process; a later call does not change its imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", module])  # optimizers import _dynamo
    return context


def run_local(work: Work[Task, Result], tasks: Sequence[Task], workers: int, on_outcome: OnOutcome[Task, Result],
              on_progress: OnProgress[Task] | None = None) -> None:
    """Run all tasks in their order, in worker processes that share the cores.

    Each process runs many tasks. When a process dies (killed for lack of memory, for example), its task fails and a new
    process replaces it. All processes end when this process ends, even if it is killed.

    Args:
        work: the function to call; other processes import it by name.
        tasks: the arguments, one a call.
        workers: the maximum number of processes.
        on_outcome: called in this process when a task ends.
        on_progress: called in this process with a task and the fraction of it that is done.
    """
    waiting = deque(enumerate(tasks))
    threads = max(1, usable_cores() // workers)
    team = [_Worker(work, threads) for _ in range(min(workers, len(tasks)))]
    try:
        for worker in team:
            worker.give(waiting.popleft())
        while busy := [worker for worker in team if worker.task is not None]:
            for connection in wait([worker.connection for worker in busy]):
                worker = next(worker for worker in busy if worker.connection is connection)
                assert worker.task is not None
                index, task = worker.task
                kind, content = worker.said()
                if kind == "progress":
                    if on_progress:
                        on_progress(task, content)
                    continue
                if kind == "died":
                    team.remove(worker)
                    worker.end()
                    if waiting:
                        team.append(worker := _Worker(work, threads))
                worker.task = None
                if waiting:  # before the outcome is handled, so that no core is idle
                    worker.give(waiting.popleft())
                result, failure = (content, "") if kind == "done" else (None, content)
                on_outcome(TaskOutcome(tasks[index], result, failure))
    finally:
        for worker in team:
            worker.end()


class _Worker(Generic[Task, Result]):
    """A worker process, the pipe to it, and its current task."""

    def __init__(self, work: Work[Task, Result], threads: int) -> None:
        context = process_context(work.__module__)
        self.errors = Path(tempfile.mkstemp(prefix="worker-", suffix=".log")[1])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, threads, str(self.errors)), daemon=True)
        self.process.start()
        theirs.close()  # otherwise the pipe does not report the death of the process
        self.task: tuple[int, Task] | None = None

    def give(self, task: tuple[int, Task]) -> None:
        """Send a task; if the process is dead already, `said` reports that."""
        self.task = task
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(task[1])

    def said(self) -> tuple[str, Any]:
        """Return ("progress", fraction), ("done", result), ("failed", reason) or ("died", reason)."""
        try:
            message: tuple[str, Any] = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return "died", self._last_words()
        return message

    def end(self) -> None:
        """Kill the process; checkpoints are written atomically, so that this damages no file."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.errors.unlink(missing_ok=True)

    def _last_words(self) -> str:
        code = self.process.exitcode or 0
        if code < 0:
            name = signal.Signals(-code).name
            return f"the worker process was killed by {name}{', perhaps for lack of memory' * (name == 'SIGKILL')}"
        return f"the worker process ended with exit status {code}: {_last_line(self.errors.read_text(errors='replace'))}"


def _serve(connection: Connection, work: Work[Any, Any], threads: int, errors: str) -> None:
    """Run the tasks that arrive through the pipe until the pipe is closed: the main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which kills the workers
    os.dup2(os.open(errors, os.O_WRONLY | os.O_TRUNC), sys.stderr.fileno())
    threading.Thread(target=_follow_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = ("done", work(task, lambda share: connection.send(("progress", share))))
        except EXPECTED as error:
            answer = ("failed", _reason(error))
        connection.send(answer)


def _follow_parent() -> None:
    """End this process when its parent is killed; a busy process does not read its pipe, and would not notice."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _last_line(text: str) -> str:
    """Return the last line of a traceback, which names the error."""
    lines = text.strip().splitlines() or ["no output on stderr"]
    return "".join(character if character.isprintable() else "?" for character in lines[-1])


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"


# ------------------------------------------------------------------------------------------------------------- Ray


def run_ray(work: Work[Task, Result], tasks: Sequence[Task], address: str, on_outcome: OnOutcome[Task, Result],
            on_gpu: bool | None = False) -> None:
    """Run all tasks on a Ray cluster, each on one core or one GPU; the tasks of a lost machine go to other machines.

    The project must be at the same path on all machines, and they must share the folders that the tasks name.

    Args:
        work: as for `run_local`; its progress reports are ignored.
        tasks: the arguments, one a call.
        address: HOST:PORT of the cluster, "auto" for the cluster that this machine is in, or "local" for a cluster that
            starts on this machine and ends with this process.
        on_outcome: called in this process when a task ends.
        on_gpu: give each task a whole GPU; None: only if the cluster has GPUs.

    Raises:
        UserError: Ray is not installed, or no cluster answers at the address.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no telemetry
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # the future default of Ray; setting it avoids a warning
    check_ray()
    import ray
    check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error",
                 runtime_env={"env_vars": {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}},
                 **({"include_dashboard": False} if address == "local" else {}))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"--ray {address}: no Ray cluster there ({first_line(error)}); expected HOST:PORT of one that "
                        "`ray start --head` started, auto or local") from error
    try:
        if on_gpu is None:  # without a GPU each, all tasks of a machine would share one
            on_gpu = ray.cluster_resources().get("GPU", 0) >= 1
        remote = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0, max_retries=5)(_work_on_ray)
        pending = {remote.remote(work, task): task for task in tasks}
        while pending:
            finished, _ = ray.wait(list(pending), num_returns=1)
            for reference in finished:
                task = pending.pop(reference)
                try:
                    result, failure = ray.get(reference)
                except ray.exceptions.RayError as error:  # the process died too often, or raised an unexpected error
                    result, failure = None, f"{type(error).__name__}: {_last_line(str(error))}"
                on_outcome(TaskOutcome(task, result, failure))
    finally:
        ray.shutdown()


def check_ray() -> None:
    """Raise UserError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("--ray: the package ray is not installed; pip install ray, or go without --ray")


def check_reachable(address: str) -> None:
    """Raise UserError if nothing answers at the address; Ray itself would retry for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return  # local or auto
    try:
        with socket.create_connection((host, int(port)), timeout=10):
            pass
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"--ray {address}: no Ray cluster there ({first_line(error)}); expected HOST:PORT of one that "
                        "`ray start --head` started, auto or local") from error


def _work_on_ray(work: Work[Any, Any], task: Any) -> tuple[Any, str]:
    import torch

    torch.set_num_threads(1)
    try:
        return work(task, lambda share: None), ""
    except EXPECTED as error:
        return None, _reason(error)
