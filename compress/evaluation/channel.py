"""The channel between the evaluator and a child process: two pipes and shared memory. The evaluator trusts no reply.

A request is a nonce and a shape; its numbers lie in shared memory. A reply is the same nonce, a status, a length and bytes.
The evaluator waits for a reply only as long as the child's clock allows.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import select
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from metadata.errors import UserError, VerificationError

REQUEST_HEADER, REPLY_HEADER = struct.Struct("<16sIIII"), struct.Struct("<16sBQ")
# The status of a reply: an answer, or a VerificationError, a UserError, any other error.
DONE, REFUSED, MISTAKE, BROKEN = range(4)
MAX_REPLY_BYTES = 2**24  # of foreign code
TICK_S = 0.1  # between two looks at a child that is waited for


class OutOfTimeError(VerificationError):
    """A submission has used up the time that it may take."""


class ChildEndedError(VerificationError):
    """A child process has ended instead of answering."""


class BrokenReaderError(Exception):
    """Our own code in a child process met an error that nobody foresaw. The text is its traceback."""


class Clock:
    """The time that a submission may take. The clock runs while the evaluator works for the submission or waits for it."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.counted, self.since = seconds, 0.0, -1.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside the block, once where blocks lie inside each other."""
        if self.since >= 0:
            yield
            return
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.counted, self.since = self.spent, -1.0

    @property
    def spent(self) -> float:
        """Seconds that were counted until now."""
        return self.counted + (time.monotonic() - self.since if self.since >= 0 else 0.0)

    @property
    def left(self) -> float:
        """Seconds that are left; negative when the time is over."""
        return self.seconds - self.spent


class Channel:
    """The evaluator's end of the pipes and of the shared memory.

    Args:
        where: the submission, for messages.
        clock: bounds every wait; may be replaced between two requests.
        capacity: bytes of shared memory.
        content: bytes that lie in the shared memory from the start.
        most: bytes of one reply.

    Attributes:
        child_ends: the descriptors that the child gets: requests, replies, shared memory; `start` closes the first two.
        watch: called at every tick of a wait; may raise.
        ended: called when the child has closed the channel; returns why.
    """

    def __init__(self, where: str, clock: Clock, capacity: int, content: bytes = b"", most: int = MAX_REPLY_BYTES) -> None:
        self.where, self.clock, self.most = where, clock, most
        self.watch: Callable[[], None] = lambda: None
        self.ended: Callable[[], str] = lambda: "the process ended"
        import fcntl  # not on Windows, where `load_model` works, too
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            memory = os.memfd_create("images", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            stack.callback(os.close, memory)
            os.ftruncate(memory, max(capacity, len(content), mmap.PAGESIZE))
            # A child that shrank the shared memory would kill the parent at its next write.
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self.memory = stack.enter_context(contextlib.closing(mmap.mmap(memory, 0)))
            self.memory[:len(content)] = content
            request, self._request = os.pipe()
            stack.callback(os.close, self._request)
            os.set_blocking(self._request, False)  # a large write takes what fits
            self._reply, reply = os.pipe()
            stack.callback(os.close, self._reply)
            self._writable, self._readable = select.poll(), select.poll()  # unlike select, for any descriptor
            self._writable.register(self._request, select.POLLOUT)
            self._readable.register(self._reply, select.POLLIN)
            self.child_ends = request, reply, memory
            self._stack = stack.pop_all()

    def start(self) -> None:
        """Close the child's ends of the pipes here, once the child has them: only then is its end seen."""
        for handle in self.child_ends[:2]:
            os.close(handle)

    def close(self) -> None:
        """Close this end."""
        self._stack.close()

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message: its length in 8 bytes, and JSON."""
        content = json.dumps(message).encode()
        self.write(len(content).to_bytes(8, "little") + content)

    def write(self, content: bytes | memoryview) -> None:
        """Write to the child.

        Raises:
            OutOfTimeError: the child does not read in time.
            ChildEndedError: the child has ended.
        """
        view = memoryview(content)
        try:
            with self.clock.running():
                while view:
                    self._wait(self._writable)
                    view = view[os.write(self._request, view[:2**16]):]
        except BrokenPipeError:
            raise self._ended() from None

    def request(self, inputs: np.ndarray) -> bytes:
        """Send inputs of up to four dimensions. Return the nonce that the reply must bear.

        Raises:
            VerificationError: the inputs do not fit into the shared memory; or see `write`.
        """
        if inputs.nbytes > len(self.memory):
            raise VerificationError(f"{self.where}: inputs of shape {list(inputs.shape)} are too large to send")
        if inputs.nbytes:
            self.memory[:inputs.nbytes] = np.ascontiguousarray(inputs).data.cast("B")
        nonce = secrets.token_bytes(16)
        self.write(REQUEST_HEADER.pack(nonce, *[*inputs.shape, 0, 0, 0, 0][:4]))
        return nonce

    def reply(self, nonce: bytes) -> tuple[int, bytes]:
        """Return the status and the content of the reply to a request. Raise as `receive` does for what is no reply."""
        answered, status, length = REPLY_HEADER.unpack(self._read(REPLY_HEADER.size))
        if answered != nonce or length > self.most or status > BROKEN:
            raise self.forged()
        return status, self._read(length)

    def receive(self, nonce: bytes) -> bytes:
        """Return the content of the reply to a request.

        Raises:
            VerificationError: the child refuses, forges a reply, ends, or takes too long.
            UserError: the child says so.
            BrokenReaderError: the child met an error that nobody foresaw.
        """
        status, content = self.reply(nonce)
        if status == DONE:
            return content
        text = content.decode(errors="replace")
        if status == BROKEN:
            raise BrokenReaderError(text)
        text = "".join(c if c.isprintable() else " " for c in text)
        raise UserError(text) if status == MISTAKE else VerificationError(text)

    def receive_json(self, nonce: bytes) -> dict[str, Any]:
        """Return the object that a reply holds. Raise as `receive` does, also for anything else."""
        try:
            content = json.loads(self.receive(nonce))
        except (ValueError, RecursionError) as error:
            raise self.forged() from error
        if not isinstance(content, dict):
            raise self.forged()
        return content

    def forged(self) -> VerificationError:
        """Return the error for a reply that no honest child sends."""
        return VerificationError(f"{self.where}: the code wrote into the channel")

    def _read(self, count: int) -> bytes:
        content = bytearray()
        with self.clock.running():
            while len(content) < count:
                self._wait(self._readable)
                part = os.read(self._reply, count - len(content))
                if not part:
                    raise self._ended()
                content += part
        return bytes(content)

    def _wait(self, pipe: select.poll) -> None:
        """Wait until the pipe is ready, or closed at its other end. Look at the child at every tick.

        Raises:
            OutOfTimeError: the time is over, also where a child keeps the pipe ready by a byte at a time.
        """
        while not pipe.poll(1000 * min(TICK_S, max(0.0, self.clock.left))):
            if self.clock.left <= 0:
                break
            self.watch()
        if self.clock.left <= 0:
            raise OutOfTimeError(f"{self.where}: no answer within --time_limit_s {self.clock.seconds:g}")

    def _ended(self) -> ChildEndedError:
        return ChildEndedError(f"{self.where}: {self.ended()}")
