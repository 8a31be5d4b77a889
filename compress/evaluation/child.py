"""The sandbox's child process: runs foreign code and answers its parent. The file imports nothing of the project.

The parent starts `python -I -B child.py REQUEST_FD REPLY_FD MEMORY_FD`. The first message says what to run. The process
then gives up its rights (confine.py beside this file), and only then loads foreign code (panel.py, with offline.py for what
the code downloads). What the code raises becomes one line (faults.py). A request is a nonce and a shape; its numbers lie in
shared memory. A reply is the same nonce, a status and bytes. The parent trusts no reply: the parent keeps the labels and
the clock.
"""

from __future__ import annotations

import array
import gc
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
LEAVES = (types.ModuleType, types.BuiltinFunctionType, int, float)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


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


# ------------------------------------------------------------------------------------- a solution of the 2.5M task


def train_solution(boot: dict[str, Any], memory: mmap.mmap) -> tuple[Any, dict[str, Any]]:
    """Return the model that a Solution trains on the arrays in shared memory, and its size."""
    import numpy as np
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    tensors = [torch.from_numpy(np.frombuffer(memory, array["dtype"], array["count"], array["offset"]).copy()).reshape(
        array["shape"]) for array in boot["arrays"]]
    train, validation = TensorDataset(*tensors[:2]), TensorDataset(*tensors[2:])
    folder = Path(boot["folder"])
    os.chdir(folder)
    parameters, buffers, reach, total = nn.Module.parameters, nn.Module.named_buffers, numbers_within_reach, sum
    module = load_file(folder / "solution.py", "solution")  # from here on foreign code may have replaced any name
    solution = getattr(module, "Solution", None)
    if solution is None:
        raise RuntimeError("the file defines no class Solution")
    torch.manual_seed(boot["seed"])
    np.random.seed(boot["seed"])
    model = solution().solve(DataLoader(train, batch_size=boot["batch_size"], shuffle=True),
                             DataLoader(validation, batch_size=boot["batch_size"]), boot["metadata"])
    if not isinstance(model, torch.nn.Module):
        raise RuntimeError(f"solve returned {type(model).__name__}, expected an nn.Module")
    model.eval()
    trainable = {id(p): p.numel() for p in parameters(model) if p.requires_grad}
    normal = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._NormBase)]
    statistics = {id(buffer) for part in normal for name, buffer in buffers(part, recurse=False) if name in STATISTICS}
    others = {key: count for key, count in reach(model, module).items() if key not in trainable}
    return model, {"trainable": total(trainable.values()), "all": total(trainable.values()) + total(others.values()),
                   "hidden": total(count for key, count in others.items() if key not in statistics)}


def numbers_within_reach(model: Any, module: types.ModuleType) -> dict[int, int]:
    """Return id -> count of the numbers within a model's reach: tensors, arrays, bytes, in lists, closures and globals.

    Functions and classes of the solution's own file are followed into the globals that they name; libraries are not.
    """
    import numpy as np
    import torch

    found: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[Any] = [model]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor | np.ndarray):
            found[id(thing)] = int(thing.numel() if isinstance(thing, torch.Tensor) else thing.size)
        elif isinstance(thing, str | bytes | bytearray | memoryview | array.array):
            found[id(thing)] = len(thing) // 4 if len(thing) > 1024 else 0  # counted as float32; short texts are names
        elif isinstance(thing, types.FunctionType):
            if thing.__module__ == module.__name__:
                waiting += [*(thing.__closure__ or ()), thing.__defaults__, thing.__kwdefaults__, thing.__code__]
        elif isinstance(thing, types.CodeType):
            if thing.co_filename == module.__file__:  # constants hold bytes, and the code of inner functions
                waiting += [*thing.co_consts, *(vars(module)[name] for name in thing.co_names if name in vars(module))]
        elif isinstance(thing, type):
            if thing.__module__ == module.__name__:
                waiting += list(vars(thing).values())
        elif not isinstance(thing, LEAVES):
            waiting += gc.get_referents(thing)
            waiting.append(type(thing))
    return found


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
    panel, offline = (load_file(here / f"{name}.py", f"sandbox_{name}") for name in ("panel", "offline"))
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
        model, facts = (train_solution(boot, memory) if boot["mode"] == "solution" else
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
