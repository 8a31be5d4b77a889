"""Run foreign code in a confined process, and trust nothing that the process says about itself.

The parent keeps the labels, sends images, receives logits, and measures with its own clock. The child (child.py) has no
network and no other processes. It reads only the interpreter's libraries and a copy of the submission (confine.py). Its
memory and time are limited, its environment is empty, and its working folder is temporary.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import secrets
import select
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.evaluation.child import REPLY, REQUEST
from compress.evaluation.runtimes import EvaluationSettings
from metadata.errors import UserError, VerificationError
from metadata.machine import status_mb

MAX_REPLY_BYTES = 2**24
MAX_SCRATCH_BYTES = 2**28
MAX_SCRATCH_ENTRIES = 10_000
PINGS = 20
# Paths that an interpreter and its libraries read. The data, the project and home folders are not among them.
SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/proc/cpuinfo", "/proc/meminfo",
          "/sys/devices/system", "/dev/null", "/dev/urandom")


def readable_paths() -> list[str]:
    """Return the paths that the child may read besides its own folder."""
    libraries = [sys.prefix, sys.base_prefix, *site.getsitepackages(), *(path for path in sys.path if "-packages" in path)]
    return sorted({str(Path(path).resolve()) for path in (*libraries, *SYSTEM)})


def remove(folder: Path) -> None:
    """Delete a folder that foreign code has filled, of any depth; Python's own function is recursive."""
    subprocess.run(["rm", "-rf", "--", str(folder)], stderr=subprocess.DEVNULL, check=False)


def check_hidden(data_dir: Path) -> None:
    """Check that foreign code cannot read the test data.

    Raises:
        UserError: the data lie under a path that the code may read.
    """
    data = data_dir.resolve()
    for path in readable_paths():
        if data.is_relative_to(path):
            raise UserError(f"--data_dir {data_dir}: lies under {path}, which the code may read; move the data elsewhere")


class Child:
    """A confined process that runs one submission or solution.

    Args:
        boot: what to run, see child.py; limits, folders and a nonce are added here.
        files: name in the scratch folder -> file to copy there.
        settings: limits on time and memory.
        threads: cores that the child may use.
        where: for messages.
        capacity: bytes of shared memory.
        content: bytes that lie in shared memory when the child starts.
    """

    def __init__(self, boot: dict[str, Any], files: dict[str, Path], settings: EvaluationSettings, threads: int, where: str,
                 capacity: int, content: bytes = b"") -> None:
        if not hasattr(os, "memfd_create"):
            raise UserError(f"{where}: foreign code runs in a Linux sandbox; this is {sys.platform}")
        self.where, self.deadline = where, time.monotonic() + max(60.0, settings.time_limit_s)  # for the start
        self.time_limit_s, self.waited, self.looked = settings.time_limit_s, 0.0, time.monotonic()
        self.process: subprocess.Popen[bytes] | None = None
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.scratch = Path(tempfile.mkdtemp(prefix="sandbox-"))
            stack.callback(remove, self.scratch)
            folder = self.scratch / "folder"
            folder.mkdir()
            for name, path in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)
            self.copied = folder_size(self.scratch)
            handle = os.memfd_create("images", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            stack.callback(os.close, handle)
            os.ftruncate(handle, max(capacity, len(content), mmap.PAGESIZE))
            # A child that shrank the shared memory would kill the parent at its next write.
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self.memory = stack.enter_context(contextlib.closing(mmap.mmap(handle, 0)))
            self.memory[:len(content)] = content
            request_end, self._request = os.pipe()
            self._reply, reply_end = os.pipe()
            stack.callback(os.close, self._request)
            stack.callback(os.close, self._reply)
            cores = sorted(os.sched_getaffinity(0))[-threads:]
            self.nonce = secrets.token_bytes(16)
            boot = boot | {"folder": str(folder), "nonce": self.nonce.hex(), "threads": threads, "cores": cores,
                           "memory_limit_mb": settings.memory_limit_mb, "readable": readable_paths(),
                           "writable": [str(self.scratch)], "pings": PINGS,
                           "cpu_limit_s": int((settings.time_limit_s + 60) * (threads + 1))}
            self.output = self.scratch.with_name(self.scratch.name + ".txt")
            stack.callback(self.output.unlink, missing_ok=True)
            environment = {"HOME": str(self.scratch), "TMPDIR": str(self.scratch), "OPENBLAS_NUM_THREADS": "1",
                           "OMP_NUM_THREADS": str(threads), "LANG": "C.UTF-8",
                           # Code for torch before 2.6 calls torch.load(path) for whole modules. It runs here anyway.
                           "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
            try:
                with self.output.open("wb") as output:
                    self.process = subprocess.Popen(
                        [sys.executable, "-I", "-B", "-W", "ignore", str(Path(__file__).with_name("child.py")),
                         str(request_end), str(reply_end), str(handle)], stdin=subprocess.DEVNULL, stdout=output,
                        stderr=output, cwd=self.scratch, env=environment, pass_fds=(request_end, reply_end, handle),
                        start_new_session=True, restore_signals=True)
            finally:
                os.close(request_end)
                os.close(reply_end)
            stack.callback(self._kill)
            message = json.dumps(boot).encode()
            self._write(len(message).to_bytes(8, "little") + message)
            self.protection: dict[str, str] = json.loads(self._receive(self.nonce))  # foreign code runs only after this
            self.channel_ms = self._round_trip(boot.get("input_shape", [0]))
            self.waited, self.deadline = 0.0, time.monotonic() + settings.time_limit_s
            self._stack = stack.pop_all()

    def facts(self) -> dict[str, Any]:
        """Return what the child says of its model once that is built, and the seconds until then.

        Raises:
            VerificationError: the code fails, ends its process, or takes too long.
        """
        self._signal(signal.SIGCONT)
        content = self._receive(self.nonce)
        try:
            facts = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self.forged() from error
        if not isinstance(facts, dict):
            raise self.forged()
        self._signal(signal.SIGSTOP)
        return facts | {"seconds": self.waited}

    def ask(self, inputs: np.ndarray) -> np.ndarray:
        """Return flat logits for float32 inputs.

        Raises:
            VerificationError: see `facts`.
        """
        nonce = secrets.token_bytes(16)
        self._signal(signal.SIGCONT)  # the child runs only while it is asked: no work ahead, no load beside others
        if inputs.nbytes > len(self.memory):
            raise VerificationError(f"{self.where}: inputs of shape {list(inputs.shape)} are too large to send")
        if inputs.nbytes:
            self.memory[:inputs.nbytes] = np.ascontiguousarray(inputs).data.cast("B")
        shape = [*inputs.shape, 0, 0, 0, 0][:4]
        self._write(REQUEST.pack(nonce, *shape))
        content = self._receive(nonce)
        self._signal(signal.SIGSTOP)
        if len(content) % 4:
            raise self.forged()
        return np.frombuffer(content, np.float32)

    def _round_trip(self, shape: Sequence[int]) -> float:
        """Return the median milliseconds of sending one input and receiving nothing."""
        times, input = [], np.zeros((1, *shape), np.float32)
        for _ in range(PINGS):
            start = time.perf_counter_ns()
            self.ask(input)
            times.append((time.perf_counter_ns() - start) / 1e6)
        return float(np.median(times))

    def empty_scratch(self) -> None:
        """Remove the temporary files, which could hold numbers outside the model."""
        for path in self.scratch.iterdir():
            remove(path)
        self.copied = (0, 0)

    def _signal(self, number: int) -> None:
        assert self.process
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def unprotected(self) -> list[str]:
        """Return a warning for each protection that the system did not offer."""
        return [f"sandbox: {what} {state}" for what, state in self.protection.items() if not state.startswith("on")]

    def forged(self) -> VerificationError:
        """Return the error for a reply that no honest child sends."""
        return VerificationError(f"{self.where}: the code wrote into the channel")

    def printed_bytes(self) -> int:
        """Return the bytes that the code wrote to its standard output and error, which nobody reads."""
        return self.output.stat().st_size

    def usage(self) -> dict[str, float | None]:
        """Return processor seconds, the parent's waiting seconds and peak memory, by the kernel's account."""
        assert self.process
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            return {"cpu_s": cpu, "waited_s": self.waited, "peak_mb": status_mb(self.process.pid, "VmHWM")}
        return {"cpu_s": None, "waited_s": self.waited, "peak_mb": None}

    def close(self) -> None:
        """Kill the process and remove its folder."""
        self._stack.close()

    def _kill(self) -> None:
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
            self.process.wait()

    def _write(self, content: bytes) -> None:
        try:
            while content:
                self._wait(self._request, writing=True)
                content = content[os.write(self._request, content[:select.PIPE_BUF]):]
        except BrokenPipeError:
            raise self._ended() from None

    def _receive(self, nonce: bytes) -> bytes:
        start = time.monotonic()
        answered, status, length = REPLY.unpack(self._read(REPLY.size))
        if answered != nonce or length > MAX_REPLY_BYTES:
            raise self.forged()
        content = self._read(length)
        self.waited += time.monotonic() - start
        if status:
            text = "".join(c if c.isprintable() else " " for c in content.decode(errors="replace"))
            raise VerificationError(f"{self.where}: the code failed: {text[:500]}")
        return content

    def _read(self, count: int) -> bytes:
        content = b""
        while len(content) < count:
            self._wait(self._reply)
            part = os.read(self._reply, count - len(content))
            if not part:
                raise self._ended()
            content += part
        return content

    def _wait(self, handle: int, writing: bool = False) -> None:
        """Wait until the pipe is ready. Check the deadline, and once a second the size of the scratch folder."""
        read, write = ([], [handle]) if writing else ([handle], [])
        while True:
            now = time.monotonic()
            if now > self.deadline:
                raise VerificationError(f"{self.where}: the code did not answer within --time_limit_s "
                                        f"{self.time_limit_s:g}")
            if now - self.looked > 1:
                self.looked = now
                self._check_scratch()
            if any(select.select(read, write, [], min(1.0, max(0.0, self.deadline - now)))):
                return

    def _check_scratch(self) -> None:
        """Check what lies in the scratch folder beyond the copy of the submission, which may be of any size.

        Raises:
            VerificationError: more bytes or more entries than the code may write.
        """
        size, entries = folder_size(self.scratch, self.copied[1] + MAX_SCRATCH_ENTRIES)
        if size - self.copied[0] > MAX_SCRATCH_BYTES:
            raise VerificationError(f"{self.where}: the code wrote more than {MAX_SCRATCH_BYTES:,} bytes to its folder")
        if entries - self.copied[1] > MAX_SCRATCH_ENTRIES:
            raise VerificationError(f"{self.where}: the code made more than {MAX_SCRATCH_ENTRIES:,} files in its folder")

    def _ended(self) -> VerificationError:
        assert self.process
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        code = self.process.returncode
        why = "channel closed" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        hint = ("; --memory_limit_mb may be too low" if code in (-6, -9, -11) else
                "; its processor time is limited by --time_limit_s" if code == -24 else "")
        return VerificationError(f"{self.where}: the code ended its process ({why}) instead of answering{hint}")


def folder_size(folder: Path, most: int = 2**62) -> tuple[int, int]:
    """Return the bytes and the entries below a folder that is being written to. Vanished files count as 0 bytes.

    Args:
        folder: where to count.
        most: stop at more entries than this.
    """
    total, waiting, entries = 0, [str(folder)], 0
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as found:
            for entry in found:
                entries += 1
                with contextlib.suppress(OSError):
                    total += entry.stat(follow_symlinks=False).st_size
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                if entries > most:
                    return total, entries
    return total, entries
