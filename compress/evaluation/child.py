"""The sandbox's child process: runs foreign code and answers its parent. The file imports nothing of the project.

The parent starts `python -I -B child.py REQUEST_FD REPLY_FD MEMORY_FD`. The first message says what to run and is followed
by the bytes of the submission's files, which the process writes into its scratch folder. The process then gives up its
rights (confine.py and system_calls.py beside this file), and only then loads foreign code (panel.py, with offline.py for
what the code downloads; trainee.py and inventory.py for a solution of the 2.5M task). What the code raises becomes one line
(faults.py). A request is a nonce and a shape; its numbers lie in shared memory. A reply is the same nonce, a status and
bytes. The parent trusts no reply: the parent keeps the labels and the clock.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import mmap
import os
import pkgutil
import platform
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

REQUEST, REPLY = struct.Struct("<16sIIII"), struct.Struct("<16sBQ")


def load_file(path: Path, name: str) -> types.ModuleType:
    """Import a Python file by its path."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def set_limits(memory_mb: int, cpu_seconds: int, threads: int | None = None) -> None:
    """Limit further address space, processor time, the size of files and the threads; allow no core files.

    Args:
        memory_mb: MB (2^20 bytes) beyond what the process has.
        cpu_seconds: of all its threads together.
        threads: of all processes of the user; the kernel does not hold root to it.
    """
    import resource
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    for what, limit in ((resource.RLIMIT_AS, pages * resource.getpagesize() + memory_mb * 2**20),
                        (resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_FSIZE, 2**24), (resource.RLIMIT_CORE, 0),
                        (resource.RLIMIT_NOFILE, 128),  # an open file may be deleted: bound size and number
                        (resource.RLIMIT_NPROC, threads)):
        if limit is not None:
            limit = min([limit, *(most for most in resource.getrlimit(what) if most != resource.RLIM_INFINITY)])
            resource.setrlimit(what, (limit, limit))


def write_files(request: int, folder: Path, files: list[list[Any]]) -> None:
    """Write the submission's files, whose bytes follow each other in the pipe. Only their names and bytes come through.

    Raises:
        ValueError: a name leads out of the folder.
    """
    folder.mkdir()
    for name, size in files:
        path = folder / name
        if path.is_absolute() != folder.is_absolute() or ".." in path.parts or not path.is_relative_to(folder):
            raise ValueError(f"not a name inside the folder: {name!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb", buffering=0) as file:
            while size:
                part = read_exactly(request, min(size, 2**20))
                size -= len(part)
                write_all(file.fileno(), part)


class InReach:
    """A finder of modules in a folder of packages that finds those in reach only.

    Others lie there and cannot be opened: an import of them must fail as that of a missing package does.

    Args:
        finder: Python's own for the folder.
        names: top-level modules and packages in reach.
    """

    def __init__(self, finder: Any, names: frozenset[str]) -> None:
        self.finder, self.names = finder, names

    def find_spec(self, name: str, target: Any = None) -> Any:
        """Return the module's spec, or None."""
        return self.finder.find_spec(name, target) if name.partition(".")[0] in self.names else None

    def invalidate_caches(self) -> None:
        """Forget what the folder held."""
        self.finder.invalidate_caches()


def limit_imports(folders: list[str], names: list[str]) -> None:
    """Let imports from folders of packages find some names only."""
    sys.path += [folder for folder in folders if folder not in sys.path]
    for entry in sys.path:
        if "-packages" in entry or entry in folders:
            sys.path_importer_cache[entry] = InReach(pkgutil.get_importer(entry), frozenset(names))


# ------------------------------------------------------------------------------------------ a submission of the panel


def build_submission(boot: dict[str, Any], panel: types.ModuleType, stand_ins: Any,
                     explain: Callable[[BaseException], str]) -> tuple[Any, dict[str, Any]]:
    """Return the model of a submission's folder, and the facts that the code states about it."""
    stand_ins.install()
    model, facts = panel.load_submission_model(boot, explain)
    return model, {"class": type(model).__name__, **facts, **panel.numbers(model),
                   "macs": panel.macs(model, boot["input_shape"]), "reduced": panel.reduced_precision(model),
                   "asked": len(stand_ins.asked), "asked_for": [str(name)[:80] for name in stand_ins.asked[:3]],
                   **(stand_ins.origins(model) if stand_ins.asked else {}), "compiled": stand_ins.compiled}


# ------------------------------------------------------------------------------------------------------ the channel


def read_exactly(handle: int, count: int) -> bytes:
    """Read from a pipe. End the process when the parent is gone."""
    parts = []
    while count:
        part = os.read(handle, count)
        if not part:
            os._exit(0)
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def write_all(handle: int, content: bytes) -> None:
    """Write to a pipe, which may take a few bytes at a time."""
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view):]


def main() -> None:
    """Run the child process, as the top of the file describes."""
    request, reply, memory_handle = map(int, sys.argv[1:4])
    here = Path(__file__).resolve().parent
    boot = json.loads(read_exactly(request, int.from_bytes(read_exactly(request, 8), "little")))
    folder, packages = Path(boot["folder"]), boot["packages"]
    for handle in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, request, reply, memory_handle}:
        with contextlib.suppress(OSError):  # what listed the folder is closed already
            os.close(handle)
    os.umask(0o022)
    confinement, calls, faults = (load_file(here / f"{name}.py", f"sandbox_{name}")
                                  for name in ("confine", "system_calls", "faults"))
    confinement.die_with_parent()
    memory = mmap.mmap(memory_handle, 0)
    if boot["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, boot["cores"])
    write_files(request, folder, boot["files"])
    limit_imports(packages["search"], packages["names"])

    import numpy as np
    import torch
    import torch.utils.data
    panel, offline, trainee, inventory = (load_file(here / f"{name}.py", f"sandbox_{name}")
                                          for name in ("panel", "offline", "trainee", "inventory"))
    set_limits(boot["memory_limit_mb"], boot["cpu_limit_s"], boot["thread_limit"])
    machine = platform.machine()
    program = calls.seccomp_program(machine, os.getpid()) if machine in calls.AUDIT_ARCH else None
    protection = confinement.confine(boot["readable"], boot["writable"], program)
    torch.set_num_threads(boot["threads"])

    def explain(error: BaseException) -> str:
        return str(error) if isinstance(error, panel.LoadingError) else faults.explain_fault(
            error, folder, boot["memory_limit_mb"], packages["distributions"])

    nonce = bytes.fromhex(boot["nonce"])
    content = json.dumps(protection).encode()
    write_all(reply, REPLY.pack(nonce, 0, len(content)) + content)  # the last message that the parent may trust
    for _ in range(boot["pings"]):  # measure the channel before foreign code can interfere
        ping, *_ = REQUEST.unpack(read_exactly(request, REQUEST.size))
        write_all(reply, REPLY.pack(ping, 0, 0))
    nonce, *_ = REQUEST.unpack(read_exactly(request, REQUEST.size))  # the parent is ready: foreign code may run
    try:
        if boot["mode"] == "solution":
            model, facts = trainee.train_solution(boot, memory)
        elif boot["mode"] == "answer":
            trained = memory[:boot["bytes"]]
            content = json.dumps(inventory.take_inventory(trained)).encode()  # our own code: nothing in the model runs yet
            write_all(reply, REPLY.pack(nonce, 0, len(content)) + content)
            nonce, *_ = REQUEST.unpack(read_exactly(request, REQUEST.size))
            model, facts = trainee.restore_model(trained, inventory.cut, boot["seed"])
        else:
            model, facts = build_submission(boot, panel, offline.StandIns(), explain)
        content = json.dumps(facts).encode()
        status = 0
    except BaseException as error:  # foreign code may raise anything, SystemExit too
        content, status = explain(error).encode(errors="replace"), 1
    write_all(reply, REPLY.pack(nonce, status, len(content)) + content)
    # The panel's answers are computed without gradients; TorchScript and old code do not always bear inference_mode.
    by_panel = status == 0 and facts.get("way") in ("loader", "standard")
    while status == 0:
        nonce, *shape = REQUEST.unpack(read_exactly(request, REQUEST.size))
        shape = [size for size in shape if size]
        try:
            numbers = np.frombuffer(memory, np.float32, int(np.prod(shape))).reshape(shape)
            with torch.no_grad() if by_panel else torch.inference_mode():
                logits = model(torch.from_numpy(numbers))
            if not isinstance(logits, torch.Tensor):
                raise TypeError(f"the model returned {type(logits).__name__}, expected a Tensor")
            if logits.is_complex():
                raise TypeError("the model returned complex numbers, expected real ones")
            content = np.ascontiguousarray(logits.detach().float().numpy()).tobytes()
        except BaseException as error:
            said = explain(error)
            if isinstance(error, RuntimeError) and (kind := panel.reduced_precision(model)):
                said = (f"the model's weights are {kind} and its images are float32: convert the images in forward, or "
                        f"save float32 weights ({said})")
            content, status = said.encode(errors="replace"), 1
        write_all(reply, REPLY.pack(nonce, status, len(content)) + content)


if __name__ == "__main__":
    main()
