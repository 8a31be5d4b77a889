"""Run foreign code in a confined process, and trust nothing that the process says about itself.

The parent keeps the labels, sends images, receives logits, and measures with its own clock. Two walls stand around the
child (child.py). Outside is bubblewrap (walls.py): namespaces of its own, and a view of the disk that holds the interpreter
and a list of packages (distributions.py), and one folder for writing (scratch.py). Inside, the child gives up its rights
(confine.py, system_calls.py). Its memory, time, files and threads are limited, and its environment is empty.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.evaluation.channel import DONE, Channel, ChildEndedError, Clock
from compress.evaluation.distributions import PROCESSES, reach
from compress.evaluation.runtimes import EvaluationSettings
from compress.evaluation.scratch import make_scratch, thread_count, user_threads
from compress.evaluation.walls import (
    UNHIDDEN,
    bubblewrap_fault,
    check_walls,
    inner_process,
    packed_arguments,
    wall_arguments,
)
from metadata.errors import UserError, VerificationError, first_line
from metadata.machine import stat_fields, status_mb

PINGS = 20
MAX_THREADS = 512
LOOK_S = 0.1  # between two looks at the child's threads
START_S = 60.0
HERE = Path(__file__).parent
# Files on the child's side.
INSIDE = ("child", "confine", "system_calls", "faults", "panel", "offline", "trainee", "inventory")


def check_hidden(data_dir: Path) -> None:
    """Check that foreign code cannot read the test data.

    Raises:
        UserError: the data lie under a path that the code may read.
    """
    above = reach().covers(data_dir.resolve())
    if above:
        raise UserError(f"--data_dir {data_dir}: lies under {above}, which the code may read; move the data elsewhere")


class Child:
    """A confined process that runs one submission or solution.

    Args:
        boot: what to run, see child.py; limits, folders and a nonce are added here.
        files: name in the scratch folder -> file whose bytes the child gets there.
        settings: limits on time and memory, and whether bubblewrap may be missing.
        threads: cores that the child may use.
        where: for messages.
        capacity: bytes of shared memory.
        content: bytes that lie in shared memory when the child starts.

    Attributes:
        protection: each wall and limit -> "on ..." or "off: why".
        channel_ms: median milliseconds of a request that is answered with nothing.

    Raises:
        UserError: bubblewrap is missing or does not work, and the settings do not allow for that; or the child does not
            start.
        VerificationError: a file changes while it is read.
    """

    def __init__(self, boot: dict[str, Any], files: dict[str, Path], settings: EvaluationSettings, threads: int, where: str,
                 capacity: int, content: bytes = b"") -> None:
        if not hasattr(os, "memfd_create"):
            raise UserError(f"{where}: foreign code runs in a Linux sandbox; this is {sys.platform}")
        self.where, self.walled = where, check_walls(settings.weak_sandbox, where)
        self.process: subprocess.Popen[bytes] | None = None
        self.pid, self.looked, self.searched = 0, 0.0, 0.0  # the child's id; when its threads and its folder were looked at
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            sizes = {name: path.stat().st_size for name, path in sorted(files.items())}
            self.scratch = make_scratch(self.walled, [*sizes.values()])
            stack.callback(self.scratch.close)
            self.channel = Channel(where, Clock(max(START_S, settings.time_limit_s)), capacity, content)
            stack.callback(self.channel.close)
            self.channel.watch, self.channel.ended = self._watch, self._why_ended
            self.output = os.memfd_create("output", os.MFD_CLOEXEC)
            stack.callback(os.close, self.output)
            self._start(threads, stack)
            nonce, packages = secrets.token_bytes(16), reach()
            readable = [*packages.rules(), *((path, True) for path in PROCESSES)]
            message = boot | {
                "folder": f"{self.scratch.inside}/folder", "files": list(sizes.items()), "nonce": nonce.hex(),
                "threads": threads, "cores": sorted(os.sched_getaffinity(0))[-threads:], "pings": PINGS,
                "memory_limit_mb": settings.memory_limit_mb, "thread_limit": user_threads() + MAX_THREADS,
                "cpu_limit_s": int((settings.time_limit_s + 60) * (threads + 1)),
                "readable": readable, "writable": [self.scratch.inside],
                "packages": {"search": packages.search, "names": packages.names, "distributions": packages.distributions}}
            inside = self._hand_over(message, files, sizes, nonce)  # foreign code runs only after this
            outside = f"on{self.scratch.state}" if self.walled else f"off: {bubblewrap_fault()}; {UNHIDDEN}"
            self.protection = {"bubblewrap": outside, **inside,
                               "memory": f"on ({settings.memory_limit_mb} MB)", "threads": f"on ({MAX_THREADS})"}
            self._find_child()
            self.scratch.begin(self.pid)
            self.channel_ms = self._round_trip(boot.get("input_shape", [0]))
            self.channel.clock = Clock(settings.time_limit_s)
            self._stack = stack.pop_all()

    def _start(self, threads: int, stack: contextlib.ExitStack) -> None:
        """Start the child, inside bubblewrap where that is the wall."""
        ends = self.channel.child_ends
        command = [sys.executable, "-I", "-B", "-W", "ignore", str(HERE / "child.py"), *map(str, ends)]
        handles, folder = [*ends], self.scratch.inside
        self._told = -1
        if self.walled:
            walls = wall_arguments(reach(), (HERE / f"{name}.py" for name in INSIDE), self.scratch.mount())
            arguments = packed_arguments(walls)
            stack.callback(os.close, arguments)
            self._told, telling = os.pipe()
            stack.callback(os.close, self._told)
            command = [str(shutil.which("bwrap")), "--args", str(arguments), "--info-fd", str(telling), "--", *command]
            handles, folder = [*ends, arguments, telling], "/"
        environment = {"HOME": self.scratch.inside, "TMPDIR": self.scratch.inside, "OPENBLAS_NUM_THREADS": "1",
                       "OMP_NUM_THREADS": str(threads), "LANG": "C.UTF-8", "USER": "nobody",
                       # Code for torch before 2.6 calls torch.load(path) for whole modules. It runs here anyway.
                       "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output,
                                            cwd=folder, env=environment, pass_fds=handles, start_new_session=True,
                                            restore_signals=True)
        finally:
            self.channel.start()
            if self.walled:
                os.close(telling)
        self.pid = 0 if self.walled else self.process.pid
        stack.callback(self._kill)

    def _hand_over(self, message: dict[str, Any], files: dict[str, Path], sizes: dict[str, int],
                   nonce: bytes) -> dict[str, str]:
        """Send what to run, and the files. Return what the child says of the inner wall.

        A child that ends before that has run nothing of the submission: the sandbox itself does not start.
        """
        try:
            self.channel.tell(message)
            for name, size in sizes.items():
                self._send(files[name], size, name)
            return json.loads(self._receive(nonce))  # type: ignore[no-any-return]
        except ChildEndedError as error:
            said = [line for line in os.pread(self.output, 2**16, 0).decode(errors="replace").splitlines() if line.strip()]
            raise UserError(f"the sandbox does not start: {said[-1][:300] if said else first_line(error)}") from error

    def _find_child(self) -> None:
        """Learn the child's own process id: signals and figures are not to be bubblewrap's."""
        assert self.process
        if self.walled:
            self.reaper, child = inner_process(os.read(self._told, 4096)) or (0, 0)
            if not child:
                raise VerificationError(f"{self.where}: bubblewrap's child has ended")
            self.pid = child

    def _send(self, path: Path, size: int, name: str) -> None:
        """Send a file's bytes: as many as were announced."""
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in its place must not block
        try:
            plain = stat.S_ISREG(os.fstat(handle).st_mode)
            while size:
                part = os.read(handle, min(size, 2**20)) if plain else b""
                if not part:
                    raise VerificationError(f"{self.where}: {name} changed while it was read")
                self.channel.write(part)
                size -= len(part)
        finally:
            os.close(handle)

    def facts(self) -> dict[str, Any]:
        """Return what the child says of its model once that is built, and the seconds until then.

        Raises:
            VerificationError: the code fails, ends its process, or takes too long.
        """
        self._signal(signal.SIGCONT)
        content = self._receive(self.channel.request(np.zeros(0, np.float32)))
        try:
            facts = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self.forged() from error
        if not isinstance(facts, dict):
            raise self.forged()
        self._signal(signal.SIGSTOP)
        return facts | {"seconds": self.channel.clock.spent}

    def left_in_memory(self, count: int) -> bytes:
        """Return a copy of the first bytes of the shared memory. Raise VerificationError for more bytes than there are."""
        if count > len(self.channel.memory):
            raise self.forged()
        return self.channel.memory[:count]

    def ask(self, inputs: np.ndarray) -> np.ndarray:
        """Return flat logits for float32 inputs.

        Raises:
            VerificationError: see `facts`.
        """
        self._signal(signal.SIGCONT)  # the child runs only while it is asked: no work ahead, no load beside others
        content = self._receive(self.channel.request(inputs))
        self._signal(signal.SIGSTOP)
        if len(content) % 4:
            raise self.forged()
        self._watch()
        return np.frombuffer(content, np.float32)

    def _round_trip(self, shape: Sequence[int]) -> float:
        """Return the median milliseconds of sending one input and receiving nothing."""
        times, input = [], np.zeros((1, *shape), np.float32)
        for _ in range(PINGS):
            start = time.perf_counter_ns()
            self.ask(input)
            times.append((time.perf_counter_ns() - start) / 1e6)
        return float(np.median(times))

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def unprotected(self) -> list[str]:
        """Return a warning for each protection that the system did not offer."""
        return [f"sandbox: {what} {state}" for what, state in self.protection.items() if not state.startswith("on")]

    def forged(self) -> VerificationError:
        """Return the error for a reply that no honest child sends."""
        return self.channel.forged()

    def printed_bytes(self) -> int:
        """Return the bytes that the code wrote to its standard output and error, which nobody reads."""
        return os.fstat(self.output).st_size

    def usage(self) -> dict[str, float | None]:
        """Return processor seconds, the parent's waiting seconds and peak memory, by the kernel's account."""
        waited = self.channel.clock.spent
        with contextlib.suppress(OSError):
            fields = stat_fields(self.pid)
            cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            return {"cpu_s": cpu, "waited_s": waited, "peak_mb": status_mb(self.pid, "VmHWM")}
        return {"cpu_s": None, "waited_s": waited, "peak_mb": None}

    def close(self) -> None:
        """Kill the process; its folder goes with it."""
        self._stack.close()

    def _kill(self) -> None:
        """End the child and all that it started. With bubblewrap, its process namespace ends with its first process."""
        if self.process:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                if self.process.poll() is None and self.walled and self.pid:
                    os.kill(self.reaper, signal.SIGKILL)
                    self.process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _receive(self, nonce: bytes) -> bytes:
        status, content = self.channel.reply(nonce)
        if status != DONE:
            text = "".join(c if c.isprintable() else " " for c in content.decode(errors="replace"))
            raise VerificationError(f"{self.where}: the code failed: {text[:500]}")
        return content

    def _watch(self) -> None:
        """Look at the child's threads ten times a second, and at its folder once a second.

        Raises:
            VerificationError: more threads, bytes or files than the code may have.
        """
        now = time.monotonic()
        if not self.pid or now - self.looked < LOOK_S:
            return
        self.looked = now
        if (thread_count(self.pid) or 0) > MAX_THREADS:
            raise VerificationError(f"{self.where}: the code started more than {MAX_THREADS} threads")
        if now - self.searched > 1:
            self.searched = now
            if excess := self.scratch.excess(self.pid):
                raise VerificationError(f"{self.where}: the code {excess}")

    def _why_ended(self) -> str:
        """Return why the child has closed the channel."""
        assert self.process
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        code = self.process.returncode
        if code is not None and self.walled and code > 128:
            code = 128 - code  # as bubblewrap passes a signal on
        why = "channel closed" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        hint = ("; --memory_limit_mb may be too low" if code in (-6, -9, -11) else
                "; its processor time is limited by --time_limit_s" if code == -24 else "")
        return f"the code ended its process ({why}) instead of answering{hint}"
