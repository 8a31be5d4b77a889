"""The evaluator's side of a reader: a submission that is read and run in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np

from compress.evaluation.channel import Channel, Clock
from compress.evaluation.facts import SubmissionFacts
from compress.evaluation.nursery import check_platform, nursery
from compress.evaluation.runtime import Runtime
from compress.evaluation.runtimes import EvaluationSettings
from metadata.errors import VerificationError
from metadata.machine import stat_fields

LOGITS_HEADER = struct.Struct("<dIIII")  # milliseconds, and the shape of the logits
SHARED_BYTES, BATCH_BYTES = 2**28, 2**33  # of one image, of a batch; only what is written takes memory
MOST_FACTS_BYTES = 2**27  # 10,000 files with long names, 100,000 classes
BUSY_MS = (0.0, 0.2, 1.0, 3.0)  # a process that waits for longer wakes up more slowly
MOST_BUSY_MS = max(BUSY_MS)
PINGS = 10  # for each of these times
STALL_S = 20.0
LEAST_SHARE = 0.05  # of what the evaluator measured: a call never counts as less, however fast the reader says it was
HINTS = {"SIGABRT": "; --memory_limit_mb may be too low, or a file crashes the library that reads it",
         "SIGSEGV": "; a file crashes the library that reads it, or --memory_limit_mb is too low",
         "SIGKILL": "; the machine may be out of memory",
         "SIGXCPU": "; its processor time is limited by --time_limit_s"}


class SubmissionReader:
    """A reader of one submission, at the other end of a channel.

    Args:
        folder: the submission.
        settings: limits on time and memory, and threads.
        clock: bounds all that the reader does.

    Attributes:
        facts: what the submission's files say, once `read` has returned.
        code: how the reader ended, as `os.waitstatus_to_exitcode` says.
    """

    facts: SubmissionFacts
    code: int | None

    def __init__(self, folder: Path, settings: EvaluationSettings, clock: Clock) -> None:
        check_platform()
        folder = Path(os.path.abspath(folder))  # the nursery may have been started in another working folder
        self.folder, self.clock = folder, clock
        self.channel = Channel(str(folder), clock, SHARED_BYTES if settings.batch_size == 1 else BATCH_BYTES,
                               most=MOST_FACTS_BYTES)
        self.nursery = nursery()
        self.process, self.code = 0, None
        try:
            self.process = self.nursery.fork(self.channel)
        except BaseException:
            self.channel.close()
            raise
        self.channel.ended, self.channel.watch = self._why, self._watch
        self.channel.tell({"folder": str(folder), "threads": settings.threads, "memory_limit_mb": settings.memory_limit_mb,
                           "cpu_limit_s": int((settings.time_limit_s + 60) * (settings.threads + 1))})
        # Its processor time when that changed last, and when that was, or when it was asked.
        self.worked, self.moment = -1, time.monotonic()

    def command(self, do: str, **message: Any) -> dict[str, Any]:
        """Send a command. Return what the reader answers. Raise as `Channel.receive` does."""
        self.moment = time.monotonic()  # it has slept until now because nobody asked
        nonce = self.channel.request(np.empty(0, np.float32))
        self.channel.tell({"do": do, **message})
        return self.channel.receive_json(nonce)

    def read(self) -> SubmissionFacts:
        """Read the submission's JSON and hash its files."""
        self.facts = SubmissionFacts.from_json(self.command("read"))
        return self.facts

    def close(self) -> None:
        """End the reader."""
        self.channel.close()
        if self.process and self.nursery.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGKILL)
            with contextlib.suppress(OSError):
                self.nursery.reap(self.process)
            self.process = 0

    def _watch(self) -> None:
        """Leave a reader that sleeps for long while it should work: a library whose memory is used up may wait for ever.

        Raises:
            VerificationError: it has slept for `STALL_S`.
        """
        with contextlib.suppress(OSError):
            state, *fields = stat_fields(self.process)
            worked, now = int(fields[10]) + int(fields[11]), time.monotonic()
            if worked != self.worked or state not in (b"S", b"T"):  # a process that waits for a disk is in another state
                self.worked, self.moment = worked, now
            elif now - self.moment > STALL_S:
                raise VerificationError(f"{self.folder}: the process that reads the submission has slept for {STALL_S:g} "
                                        "s; --memory_limit_mb may be too low, or a file stalls the library that reads it")

    def _why(self) -> str:
        """Return in words how the reader ended."""
        if self.process:
            with contextlib.suppress(OSError):  # the nursery has ended, too
                self.code = self.nursery.reap(self.process)
                self.process = self.process if self.code is None else 0
        if self.code is None:
            return "the process that reads the submission closed its channel"
        if self.code >= 0:
            return f"the process that reads the submission ended (exit code {self.code}): {self.nursery.last_words()}"
        name = signal.Signals(-self.code).name
        return f"the process that reads the submission ended (signal {-self.code}, {name}){HINTS.get(name, '')}"


class ReaderRuntime(Runtime):
    """A package or an ONNX file in a reader.

    The reader runs none of the submission's code, but a file could take it over through a fault of a library. So the
    evaluator's own clock decides: a call takes at least what that clock says, less what the way there and back took before
    the submission was opened (three times the median, because that time varies). Within these limits the reader says what
    the call took, without the way there and back.
    """

    def __init__(self, reader: SubmissionReader, backend: str) -> None:
        self.reader = reader
        self.channel_ms = self._pings(reader.facts.input_shape)
        facts = reader.command("open", backend=backend)
        super().__init__(facts["backend"], facts["parameters"], facts["macs"])
        self.details |= facts["details"]
        self.warnings += facts["warnings"]
        self.versions: dict[str, str] = facts["versions"]
        self.stated_ms = 0.0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        channel, self.reader.moment = self.reader.channel, time.monotonic()
        content = channel.receive(channel.request(images))
        if len(content) < LOGITS_HEADER.size:
            raise channel.forged()
        self.stated_ms, *sizes = LOGITS_HEADER.unpack_from(content)
        try:
            return np.frombuffer(content, np.float32, offset=LOGITS_HEADER.size).reshape([size for size in sizes if size])
        except ValueError as error:
            raise channel.forged() from error

    def duration_ms(self, measured_ms: float) -> float:
        return min(measured_ms, max(self.stated_ms, measured_ms - self.channel_ms, LEAST_SHARE * measured_ms))

    def _pings(self, shape: tuple[int, int, int]) -> float:
        """Return three times the median of the milliseconds of the way there and back, with one image."""
        times, channel = [], self.reader.channel
        for busy_ms in BUSY_MS * PINGS:
            image = np.full((1, *shape), busy_ms, np.float32)
            start = time.perf_counter_ns()
            content = channel.receive(channel.request(image))
            measured_ms = (time.perf_counter_ns() - start) / 1e6
            times.append(measured_ms - LOGITS_HEADER.unpack_from(content)[0])
        return 3 * float(np.median(times))
