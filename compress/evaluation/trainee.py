"""A solution of the 2.5M-parameter task in the sandbox: one process trains its model, another answers with what is left.

The file runs in the sandbox's child and is loaded by its path. `train_solution` leaves the trained model in shared memory
as bytes: a pickle in which classes and functions of the solution's file are held by value, and the storages of all tensors
(inventory.py says how they follow each other). `restore_model` makes the model from these bytes alone, in a new process.
"""

from __future__ import annotations

import copyreg
import importlib.util
import io
import mmap
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

STORAGES = (torch.storage.TypedStorage, torch.UntypedStorage)
ADVICE = ("return a plain nn.Module that holds tensors and plain values: no TorchScript, open files, threads, locks, "
          "generators or data loaders")


def train_solution(boot: dict[str, Any], memory: mmap.mmap) -> tuple[None, dict[str, Any]]:
    """Leave the model that a Solution trains on the arrays in shared memory there, serialised. Return how many bytes.

    Args:
        boot: `arrays` (dtype, count, offset, shape of train inputs, train labels, validation inputs and labels), `folder`
            with solution.py, `seed`, `batch_size`, `metadata`; `most_bytes` that the serialised model and the source may
            take together, and in words why (`most_words`).
        memory: shared with the parent.

    Raises:
        RuntimeError: no model comes, or none that can be served. Foreign code may raise anything else.
    """
    from torch.utils.data import DataLoader, TensorDataset

    tensors = [torch.from_numpy(np.frombuffer(memory, array["dtype"], array["count"], array["offset"]).copy()).reshape(
        array["shape"]) for array in boot["arrays"]]
    train, validation = TensorDataset(*tensors[:2]), TensorDataset(*tensors[2:])
    folder = Path(boot["folder"])
    os.chdir(folder)
    source = folder / "solution.py"
    source_bytes = source.stat().st_size
    module = solution_module(source)
    solution = getattr(module, "Solution", None)
    if solution is None:
        raise RuntimeError("the file defines no class Solution")
    torch.manual_seed(boot["seed"])
    np.random.seed(boot["seed"])
    model = solution().solve(DataLoader(train, batch_size=boot["batch_size"], shuffle=True),
                             DataLoader(validation, batch_size=boot["batch_size"]), boot["metadata"])
    if not isinstance(model, nn.Module):
        raise RuntimeError(f"solve returned {type(model).__name__}, expected an nn.Module")
    content = serialised(model, module)
    if len(content) + source_bytes > boot["most_bytes"]:
        raise RuntimeError(f"the model takes {len(content):,} bytes and its source {source_bytes:,}; {boot['most_words']}. "
                           "A view keeps the whole tensor that it is cut from; .clone() does not")
    memory[:len(content)] = content
    return None, {"bytes": len(content)}


def solution_module(path: Path) -> types.ModuleType:
    """Import the solution's file by its path, registered as `solution`."""
    spec = importlib.util.spec_from_file_location("solution", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["solution"] = module
    spec.loader.exec_module(module)
    return module


# -------------------------------------------------------------------------------------------------- model -> bytes


def serialised(model: nn.Module, module: types.ModuleType) -> bytes:
    """Return a model as bytes. Classes and functions of the solution's file travel with it, and what they refer to.

    Raises:
        RuntimeError: the model holds what cannot be serialised.
    """
    import cloudpickle

    storages: dict[int, torch.UntypedStorage] = {}  # by the address of torch's own object: shared tensors stay shared
    places: dict[int, int] = {}

    class ModelPickler(cloudpickle.Pickler):  # type: ignore[misc]
        def persistent_id(self, thing: Any) -> tuple[str, str, int] | None:
            if not isinstance(thing, STORAGES):
                return None
            untyped = thing._untyped_storage if isinstance(thing, torch.storage.TypedStorage) else thing
            if untyped.device.type != "cpu":
                raise TypeError(f"a tensor is on the device {untyped.device}")
            storages.setdefault(untyped._cdata, untyped)
            place = places.setdefault(untyped._cdata, len(places))
            kind = str(thing.dtype).removeprefix("torch.") if isinstance(thing, torch.storage.TypedStorage) else ""
            return "storage", kind, place

        def reducer_override(self, thing: Any) -> Any:
            if isinstance(thing, nn.Module) and parametrize.is_parametrized(thing):  # torch refuses to pickle these
                return copyreg.__newobj__, (type(thing),), thing.__dict__  # type: ignore[attr-defined]
            return super().reducer_override(thing)

    stream = io.BytesIO()
    try:
        cloudpickle.register_pickle_by_value(module)
        ModelPickler(stream, protocol=5).dump(model)
        parts = [storage_bytes(storage) for storage in storages.values()]
    except Exception as error:  # the model's own code runs here
        raise RuntimeError(f"the model that solve returned cannot be serialised ({type(error).__name__}: "
                           f"{' '.join(str(error).split())[:150]}); {ADVICE}") from error
    header = np.array([stream.getbuffer().nbytes, len(parts), *map(len, parts)], "<u8").tobytes()
    return b"".join([header, stream.getbuffer(), *parts])


def storage_bytes(storage: torch.UntypedStorage) -> bytes:
    """Return a copy of a storage's bytes."""
    return torch.tensor([], dtype=torch.uint8).set_(storage).numpy().tobytes()


# -------------------------------------------------------------------------------------------------- bytes -> model


def restore_model(content: bytes, cut: Any, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model in a serialised one, in eval mode, and the trainable parameters that the model itself states.

    Args:
        content: a serialised model.
        cut: inventory.py's function of that name.
        seed: of torch and numpy.

    Raises:
        RuntimeError: it is no model. Foreign code may raise anything else.
    """
    stream, sizes, start = cut(content)
    storages = []
    for size in sizes:
        array = np.frombuffer(content, np.uint8, size, start).copy()
        storages.append(torch.from_numpy(array).untyped_storage())
        start += size

    class ModelUnpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            _, kind, place = pid
            return torch.storage.TypedStorage(wrap_storage=storages[place], dtype=getattr(torch, kind),
                                              _internal=True) if kind else storages[place]

    parameters = nn.Module.parameters  # bound before the model's code may replace it
    torch.manual_seed(seed)
    np.random.seed(seed)
    model = ModelUnpickler(io.BytesIO(stream)).load()
    if not isinstance(model, nn.Module):
        raise RuntimeError(f"what solve returned comes back as {type(model).__name__}, expected an nn.Module")
    model.eval()
    return model, {"trainable": sum({id(p): p.numel() for p in parameters(model) if p.requires_grad}.values())}
