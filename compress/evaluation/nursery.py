"""The process from which the readers of submissions are forked.

Reading a submission needs torch, whose import takes seconds. One process of the evaluator's own code imports torch once,
touches no submission, and forks a fresh reader for each one. It starts no thread, so that forking is safe. It ends when the
evaluator ends, and its readers end with it.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from compress.evaluation.channel import Channel
from compress.evaluation.extras import HOME, STANDALONE
from metadata.errors import UserError, first_line

NURSERY_FLAG = "--nursery"  # of the evaluator's own command line; users have no use for it
FORK, REAP = b"F", b"R"
START = f"""import runpy, sys
face, handle, *more = sys.argv[1:]
sys.path += [path for path in more if path not in sys.path]
sys.argv = [face, {NURSERY_FLAG!r}, handle]
runpy.run_path(face, run_name="__main__")"""
ANSWER = struct.Struct("<qi")  # a process id or 0, and what waitpid says
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
START_S = 120.0  # that the nursery may take to import torch on a slow or busy machine
REAP_S = 5.0


class Nursery:
    """The evaluator's side of a nursery, which starts at once and is waited for when its first reader is needed."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        face = Path(__file__) if STANDALONE else HOME / "model_loader.py"
        # What lies on this process's path by PYTHONPATH or in the user's own packages follows behind what -I finds.
        more = [path for path in sys.path if os.path.isabs(path)]
        self.stderr = os.memfd_create("stderr")  # of its process and its readers; mostly empty
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-W", "ignore", "-c", START, str(face), str(theirs.fileno()), *more],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.stderr,
                pass_fds=[theirs.fileno()], env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # no threads before a fork
                start_new_session=True)
        self.socket, self.lock, self.owner = ours, threading.Lock(), os.getpid()
        ours.settimeout(START_S)

    def fork(self, channel: Channel) -> int:
        """Start a reader at the other end of a channel. Return its process id, which stays reserved until `reap`."""
        try:
            with self._talking():
                socket.send_fds(self.socket, [FORK], list(channel.child_ends))
                return self._answer()[0]
        except OSError as error:
            raise UserError(f"{channel.where}: the evaluator cannot start the process that reads it: "
                            f"{self.last_words() or first_line(error)}") from error
        finally:
            channel.start()

    def reap(self, process: int) -> int | None:
        """Return how a reader ended, as `os.waitstatus_to_exitcode` says; None where it still runs after some seconds."""
        with self._talking():
            self.socket.sendall(REAP + process.to_bytes(8, "little"))
            ended, status = self._answer()
        return os.waitstatus_to_exitcode(status) if ended else None

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        """Let one order and its answer pass. A nursery that was interrupted between the two, as by Ctrl-C, is ended."""
        with self.lock:
            try:
                yield
            except BaseException:
                self.end()
                raise

    def _answer(self) -> tuple[int, int]:
        content = b""
        while len(content) < ANSWER.size:
            part = self.socket.recv(ANSWER.size - len(content))
            if not part:
                raise OSError("the process that forks readers has ended")
            content += part
        return ANSWER.unpack(content)

    def last_words(self) -> str:
        """Return the last line that the nursery or a reader wrote, such as an error."""
        end = os.fstat(self.stderr).st_size
        return os.pread(self.stderr, 2**12, max(0, end - 2**12)).decode(errors="replace").strip().rpartition("\n")[2]

    @property
    def alive(self) -> bool:
        """Whether this process started the nursery and the nursery still runs."""
        return self.owner == os.getpid() and self.process.poll() is None

    def end(self) -> None:
        """Kill the nursery and all its readers."""
        if self.owner == os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        else:
            self.process.returncode = 0  # of another process, whose child it is

    def close(self) -> None:
        """End the nursery, and give its descriptors back."""
        self.end()
        self.socket.close()
        os.close(self.stderr)


_current: list[Nursery] = []
_guard = threading.Lock()


def nursery() -> Nursery:
    """Return this process's nursery; start it if there is none."""
    with _guard:
        if not _current or not _current[0].alive:
            close_nursery()
            _current.append(Nursery())
        return _current[0]


@atexit.register
def close_nursery() -> None:
    """End this process's nursery, if there is one."""
    while _current:
        _current.pop().close()


# ------------------------------------------------------------------------------------------------ the nursery's own side


def tend(handle: int, read: Callable[[int, int, int], None]) -> int:
    """Fork readers until the evaluator ends. Return the exit code.

    Args:
        handle: the descriptor of the nursery's end of the socket.
        read: what a reader does, given the descriptors of requests, replies and shared memory.
    """
    import torch  # noqa: F401 - the readers need torch
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where the evaluator's own program ignores it, nobody learns of an end
    with socket.socket(fileno=handle) as parent:
        while True:
            order, handles = _receive(parent)
            if order == FORK:
                process = os.fork()
                if process == 0:
                    _become_reader(parent, handles, read)
                for each in handles:
                    os.close(each)
                parent.sendall(ANSWER.pack(process, 0))
            elif order[:1] == REAP:
                parent.sendall(ANSWER.pack(*_reap(int.from_bytes(order[1:], "little"))))
            else:
                break
    os.killpg(0, signal.SIGKILL)  # the readers and this process
    return 1


def _receive(parent: socket.socket) -> tuple[bytes, list[int]]:
    """Return the next order and the descriptors that came with it; an empty order where the evaluator has ended."""
    space = socket.CMSG_SPACE(3 * array.array("i").itemsize)
    order, ancillary, _, _ = parent.recvmsg(9, space)
    handles = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            handles.frombytes(data[:len(data) - len(data) % handles.itemsize])
    return order, handles.tolist()


def _become_reader(parent: socket.socket, handles: list[int], read: Callable[[int, int, int], None]) -> None:
    """Answer the evaluator, and end. This function does not return: the nursery's loop is not the reader's."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        parent.close()
        read(*handles)
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _reap(process: int) -> tuple[int, int]:
    """Return a reader's process id and how it ended; zeros where it does not end within some seconds."""
    until = time.monotonic() + REAP_S
    while time.monotonic() < until:
        try:
            ended, status = os.waitpid(process, os.WNOHANG)
        except ChildProcessError:  # reaped before
            break
        if ended:
            return ended, status
        time.sleep(0.002)
    return 0, 0


def check_platform() -> None:
    """Raise UserError where readers cannot be forked and watched."""
    if not hasattr(os, "memfd_create"):
        raise UserError(f"the evaluator runs each submission in a Linux process of its own; this is {sys.platform}")
    if not Path("/proc/self/statm").exists():
        raise UserError("the evaluator needs /proc, to limit and watch the process of a submission; mount it: mount -t "
                        "proc proc /proc")
