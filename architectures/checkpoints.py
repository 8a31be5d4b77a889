"""A user's checkpoint, of whatever training script: the state dict in it that fits a model, and its class names.

Training scripts save tensors beside other things: settings, metrics, an average of the weights, an optimizer. The file is
opened as data (`weights_only`). Three kinds of objects are let in, each as a stand-in of this file in place of the named
class: `argparse.Namespace`, `numpy.dtype` and numpy's `scalar`. No code of theirs is called, so that it does not matter
what a hostile file would make of them: a namespace becomes a dict, a numpy number becomes Python's number, and numpy's
other values (above all objects, whose bytes would be pointers) are refused. torch looks the stand-ins up by the name in
the file, and calls them only with data that went through the same reader.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from architectures.weights import load_tensors
from metadata.errors import UserError, VerificationError, first_line
from metadata.files import check_download, check_is_file

DEPTH = 3  # keys below which a state dict is still found
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}  # parts of names that torch's wrappers add
AVERAGES = re.compile(r"(^|[._])(ema|swa|avg|averaged?)([._]|$)", re.IGNORECASE)
CLASS_KEYS = ("class_to_idx", "idx_to_class", "class_names", "classes", "label_names", "categories")
JOINED = {"module", "model", "backbone", "neck", "head"}  # parts of prefixes behind which one model's tensors are divided
NUMPY_CODE = re.compile(r"b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[US]\d{1,6}")
HEAD = "; the teacher has {} classes, the data has {}"


class Settings(dict[Any, Any]):
    """Stands for `argparse.Namespace`."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)


class NumpyType:
    """Stands for `numpy.dtype`."""

    def __init__(self, code: Any = "", *flags: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|"):
            self.order = state[1]


def numpy_number(kind: Any, data: Any = b"") -> Any:
    """Stand for numpy's `scalar`: return Python's number, text or bytes.

    numpy makes no text of the bytes: it does not check that they are characters.

    Raises:
        ValueError: the value is of another type, such as an object, or its bytes are no text.
    """
    code = kind.code if isinstance(kind, NumpyType) else None
    if not isinstance(code, str) or not NUMPY_CODE.fullmatch(code) or not isinstance(data, bytes):
        raise ValueError(f"it holds a numpy value of type {str(code)[:20]!r}, which is no number")
    size = int(code[1:]) * (4 if code[0] == "U" else 1)
    if size != len(data):
        raise ValueError(f"it holds a numpy value of type {code!r} with {len(data)} bytes")
    if code[0] == "S":
        return data.rstrip(b"\0")
    big = kind.order == ">" or (kind.order != "<" and sys.byteorder == "big")
    if code[0] == "U":
        try:
            return data.decode("utf-32-be" if big else "utf-32-le").rstrip("\0")
        except UnicodeDecodeError as error:
            raise ValueError(f"it holds a numpy value of type {code!r} whose bytes are no text") from error
    try:
        value = np.frombuffer(data, np.dtype((">" if big else "<") + code)).item()
    except TypeError as error:  # 16 bytes and more are not on every processor
        raise ValueError(f"it holds a numpy value of type {code!r}, which this machine does not have") from error
    return {"f": float, "c": complex}.get(code[0], type(value))(value)


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (Settings, "argparse.Namespace"), (NumpyType, "numpy.dtype"), (numpy_number, "numpy.core.multiarray.scalar"),
    (numpy_number, "numpy._core.multiarray.scalar")]


@dataclass(frozen=True, kw_only=True)
class Found:
    """Tensors of a checkpoint that lie under one key and share one prefix.

    Args:
        label: the keys and the prefix, such as "state_dict.model"; empty for a bare state dict.
        tensors: by their names without the prefix.
        beside: names under the same key that do not have the prefix.
        joined: the prefixes, where the tensors lie behind several.
    """

    label: str
    tensors: dict[str, Tensor]
    beside: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The part of a file that fits a model.

    Args:
        weights: the model's state dict, with its names, shapes and dtypes.
        class_names: the classes in the order of the logits, where the file states them.
        notes: one line about each choice that was made.
    """

    weights: dict[str, Tensor]
    class_names: list[str] | None
    notes: list[str]


def open_checkpoint(path: Path, module: nn.Module, *, key: str | None = None, num_classes: int | None = None) -> Checkpoint:
    """Return what a checkpoint holds for a model.

    Where several state dicts in the file fit, weights as trained come before averages (a key with ema, swa or avg in it),
    and then the first in the file. A prefix that all names share is left off. Where one prefix does not lead to all of the
    model's tensors, a `backbone`, `neck` and `head` are joined. Floating-point tensors are cast.

    Args:
        path: a file of `torch.save`, or safetensors.
        module: the model, on any device; it stays as it is.
        key: take the state dict below this key, such as "model_ema".
        num_classes: of the data, for the message about a head of another width.

    Raises:
        UserError: the file is not readable as data, or nothing in it fits; the message says how the names differ.
    """
    content = _read_safetensors(path) if _is_safetensors(path) else _read(path)
    expected = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    stored = dict(_state_dicts(content, (), set()))
    if not stored:
        raise UserError(f"{path}: expected a state dict (names to tensors), bare or under a key, got {_outline(content)}")
    found = [part for label, tensors in stored.items() for part in _parts(label, tensors, expected)]
    if key is not None:
        found = [part for part in found if part.label == key or part.label.startswith(f"{key}.")]
        if not found:
            raise UserError(f"{path}: no state dict below the key {key!r}; it holds tensors under "
                            f"{', '.join(label or '(no key)' for label in stored)}")
    found.sort(key=lambda part: (_misfit(part, expected), bool(AVERAGES.search(part.label))))  # stable: file order
    best, *others = found
    if problem := _difference(best, expected, num_classes):
        raise UserError(f"{path}: {problem}")
    notes = []
    if best.joined:
        notes.append(f"joins the tensors under {', '.join(best.joined)}")
    if equals := [part.label or "(no key)" for part in others if not _difference(part, expected, num_classes)]:
        notes.append(f"takes the weights under {best.label or '(no key)'}; {', '.join(equals)} would fit too")
    if beside := [name for name in best.beside if name.rpartition(".")[2] != "n_averaged"]:
        notes.append(f"leaves out what is not {'of the model' if best.joined else f'under {best.label}'}: {len(beside)} "
                     f"tensors, first {beside[0]}")
    return Checkpoint(weights=_cast(best, expected, path), class_names=_class_names(content), notes=notes)


def class_permutation(stated: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Return where each of the wanted classes is among the stated ones, or None where the two name different classes.

    Names are compared as they are, and then by their letters and digits alone (`T-shirt/top` is `t-shirt-top`).
    """
    for spell in (str, lambda name: re.sub(r"[\W_]+", "", name.casefold())):
        places = {spell(name): place for place, name in enumerate(stated)}
        order = [places.get(spell(name)) for name in wanted]
        if sorted(place for place in order if place is not None) == list(range(len(stated))) and None not in order:
            return [place for place in order if place is not None]
    return None


# -------------------------------------------------------------------------------------------------- reading as data


def _read(path: Path) -> Any:
    try:
        return load_tensors(path, STAND_INS)
    except VerificationError as error:
        advice = "; save the tensors alone: torch.save(model.state_dict(), FILE)" if "it holds" in str(error) else ""
        raise UserError(f"{error}{advice}") from error


def _is_safetensors(path: Path) -> bool:
    """Return whether a file is of safetensors by its name, or by its first bytes: the header's length, then JSON."""
    if path.suffix == ".safetensors" or not path.is_file():
        return path.suffix == ".safetensors"
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Return the tensors, and the file's metadata (texts, perhaps JSON) as a dict under a key of its own."""
    from safetensors import SafetensorError, safe_open

    try:
        check_is_file(path)
        check_download(path)
    except VerificationError as error:
        raise UserError(str(error)) from error
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stated = dict(file.metadata() or {})
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError,
            MemoryError) as error:
        raise UserError(f"{path}: not a safetensors file: {first_line(error)}") from error
    return {**tensors, "__metadata__": {key: _parsed(text) for key, text in stated.items()}}


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return text


def _outline(content: Any) -> str:
    """Return in a few words what a checkpoint without tensors is."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    keys = [str(key) for key in content]
    return f"a dict of {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}" if keys else "an empty dict"


# ------------------------------------------------------------------------------------- the state dict that fits best


def _state_dicts(content: Any, keys: tuple[str, ...], seen: set[int]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every dict that holds tensors by name, with the keys that lead to it. A dict is entered once."""
    if not isinstance(content, dict) or id(content) in seen:
        return
    seen.add(id(content))
    if tensors := {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}:
        yield ".".join(keys), tensors
    if len(keys) < DEPTH:
        for key, value in content.items():
            if isinstance(key, str):  # an optimizer keeps its state under numbers
                yield from _state_dicts(value, (*keys, key), seen)


def _parts(label: str, tensors: dict[str, Tensor], expected: Mapping[str, Tensor]) -> list[Found]:
    """Return the tensors under one key by prefix: those prefixes that are before most of the expected names."""
    names = _names(tensors, expected)
    counts: dict[str, int] = {}
    for name in names:
        pieces = name.split(".")
        for start in range(len(pieces)):
            if ".".join(pieces[start:]) in expected:
                prefix = "".join(f"{piece}." for piece in pieces[:start])
                counts[prefix] = counts.get(prefix, 0) + 1
    most = max(counts.values(), default=0)
    parts = []
    for prefix in [prefix for prefix, count in counts.items() if count == most] or [""]:
        inside = {name.removeprefix(prefix): tensors[old] for name, old in names.items() if name.startswith(prefix)}
        beside = tuple(name for name in names if not name.startswith(prefix))
        parts.append(Found(label=".".join(filter(None, (label, prefix[:-1]))), tensors=inside, beside=beside))
    joined = _joined(label, tensors, expected)
    return [*parts, joined] if joined else parts


def _joined(label: str, tensors: dict[str, Tensor], expected: Mapping[str, Tensor]) -> Found | None:
    """Return the model's tensors from behind several prefixes of `JOINED`, if each is there once, or None."""
    names = _names(tensors, expected)
    places: dict[str, list[str]] = {}
    for name in names:
        pieces = name.split(".")
        for start in range(len(pieces)):
            if JOINED.issuperset(pieces[:start]) and (inner := ".".join(pieces[start:])) in expected:
                places.setdefault(inner, []).append(name)
    is_whole = all(len(places.get(inner, ())) == 1 or (inner not in places and _is_counter(inner)) for inner in expected)
    prefixes = dict.fromkeys(name.removesuffix(inner).rstrip(".") for inner, found in places.items() for name in found)
    if not is_whole or len(prefixes) < 2:
        return None
    used = {found[0] for found in places.values()}
    return Found(label=label, tensors={inner: tensors[names[found[0]]] for inner, found in places.items()},
                 beside=tuple(name for name in names if name not in used),
                 joined=tuple(".".join(filter(None, (label, prefix))) or "(no key)" for prefix in prefixes))


def _names(tensors: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the tensors' names by those without the parts that torch's wrappers add, unless the model itself has them."""
    names = {name if name in expected else ".".join(part for part in name.split(".") if part not in WRAPPERS): name
             for name in tensors}
    return names if len(names) == len(tensors) else {name: name for name in tensors}


def _is_counter(name: str) -> bool:
    """Return whether a tensor counts batches. Old files have none of these."""
    return name.endswith("num_batches_tracked")


def _misfit(part: Found, expected: Mapping[str, Tensor]) -> tuple[bool, int, int, int]:
    """Return what is less the better the tensors fit: whether any does not, how many do not by name, by shape, too many."""
    named = part.tensors.keys() & expected.keys()
    shaped = sum(part.tensors[name].shape == expected[name].shape for name in named)
    return _difference(part, expected) is not None, -len(named), -shaped, len(part.tensors)


def _difference(part: Found, expected: Mapping[str, Tensor], num_classes: int | None = None) -> str | None:
    """Return in one line how the tensors differ from the model's, or None."""
    missing = [name for name in expected if name not in part.tensors and not _is_counter(name)]
    unknown = [name for name in part.tensors if name not in expected]
    shapes = [name for name in expected if name in part.tensors and part.tensors[name].shape != expected[name].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of the model's {len(expected)} missing (first {missing[0]})")
        ends = tuple(f".{name}" for name in missing)
        if beside := [name for name in part.beside if name.endswith(ends)] or part.beside:
            problems.append(f"beside them: {len(beside)} tensors, first {beside[0]}")
    if unknown:
        problems.append(f"{len(unknown)} unknown to the model (first {unknown[0]})")
    if shapes:
        name = shapes[0]
        have, want = list(part.tensors[name].shape), list(expected[name].shape)
        more = f"{len(shapes)} of another shape, first " if len(shapes) > 1 else ""
        is_head = want[:1] == [num_classes] and have[:1] != want[:1] and have[1:] == want[1:]
        problems.append(f"{more}tensor {name} is {have}, expected {want}" + (HEAD.format(have[0], num_classes)
                                                                             if is_head else ""))
    if not problems:
        return None
    where = f"the tensors under {part.label} do not fit the model: " if part.label else "the tensors do not fit the model: "
    return where + "; ".join(problems) + ("; is teacher.model right?" if missing or unknown else "")


def _cast(part: Found, expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors, whose names and shapes are the model's, in the model's dtypes and order.

    Raises:
        UserError: a tensor is of a kind that cannot be cast, such as a quantized one, or is not finite.
    """
    weights = {}
    for name, like in expected.items():
        tensor = part.tensors.get(name, torch.zeros(like.shape, dtype=like.dtype)).detach()
        kinds = {(kind.is_floating_point, kind.is_complex) for kind in (tensor.dtype, like.dtype)}
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or len(kinds) > 1:
            raise UserError(f"{path}: tensor {name} is {tensor.dtype} ({tensor.layout}, {tensor.device}), expected dense "
                            f"{like.dtype}")
        weights[name] = tensor.to(like.dtype)
        if tensor.is_floating_point() and not bool(torch.isfinite(weights[name]).all()):
            raise UserError(f"{path}: tensor {name} holds NaN or infinite values")
    return weights


# ------------------------------------------------------------------------------------------------- names of classes


def _class_names(content: Any) -> list[str] | None:
    """Return the classes in the order of their numbers, where the checkpoint states them, at most two keys below its top.

    Keys may be in capitals, as in `meta.CLASSES`.
    """
    groups = [content] if isinstance(content, dict) else []
    for _ in range(3):
        for group in groups:
            for key in CLASS_KEYS:
                if names := _ordered(group.get(key)) or _ordered(group.get(key.upper())):
                    return names
        inner = {id(value): value for group in groups for key, value in group.items() if isinstance(key, str)}
        groups = [value for value in inner.values() if isinstance(value, dict)]  # each once: a hostile file may share them
    return None


def _ordered(stated: Any) -> list[str] | None:
    """Return class names from a list, or from a dict of names to numbers or of numbers to names."""
    if isinstance(stated, dict):
        by_name = all(isinstance(name, str) and isinstance(number, int) for name, number in stated.items())
        pairs = [(number, name) for name, number in stated.items()] if by_name else list(stated.items())
        try:
            numbered = {int(number): name for number, name in pairs}
        except (ValueError, TypeError, OverflowError):
            return None
        if sorted(numbered) != list(range(len(pairs))):
            return None
        stated = [numbered[number] for number in range(len(pairs))]
    is_names = isinstance(stated, list | tuple) and stated and all(isinstance(name, str) for name in stated)
    return list(stated) if is_names and len(set(stated)) == len(stated) else None
