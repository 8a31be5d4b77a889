"""A reader: a process that reads one submission as data, checks it, runs its model, and answers the evaluator.

Packages and ONNX files are read and run here. Of a submission that is code, the files are read here as data; the code runs
in the sandbox. A reader has limits on its memory and its processor time. It sees no test image before it is asked for it,
and no label.
"""

from __future__ import annotations

import json
import mmap
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from compress.evaluation.channel import BROKEN, DONE, MISTAKE, REFUSED, REPLY_HEADER, REQUEST_HEADER
from compress.evaluation.extras import toolkit
from compress.evaluation.facts import facts_of
from compress.evaluation.reader_runtime import LOGITS_HEADER, MOST_BUSY_MS
from compress.evaluation.runtime import Runtime
from compress.evaluation.runtimes import open_here, preferred_backend
from compress.evaluation.submission import read_submission
from compress.evaluation.submission_files import SubmissionFiles
from compress.evaluation.survey import survey_folder
from metadata.errors import UserError, VerificationError, first_line
from metadata.machine import PeakMemory, torch_threads, versions


def answer_evaluator(request: int, reply: int, memory: int) -> None:
    """Answer the evaluator until it closes the channel. The three arguments are descriptors."""
    with mmap.mmap(memory, 0) as shared:
        Reader(request, reply, shared).serve()


class Reader:
    """The reader's end of a channel."""

    def __init__(self, request: int, reply: int, shared: mmap.mmap) -> None:
        self.request, self.reply, self.shared = request, reply, shared
        self.files: SubmissionFiles | None = None
        self.runtime: Runtime | None = None
        self.commands: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "read": self.read, "open": self.open, "hash": self.hash, "close": self.close}

    def serve(self) -> None:
        """Answer until the evaluator closes the channel."""
        boot = self._message()
        set_limits_here(boot["memory_limit_mb"], boot["cpu_limit_s"])
        self.memory_limit_mb, self.peak = boot["memory_limit_mb"], PeakMemory()
        self.threads = torch_threads(boot["threads"])
        self.boot = boot
        with self.threads:
            while True:
                nonce, *sizes = REQUEST_HEADER.unpack(self._exactly(REQUEST_HEADER.size))
                self._answer(nonce, [size for size in sizes if size])

    def _answer(self, nonce: bytes, shape: list[int]) -> None:
        """Reply with logits for a shape, or to a command for none; or with why that fails."""
        try:
            status, content = DONE, self._logits(shape) if shape else self._command()
        except VerificationError as error:
            status, content = REFUSED, first_line(error).encode(errors="replace")
        except UserError as error:
            status, content = MISTAKE, first_line(error).encode(errors="replace")
        except OSError as error:
            status, content = REFUSED, first_line(error).encode(errors="replace")
        except Exception as error:  # the edge of a process: the evaluator reports what nobody foresaw
            if out_of_memory(error):
                text = f"the submission needs more than --memory_limit_mb {self.memory_limit_mb}"
                status, content = REFUSED, text.encode()
            else:
                status, content = BROKEN, traceback.format_exc().encode(errors="replace")
        _write_all(self.reply, REPLY_HEADER.pack(nonce, status, len(content)) + content)

    def _command(self) -> bytes:
        message = self._message()
        return json.dumps(self.commands[message["do"]](message)).encode()

    def read(self, message: dict[str, Any]) -> dict[str, Any]:
        """Read the submission's names, sizes and JSON; hash its files. Return the facts."""
        self.files = read_submission(self.boot["folder"])
        return facts_of(self.files, preferred_backend(self.files)).to_json()

    def open(self, message: dict[str, Any]) -> dict[str, Any]:
        """Open the model of a package or an ONNX file, or look at the weights of code as data. Return what is known."""
        assert self.files
        if self.files.kind == "code":
            remarks, stored = toolkit("--allow_code", "stored_weights").check_stored(self.files)
            return {"remarks": remarks, "stored": stored, "versions": versions()}
        self.runtime = runtime = open_here(self.files, message["backend"], self.boot["threads"])
        runtime.name = str(self.files.folder)
        return {"backend": runtime.backend, "parameters": runtime.parameters, "macs": runtime.macs,
                "details": runtime.details, "warnings": runtime.warnings, "versions": versions()}

    def _logits(self, shape: list[int]) -> bytes:
        """Return the logits of images that lie in shared memory, behind the milliseconds of the call and their shape."""
        images = np.frombuffer(self.shared, np.float32, int(np.prod(shape))).reshape(shape)
        start = time.perf_counter_ns()
        if self.runtime is None:  # a ping, to be busy for as many milliseconds as its first number says
            while time.perf_counter_ns() - start < 1e6 * min(float(images.flat[0]), MOST_BUSY_MS):
                pass
            return LOGITS_HEADER.pack((time.perf_counter_ns() - start) / 1e6, 0, 0, 0, 0)
        try:
            logits = self.runtime(images)
        except self.runtime.errors as error:
            if out_of_memory(error):
                raise
            raise VerificationError(f"{self.runtime.name} cannot answer images of shape {shape}: "
                                    f"{first_line(error)}") from error
        took = (time.perf_counter_ns() - start) / 1e6
        if not isinstance(logits, np.ndarray) or logits.ndim > 4 or logits.dtype.kind != "f":
            got = f"{logits.ndim} dimensions" if isinstance(logits, np.ndarray) else type(logits).__name__
            raise VerificationError(f"{self.runtime.name}: the output is {got}, expected float logits (N, classes)")
        header = LOGITS_HEADER.pack(took, *[*logits.shape, 0, 0, 0, 0][:4])
        return header + np.ascontiguousarray(logits, np.float32).tobytes()

    def hash(self, message: dict[str, Any]) -> dict[str, Any]:
        """Look at the submission's files again, and hash them."""
        found = survey_folder(self.boot["folder"])
        return {"stamp": found.stamp, "hashes": found.hashes()}

    def close(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the peak of this process's memory, and what the runtime adds at its end."""
        if self.runtime:
            self.runtime.close()
        return {"peak_memory": self.peak.details()}

    def _message(self) -> dict[str, Any]:
        return json.loads(self._exactly(int.from_bytes(self._exactly(8), "little")))  # type: ignore[no-any-return]

    def _exactly(self, count: int) -> bytes:
        """Read from the evaluator. End the process when the evaluator has closed the channel."""
        content = b""
        while len(content) < count:
            part = os.read(self.request, count - len(content))
            if not part:
                os._exit(0)
            content += part
        return content


def set_limits_here(memory_mb: int, cpu_seconds: int) -> None:
    """Limit this process's further address space, its processor time and the files that it writes; allow no core files."""
    import resource  # not on Windows, where `load_model` works, too
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for what, limit in ((resource.RLIMIT_AS, pages * resource.getpagesize() + memory_mb * 2**20),
                        (resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_CORE, 0),
                        (resource.RLIMIT_FSIZE, 2**24)):
        _, most = resource.getrlimit(what)
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(what, (limit, limit))


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory is used up, in the words of Python, torch and the runtimes."""
    return isinstance(error, MemoryError | SystemError) or (isinstance(error, RuntimeError) and "alloc" in str(error))


def _write_all(handle: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view):]
