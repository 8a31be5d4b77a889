"""An exception of foreign code in one line: the line of its own file, and what the sandbox forbids there.

The file runs in the sandbox's child, imports only the standard library, and is loaded by its path. The parent prints the
line after the submission's name, and believes nothing in it.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

REFUSED_CODES = {errno.EPERM, errno.EACCES, errno.ENOSYS}
PROCESS_FILES = {"subprocess.py", "popen_fork.py", "popen_spawn_posix.py", "popen_forkserver.py", "forkserver.py",
                 "synchronize.py", "resource_tracker.py", "pty.py"}
NETWORK_FILES = {"socket.py", "ssl.py", "client.py", "request.py", "connection.py", "asyncio"}
WORKER_FILES = {"dataloader.py", "pool.py", "process.py", "popen_fork.py", "popen_spawn_posix.py", "popen_forkserver.py"}
PROCESS_CALL = re.compile(r"\b(v?fork|forkpty|posix_spawn\w*|exec[lv]\w*|spawn[lv]\w*|popen|system|Process|Popen)\b")
NETWORK_CALL = re.compile(r"\b(socket|connect|bind|urlopen|urlretrieve|getaddrinfo|create_connection)\b")
OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|[Cc]annot allocate memory|std::bad_alloc|"
                           r"can't start new thread|Resource temporarily unavailable")
NO_GPU = re.compile(r"no NVIDIA driver|CUDA (enabled|device)|HIP GPUs|CUDA GPUs|no NVIDIA GPU")
MAX_LINE = 400


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that it came from."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def inside_folder(path: str, folder: Path) -> str | None:
    """Return a path relative to the submission's folder, or None for a path elsewhere."""
    relative = os.path.relpath(path, folder) if os.path.isabs(path) else None
    return None if relative is None or relative.startswith("..") else relative


def foreign_line(error: BaseException, folder: Path) -> tuple[str, str]:
    """Return ("file.py:line", source line) of the submission's own frame nearest to the fault, or two empty texts."""
    for link in chain(error):
        if isinstance(link, SyntaxError) and link.filename and (name := inside_folder(link.filename, folder)):
            return f"{name}:{link.lineno}", ""
        for frame in reversed(traceback.extract_tb(link.__traceback__)):
            if name := inside_folder(frame.filename, folder):
                return f"{name}:{frame.lineno}", frame.line or ""
    return "", ""


def sentence(error: BaseException, folder: Path, memory_limit_mb: int, packages: Sequence[str] = ()) -> str:
    """Return what the sandbox, or the want of a package, forbade to code that raised an exception; else an empty text."""
    _, line = foreign_line(error, folder)
    for link in chain(error):
        text = str(link)
        if isinstance(link, MemoryError) or OUT_OF_MEMORY.search(text) or getattr(link, "errno", 0) == errno.ENOMEM:
            return f"no more memory or threads here than --memory_limit_mb {memory_limit_mb} allows"
        if isinstance(link, ModuleNotFoundError) and link.name:
            package = link.name.split(".")[0]
            if package not in sys.modules and packages:
                return (f"no package {package} in the sandbox, and none is installed from requirements.txt; these are in "
                        f"reach, and what they require: {', '.join(packages)}")
            if package not in sys.modules:
                return (f"the package {package} is not installed where the evaluator runs, and nothing is installed from a "
                        "submission's requirements.txt")
        if isinstance(link, socket.gaierror):
            return "no network here"
        if isinstance(link, OSError):
            said = _refusal(link, line, folder)
            if said:
                return said
        if "shared memory object" in text:
            return "no memory is shared with other processes here"
        if NO_GPU.search(text) and not isinstance(link, OSError):
            return "no GPU here: use the device cpu"
        if "Weights only load failed" in text:
            return "torch.load with weights_only=True refuses this file, which holds more than tensors"
    return ""


def _refusal(error: OSError, line: str, folder: Path) -> str:
    """Return what the sandbox forbade where the system answered with an error number."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    names = {path.name for path in files} | {path.parent.name for path in files}
    if error.errno == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        printed = any(os.fstat(handle).st_size >= limit for handle in (1, 2))
        return f"no more than {limit >> 20} MiB are printed here" if printed else (
            f"no file above {limit >> 20} MiB is written here")
    if error.errno == errno.ENOSPC:
        return "the code wrote more than its folder may hold"
    if error.errno == errno.EROFS:
        return f"no file outside the submission's folder is written here: {error.filename}"
    if error.errno == errno.EXDEV:
        return "no file is moved or linked from one folder to another here: copy it"
    if error.errno == errno.EMFILE:
        return f"no more than {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} files are open at once here"
    if error.errno == errno.ENOENT and "synchronize.py" not in names:
        if not isinstance(error.filename, str) or not error.filename:
            return ""
        inside = inside_folder(os.path.abspath(error.filename), folder)
        return f"{inside} is not in the submission's folder" if inside else (
            "the code runs in a copy of its folder: take paths from model_path")
    if error.errno not in REFUSED_CODES and "synchronize.py" not in names:
        return ""
    if "synchronize.py" in names and not names & WORKER_FILES:
        return "no locks between processes here: use those of threading"
    if "shared_memory.py" in names:
        return "no memory is shared with other processes here"
    if error.filename2 is not None and not os.path.isabs(str(error.filename2)) and "link" in line:
        return "no links are made here: copy the file"
    if names & PROCESS_FILES or PROCESS_CALL.search(line):
        loading = "dataloader.py" in names or "num_workers" in line
        return "no other processes here" + (": use num_workers=0" if loading else "")
    if error.filename is not None:
        return f"no file outside the submission's folder is read or written here: {error.filename}"
    if names & NETWORK_FILES or NETWORK_CALL.search(line):
        return "no network here"
    return "this system call is refused here"


def own_words(error: BaseException) -> str:
    """Return an exception's type and text. TorchScript's own traceback is left out, and so is advice to load unsafely."""
    text = str(error)
    if "TorchScript interpreter" in text and "Error: " in text:
        text = text.rpartition("Error: ")[2]
    if "Weights only load failed" in text:
        text = text.partition("WeightsUnpickler error:")[2].partition(". Please")[0] or "weights only load failed"
    return f"{type(error).__name__}: {' '.join(text.split())}"


def explain_fault(error: BaseException, folder: Path, memory_limit_mb: int, packages: Sequence[str] = ()) -> str:
    """Return an exception of foreign code in one line: "file.py:12: what is not allowed here (OSError: its own words)".

    Args:
        error: what the code raised.
        folder: where the copy of the submission lies; files of the code are named relative to it.
        memory_limit_mb: MB (2^20 bytes) that the code may take.
        packages: the packages that the code may import, for messages.
    """
    try:
        place, words = foreign_line(error, folder)[0], own_words(error)
        said = sentence(error, folder, memory_limit_mb, packages)
    except BaseException:  # foreign code may have replaced what these functions use
        return type(error).__name__
    return ((f"{place}: " if place else "") + (f"{said} ({words})" if said else words))[:MAX_LINE]
