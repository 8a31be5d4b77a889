"""The sandbox's child process: runs foreign code and answers its parent. The file imports nothing of the project.

The parent starts `python -I -B child.py REQUEST_FD REPLY_FD MEMORY_FD`. The first message says what to run. The process
then gives up its rights (confine.py beside this file), and only then loads foreign code (panel.py, with offline.py for what
the code downloads; trainee.py for a solution of the 2.5M task). What the code raises becomes one line (faults.py). A
request is a nonce and a shape; its numbers lie in shared memory. A reply is the same nonce, a status and bytes. The parent
trusts no reply: the parent keeps the labels and the clock.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
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


def set_limits(memory_mb: int, cpu_seconds: int) -> None:
    """Limit further address space, processor time and the size of files; allow no core files."""
    import resource
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    for what, limit in ((resource.RLIMIT_AS, pages * resource.getpagesize() + memory_mb * 2**20),
                        (resource.RLIMIT_CPU, cpu_seconds), (resource.RLIMIT_FSIZE, 2**24), (resource.RLIMIT_CORE, 0),
                        (resource.RLIMIT_NOFILE, 128)):  # an open file may be deleted: bound size and number
        resource.setrlimit(what, (limit, limit))


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
    parts = b""
    while len(parts) < count:
        part = os.read(handle, count - len(parts))
        if not part:
            os._exit(0)
        parts += part
    return parts


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
    confinement, faults = (load_file(here / f"{name}.py", f"sandbox_{name}") for name in ("confine", "faults"))
    confinement.die_with_parent()
    memory = mmap.mmap(memory_handle, 0)
    if boot["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, boot["cores"])

    import numpy as np
    import torch
    import torch.utils.data
    panel, offline, trainee = (load_file(here / f"{name}.py", f"sandbox_{name}")
                               for name in ("panel", "offline", "trainee"))
    set_limits(boot["memory_limit_mb"], boot["cpu_limit_s"])
    protection = confinement.confine([Path(path) for path in boot["readable"]], [Path(path) for path in boot["writable"]])
    torch.set_num_threads(boot["threads"])

    def explain(error: BaseException) -> str:
        return str(error) if isinstance(error, panel.LoadingError) else faults.explain_fault(
            error, Path(boot["folder"]), boot["memory_limit_mb"])

    nonce = bytes.fromhex(boot["nonce"])
    content = json.dumps(protection).encode()
    write_all(reply, REPLY.pack(nonce, 0, len(content)) + content)  # the last message that the parent may trust
    for _ in range(boot["pings"]):  # measure the channel before foreign code can interfere
        ping, *_ = REQUEST.unpack(read_exactly(request, REQUEST.size))
        write_all(reply, REPLY.pack(ping, 0, 0))
    try:
        model, facts = (trainee.train_solution(boot, memory) if boot["mode"] == "solution" else
                        build_submission(boot, panel, offline.StandIns(), explain))
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
