"""How the competition's panel loads a submission: by its own load_model, or the standard way. Also by a class of model.py.

The file runs in the sandbox's child and is loaded by its path. It counts what the loaded model says of itself; the parent
marks these counts as stated by the code.
"""

from __future__ import annotations

import ast
import errno
import importlib
import importlib.util
import inspect
import os
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

STATE_KEYS = ("state_dict", "model_state_dict", "model")  # where checkpoints keep the state dict
PANEL_CLASSES = 100  # the outputs that the panel gives a ResNet18 whose weights do not show their number
# Names of load_model's arguments that have no default, and what they get.
GIVEN: dict[tuple[str, ...], Callable[[dict[str, Any]], Any]] = {
    ("device", "map_location", "dev"): lambda boot: torch.device("cpu"),
    ("num_classes", "n_classes", "nb_classes", "num_class", "classes", "nclass"): lambda boot: boot["classes"],
    ("model_format", "format", "fmt"): lambda boot: "pytorch",
    ("num_threads", "threads"): lambda boot: boot["threads"],
}
REDUCED = (torch.float16, torch.bfloat16)


class LoadingError(Exception):
    """A submission whose model cannot be loaded, in words for its author."""


class NotAModelError(LoadingError):
    """A load_model that gives something else than a model: the panel does not go on from there."""


def load_submission_model(boot: dict[str, Any], explain: Callable[[BaseException], str]) -> tuple[Any, dict[str, Any]]:
    """Return a submission's model in eval mode, and what is to be said of it.

    Args:
        boot: `folder`, `weights` (relative), `classes`, `ways` (names of `WAYS` to try in order), `model_class`.
        explain: an exception of foreign code -> one line.

    Raises:
        LoadingError: no way leads to a model. The message is that of the first way.
    """
    folder = Path(boot["folder"])
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    sys.argv = [str(folder / "model_loader.py")]
    torch.manual_seed(0)  # weights that stay random are the same in every run
    main = types.ModuleType("__main__")
    main.__getattr__ = lambda name: from_folder(folder, name)  # type: ignore[method-assign]  # classes pickled in a notebook
    sys.modules["__main__"] = main
    reasons, panel_fails = [], False
    for way in boot["ways"]:
        try:
            model, facts = WAYS[way](folder, boot)
            model = evaluated(model)
        except Exception as error:  # whatever foreign code raises; the panel goes on to the standard way, too
            reasons.append(explain(error))
            panel_fails |= isinstance(error, NotAModelError)
            continue
        return model, facts | {"way": way, "failed": reasons[0] if reasons else None, "panel_fails": panel_fails}
    raise LoadingError(reasons[0] + (f"; the standard way fails too: {reasons[-1]}" if len(reasons) > 1 else ""))


def evaluated(model: Any) -> Any:
    """Return a model on the CPU in eval mode, by the calls that the panel makes."""
    try:
        model = model.to("cpu")
        model.eval()
    except Exception as error:  # foreign code
        raise NotAModelError(f"the model cannot be put in eval mode: {type(error).__name__}: {error}") from error
    return model


def run_file(path: Path, name: str) -> types.ModuleType:
    """Import a file of the folder by its path, registered, so that pickled objects of its classes find them."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------ load_model


def by_loader(folder: Path, boot: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return what model_loader.py's `load_model(model_path)` gives."""
    module = run_file(folder / "model_loader.py", "model_loader")
    load_model = getattr(module, "load_model", None)
    if not callable(load_model):
        raise LoadingError("model_loader.py defines no function load_model")
    result = call_loader(load_model, str(folder / boot["weights"]), boot)
    model = module_in(result)
    if model is None:
        hint = "; is `return model` missing?" if result is None else "; the panel calls .to, .eval and the model itself"
        raise NotAModelError(f"model_loader.py: load_model returned {type(result).__name__}, expected an nn.Module{hint}")
    return model, {"unpacked": isinstance(result, tuple | list)}


def call_loader(load_model: Callable[..., Any], path: str, boot: dict[str, Any]) -> Any:
    """Call load_model with the path. Arguments without a default, such as a device, get one by their name."""
    try:
        parameters = [p for p in inspect.signature(load_model).parameters.values()
                      if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        takes_any = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(load_model).parameters.values())
    except (TypeError, ValueError):
        return load_model(path)
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    needed = [p.name for p in parameters if p.default is p.empty and p not in positional[:1]]
    given = {name: value(boot) for names, value in GIVEN.items() for name in names if name in needed}
    if positional or takes_any:
        return load_model(path, **given)
    named = next((name for name in needed if "path" in name or "file" in name), None)
    return load_model(**given, **({named: path} if named else {}))


def module_in(result: Any) -> Any:
    """Return the model in what load_model gave: a module, an object that serves as one, or the first in a tuple."""
    for candidate in result if isinstance(result, tuple | list) and not isinstance(result, nn.Module) else (result,):
        if isinstance(candidate, nn.Module):
            return candidate
        if callable(candidate) and all(callable(getattr(candidate, name, None)) for name in ("to", "eval")):
            return candidate
    return None


# ------------------------------------------------------------------------------------------------- the standard way


def by_standard(folder: Path, boot: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the model in the file alone: TorchScript, a pickled module, or a state dict of torchvision's ResNet18."""
    name = boot["weights"]
    path = folder / name
    if is_torchscript(path):
        return torch.jit.load(str(path), map_location="cpu"), {"found": "script"}
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except (AttributeError, ModuleNotFoundError) as error:  # a class that no file of the folder defines
        raise LoadingError(f"{name} was pickled with a class or module that is not in the folder: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # what torch raises for a file without its end; all else is the code's own
            raise
        raise LoadingError(f"{name} is cut short or not of torch: {error}") from error
    except (EOFError, ValueError, pickle.UnpicklingError) as error:
        raise LoadingError(f"{name} is cut short or not of torch: {error}") from error
    except RuntimeError as error:
        raise LoadingError(f"{name} is not what torch.save writes: {str(error).partition('. ')[0]}") from error
    if (model := module_in(content)) is not None or (
            isinstance(content, dict) and (model := module_in(list(content.values()))) is not None):
        return model, {"found": "pickle"}
    weights = state_dict_in(content)
    if not isinstance(weights, dict) or not any(isinstance(value, torch.Tensor) for value in weights.values()):
        raise LoadingError(f"{name} holds {type(content).__name__}, expected TorchScript, a pickled module or a state dict")
    weights = {key.removeprefix("module."): tensor for key, tensor in weights.items() if isinstance(key, str)}
    import torchvision
    head = weights.get("fc.weight")
    classes = len(head) if isinstance(head, torch.Tensor) and head.dim() else PANEL_CLASSES
    model = torchvision.models.resnet18(num_classes=classes)
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise LoadingError(f"{name} is a state dict that does not fit torchvision's ResNet18: "
                           f"{difference(weights, model.state_dict())}") from None
    return model, {"found": "resnet18"}


def difference(weights: dict[str, Any], expected: dict[str, Any]) -> str:
    """Return in a few words how a state dict differs from the expected one; always the same tensor first."""
    missing = [name for name in expected if name not in weights]
    shapes = [name for name in expected if getattr(weights.get(name), "shape", None) not in (None, expected[name].shape)]
    if missing:
        return f"{len(missing)} of {len(expected)} tensors are missing, first {missing[0]}"
    if shapes:
        return f"{len(shapes)} tensors have other shapes, first {shapes[0]}"
    unknown = [name for name in weights if name not in expected]
    return f"{len(unknown)} tensors too many, first {unknown[0] if unknown else ''}"


def is_torchscript(path: Path) -> bool:
    """Tell whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def state_dict_in(content: Any) -> Any:
    """Return the state dict in a checkpoint, or the content itself."""
    for key in STATE_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return content


def from_folder(folder: Path, name: str) -> Any:
    """Return what a file of the folder defines at its top level under a name; upper folders and model files come first.

    Raises:
        AttributeError: no file defines the name.
    """
    first = ("model_loader", "model", "models", "network", "net")
    paths = sorted(folder.rglob("*.py"), key=lambda path: (
        len(path.parts), first.index(path.stem) if path.stem in first else 9, str(path)))
    for path in [] if name.startswith("__") else paths:
        try:
            tree = ast.parse(path.read_text(errors="replace"))
        except SyntaxError:
            continue
        if any(isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name for node in tree.body):
            return getattr(import_file(folder, path), name)
    raise AttributeError(f"no file of the folder defines {name} (it was pickled as __main__.{name})")


def import_file(folder: Path, path: Path) -> types.ModuleType:
    """Import a file of the folder: as a module of a package where that works, else alone, with its neighbours in reach."""
    parts = path.relative_to(folder).with_suffix("").parts
    try:
        module = importlib.import_module(".".join(parts))
        if len(parts) == 1 or Path(str(module.__file__)) == path:
            return module
    except ImportError:
        if len(parts) == 1:
            raise
    sys.path.append(str(path.parent))  # such as code/net.py, where Python has a module `code` of its own
    return run_file(path, "_".join(parts))


# -------------------------------------------------------------------------------------------- the class in model.py


def by_class(folder: Path, boot: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return an instance of the class in model.py that the weights fit."""
    weights = state_dict_in(torch.load(folder / boot["weights"], map_location="cpu", weights_only=False))
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}  # DataParallel's
    module = run_file(folder / "model.py", "model")
    classes = [value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, nn.Module)
               and value.__module__ == "model"]
    named = [value for value in classes if value.__name__ == boot["model_class"]]
    reasons = []
    for kind in named or classes[::-1]:  # the whole network is usually defined last
        try:
            model = construct(kind, boot["classes"])
            model.load_state_dict(weights, strict=True)
        except Exception as error:  # whatever foreign code raises; the reasons are told below
            reasons.append(f"{kind.__name__}: {type(error).__name__}: {' '.join(str(error).split())}")
            continue
        return model, {"class": kind.__name__}
    raise LoadingError("; ".join(reasons)[:300] or "model.py defines no nn.Module")


def construct(kind: Callable[..., Any], classes: int) -> Any:
    """Return an instance, with `num_classes` where the class takes it."""
    try:
        parameters = inspect.signature(kind).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    takes = "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return kind(num_classes=classes) if takes else kind()


WAYS = {"loader": by_loader, "class": by_class, "standard": by_standard}


# --------------------------------------------------------------------------------------- what a model says of itself


def tensors_in(value: Any) -> list[Any]:
    """Return the tensors in a state dict's value: itself, those of containers, or those of packed int8 weights."""
    found: list[Any] = []
    waiting, entered = [value], dict[int, Any]()  # a hostile file's containers may hold themselves
    while waiting:
        part = waiting.pop()
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif id(part) not in entered:
            entered[id(part)] = part
            if isinstance(part, tuple | list):
                waiting += part[::-1]
            elif isinstance(part, dict):
                waiting += list(part.values())[::-1]
            elif isinstance(part, torch.ScriptObject) and hasattr(part, "unpack"):
                waiting.append(part.unpack())
    return found


def numbers(model: Any) -> dict[str, int | None]:
    """Return the numbers that a model holds by its own state dict, and its trainable parameters; None where unknown."""
    if not isinstance(model, nn.Module):
        return {"all": None, "trainable": None}
    found = [tensor for value in model.state_dict().values() for tensor in tensors_in(value)]
    return {"all": sum(tensor.numel() for tensor in found),
            "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)}


def reduced_precision(model: Any) -> str | None:
    """Return the 16-bit type of a model's parameters, or None."""
    kinds = {tensor.dtype for tensor in model.parameters()} if isinstance(model, nn.Module) else set()
    return next((str(kind).removeprefix("torch.") for kind in REDUCED if kind in kinds), None)


MACS: dict[str, Callable[..., int]] = {  # operator -> multiply-adds of a call, from its output and arguments
    "aten.convolution": lambda out, input, weight, *rest: (input if rest[4] else out).numel() * weight[0].numel(),
    "aten._convolution": lambda out, input, weight, *rest: (input if rest[4] else out).numel() * weight[0].numel(),
    "aten.mm": lambda out, one, *_: out.numel() * one.shape[-1],
    "aten.bmm": lambda out, one, *_: out.numel() * one.shape[-1],
    "aten.addmm": lambda out, bias, one, *_: out.numel() * one.shape[-1],
    "aten.baddbmm": lambda out, bias, one, *_: out.numel() * one.shape[-1],
    "aten._int_mm": lambda out, one, *_: out.numel() * one.shape[-1],
    "aten._scaled_dot_product_flash_attention_for_cpu":
        lambda out, query, key, *_: 2 * query.numel() * key.shape[-2],
}


def macs(model: Any, input_shape: list[int]) -> int | None:
    """Return the multiply-adds of convolutions and matrix products for one input; None where they cannot be counted.

    Calls are counted as torch dispatches them, so those of TorchScript are seen too.
    """
    class Counter(TorchDispatchMode):
        total, unknown = 0, False

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # torch would import its compiler to keep it out, which takes as long as importing torch

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **(kwargs or {}))
            name = str(function).rpartition(".")[0]
            if name in MACS:
                self.total += MACS[name](output[0] if isinstance(output, tuple) else output, *args)
            elif name.startswith(("quantized.conv", "quantized.linear")):
                self.total += output.numel() * args[1].unpack()[0][0].numel()
            self.unknown |= "mkldnn" in name or "onednn" in name
            return output

    counter = Counter()  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad(), counter:
            model(torch.zeros(1, *input_shape))
    except Exception:  # foreign code; an unknown count must not end the evaluation
        return None
    return counter.total if counter.total and not counter.unknown else None
