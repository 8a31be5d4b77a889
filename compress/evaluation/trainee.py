"""Train a solution of the 2.5M-parameter task in the sandbox's child, and count what its model holds.

The file runs in the child and is loaded by its path.
"""

from __future__ import annotations

import array
import gc
import importlib.util
import mmap
import os
import sys
import types
from pathlib import Path
from typing import Any

LEAVES = (types.ModuleType, types.BuiltinFunctionType, int, float)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def solution_module(path: Path) -> types.ModuleType:
    """Import the solution's file by its path, registered as `solution`."""
    spec = importlib.util.spec_from_file_location("solution", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["solution"] = module
    spec.loader.exec_module(module)
    return module


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
    module = solution_module(folder / "solution.py")  # from here on foreign code may have replaced any name
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
