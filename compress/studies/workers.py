"""Many independent pieces of work at once: by processes of this machine, or by a Ray cluster.

A piece that fails, or whose process dies, is an outcome like any other; the rest goes on. What the work is, is the
caller's: a function at the top level of a module, of a task and a way to report progress.
"""

from __future__ import annotations

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
from pathlib import Path
from typing import Any, Generic, TypeVar

from metadata.errors import UserError, first_line
from metadata.machine import usable_cores

PROJECT = Path(__file__).parents[2]

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[[float], None]  # is told what share of the task is done
Work = Callable[[Task, Report], Result]


@dataclass(frozen=True)
class TaskOutcome(Generic[Task, Result]):
    """What came of a task: a result, or the reason why there is none."""

    task: Task
    result: Result | None
    failure: str = ""


OnOutcome = Callable[[TaskOutcome[Task, Result]], None]
OnProgress = Callable[[Task, float], None]

# What a piece of work may fail with and leave its process sound: the user's mistakes, disks, and what torch raises where
# memory or a device gives out. Anything else ends the process, and its exit status and last words are the reason.
EXPECTED = (UserError, OSError, RuntimeError, MemoryError)


# ------------------------------------------------------------------------------------------------- local processes


def run_local(work: Work[Task, Result], tasks: Sequence[Task], workers: int, on_outcome: OnOutcome[Task, Result],
              on_progress: OnProgress[Task] | None = None) -> None:
    """Works on all tasks, in their order, with so many processes that share the cores.

    Each process imports torch once and does many tasks. One that dies (killed for want of memory, say) fails its task and
    is replaced. All of them end when this process ends, however it does.

    Args:
        work: a function that another process can import by name.
        tasks: what it is called with.
        workers: how many processes at most.
        on_outcome: is called here as tasks end.
        on_progress: is called here now and then.
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
                if waiting:  # first, so that the cores have something to do
                    worker.give(waiting.popleft())
                result, failure = (content, "") if kind == "done" else (None, content)
                on_outcome(TaskOutcome(tasks[index], result, failure))
    finally:
        for worker in team:
            worker.end()


class _Worker(Generic[Task, Result]):
    """A process, the pipe to it, and what it works on."""

    def __init__(self, work: Work[Task, Result], threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # a forked torch cannot use its threads, nor CUDA
        self.errors = Path(tempfile.mkstemp(prefix="worker-", suffix=".log")[1])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, threads, str(self.errors)), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is seen when the process dies
        self.task: tuple[int, Task] | None = None

    def give(self, task: tuple[int, Task]) -> None:
        """Sends a task; a process that is dead already is noticed when it is listened to."""
        self.task = task
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(task[1])

    def said(self) -> tuple[str, Any]:
        """("progress", share), ("done", result), ("failed", reason) or ("died", reason)."""
        try:
            message: tuple[str, Any] = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return "died", self._last_words()
        return message

    def end(self) -> None:
        """Ends the process at once; checkpoints are written so that this harms nothing."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.errors.unlink(missing_ok=True)

    def _last_words(self) -> str:
        code = self.process.exitcode or 0
        if code < 0:
            name = signal.Signals(-code).name
            return f"the worker process was killed by {name}{', perhaps for want of memory' * (name == 'SIGKILL')}"
        return f"the worker process ended with exit status {code}: {_last_line(self.errors.read_text(errors='replace'))}"


def _serve(connection: Connection, work: Work[Any, Any], threads: int, errors: str) -> None:
    """A worker process: does what comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the workers
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
    """Ends this process when its parent is killed, which closes no pipe that a busy process would look at."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _last_line(text: str) -> str:
    """Of a traceback, what was raised."""
    lines = text.strip().splitlines()
    return "".join(character if character.isprintable() else "?" for character in lines[-1]) if lines else "no words"


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"


# ------------------------------------------------------------------------------------------------------------- Ray


def run_ray(work: Work[Task, Result], tasks: Sequence[Task], address: str, on_outcome: OnOutcome[Task, Result],
            on_gpu: bool | None = False) -> None:
    """Works on all tasks on a Ray cluster, a core (or a GPU) each; those of a machine that is lost go to others.

    The project must be at the same path on all machines, and folders named in tasks must be shared by them.

    Args:
        work: as for `run_local`; nothing comes of its reports.
        tasks: what it is called with.
        address: HOST:PORT of the cluster, "auto" for one that this machine is in, or "local" for one that starts on this
            machine and ends with this process.
        on_outcome: is called here as tasks end.
        on_gpu: a task takes a whole GPU; None: if the cluster has any.

    Raises:
        UserError: Ray is not installed, or there is no cluster.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no telemetry
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # what Ray will do by default, and spares a warning
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray: the package ray is not installed; pip install ray, or use --workers N") from error
    _check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error",
                 runtime_env={"env_vars": {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}},
                 **({"include_dashboard": False} if address == "local" else {}))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"--ray {address}: no Ray cluster there ({first_line(error)}); expected HOST:PORT of one that "
                        "`ray start --head` started, auto or local") from error
    try:
        if on_gpu is None:  # else tasks on a machine with a GPU would all crowd on it
            on_gpu = ray.cluster_resources().get("GPU", 0) >= 1
        remote = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0, max_retries=5)(_work_on_ray)
        pending = {remote.remote(work, task): task for task in tasks}
        while pending:
            finished, _ = ray.wait(list(pending), num_returns=1)
            for reference in finished:
                task = pending.pop(reference)
                try:
                    result, failure = ray.get(reference)
                except ray.exceptions.RayError as error:  # the process died too often, or something unforeseen was raised
                    result, failure = None, f"{type(error).__name__}: {_last_line(str(error))}"
                on_outcome(TaskOutcome(task, result, failure))
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes where nothing answers."""
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
