"""Read `.pt2` files of torch.export as data: a graph of known ATen operators in JSON, and numbers.

torch's own reader evaluates expressions that stand in the file, and unpickles what the file says is pickled. This reader
does neither: it takes plain numbers, a table of operators, static shapes with any number of images, and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy as np

from architectures.archives import check_archive, is_archive, UNREADABLE_ARCHIVE
from architectures.build import MAX_ACTIVATION_ELEMENTS, MAX_TOTAL_ELEMENTS, MAX_WEIGHT_ELEMENTS
from compress.evaluation.torch_operators import (
    bound_arguments,
    CALL_ERRORS,
    call_operator,
    FRESH_OPERATORS,
    IN_PLACE_TARGETS,
    TORCH_TARGETS,
    TorchOperator,
)
from metadata.errors import enough_memory, VerificationError, first_line
from metadata.files import MAX_JSON_BYTES, check_download, parse_json

if TYPE_CHECKING:
    from torch import Tensor

PROGRAM_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
                  12: "bool"}  # by the numbers of torch's schema
GRAPH, WEIGHTS_TABLE, CONSTANTS_TABLE = ("models/model.json", "data/weights/model_weights_config.json",
                                         "data/constants/model_constants_config.json")
MAX_PROGRAM_NODES = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramCall:
    """A call of an operator: positional and named arguments, and the names of its results.

    `in_place`: the file names the operator that works in place; `operator` is the functional one.
    """

    operator: TorchOperator
    in_place: bool = False
    args: list[Any]
    kwargs: dict[str, Any]
    results: list[str]


@dataclasses.dataclass(frozen=True)
class NamedValue:
    """An argument that is a tensor or a number that an earlier call gave."""

    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchProgram:
    """What a `.pt2` file holds.

    Args:
        tensors: stored numbers by the names that calls know them by.
        calls: in their order.
        image, logits: the names of the input and the output.
    """

    tensors: dict[str, np.ndarray]
    calls: list[ProgramCall]
    image: str
    logits: str

    def run(self, images: Tensor, stored: dict[str, Tensor],
            watch: Callable[[str, dict[str, Any], list[Any]], None] | None = None) -> Tensor:
        """Return the logits.

        Args:
            images: (N, C, H, W) float32, on any device.
            stored: `tensors` as torch's.
            watch: called with operator, arguments by name and results of every call.

        Raises:
            ValueError: a call that `call_operator` refuses, logits that are no tensor (N, classes), or a stored tensor that
                was changed. Also what torch raises: `CALL_ERRORS`.
        """
        import torch
        versions = {name: tensor._version for name, tensor in stored.items()}
        last = {each.name: index for index, call in enumerate(self.calls) for each in _named(call)}
        found: dict[str, Any] = {**stored, self.image: images}
        for index, call in enumerate(self.calls):
            args, kwargs = ([_read(each, found) for each in call.args],
                            {key: _read(each, found) for key, each in call.kwargs.items()})
            results = call_operator(call.operator, args, kwargs, len(call.results), images.device)
            if call.in_place and (results[0].shape, results[0].dtype) != (args[0].shape, args[0].dtype):
                raise ValueError(f"{call.operator[1]} in place changes a tensor's shape or type")
            if watch:
                watch(call.operator[1], bound_arguments(call.operator, args, kwargs), results)
            found.update(zip(call.results, results, strict=True))
            for each in _named(call):
                if last[each.name] == index and each.name != self.logits:
                    found.pop(each.name, None)
        # No operator of the table changes a tensor; this would show one that does.
        changed = next((name for name, tensor in stored.items() if tensor._version != versions[name]), None)
        if changed is not None:
            raise ValueError(f"the program changes its tensor {changed[:60]!r}")
        logits = found[self.logits]
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != len(images):
            got = list(logits.shape)[:9] if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ValueError(f"expected logits (N, classes), got {got} for {len(images)} images")
        return logits


def _named(call: ProgramCall) -> list[NamedValue]:
    """Return the arguments of a call that earlier calls gave."""
    values = [*call.args, *call.kwargs.values()]
    flat = [each for value in values for each in (value if isinstance(value, list) else [value])]
    return [each for each in flat if isinstance(each, NamedValue)]


def _read(value: Any, found: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_read(each, found) for each in value]
    return found[value.name] if isinstance(value, NamedValue) else value


def read_torch_program(path: Path) -> TorchProgram:
    """Read a `.pt2` file, without running it and without torch's reader.

    Raises:
        VerificationError: not such a file, or it holds more than plain numbers and known operators.
    """
    check_download(path)
    if not is_archive(path):
        raise VerificationError(f"{path}: not a program of torch.export: expected a zip archive")
    check_archive(path)
    try:
        with enough_memory(path), zipfile.ZipFile(path) as archive:
            return _program(path, archive)
    except UNREADABLE_ARCHIVE as error:
        raise VerificationError(f"{path}: not a program of torch.export: {first_line(error)}") from error
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise VerificationError(f"{path}: the program is not as torch.export writes it: {first_line(error)}") from error


def _program(path: Path, archive: zipfile.ZipFile) -> TorchProgram:
    members = {info.filename.partition("/")[2]: info for info in archive.infolist()}

    def content(name: str, most: int) -> bytes:
        info = members[name]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
            raise ValueError(f"{name} is compressed or has over {most:,} bytes")
        return archive.read(info)

    def document(name: str) -> Any:
        return parse_json(content(name, MAX_JSON_BYTES).decode())

    graph_module = document(GRAPH)["graph_module"]
    stored: dict[str, np.ndarray] = {}
    read: dict[str, bytes] = {}  # several tensors may lie in one member
    for table, folder in ((WEIGHTS_TABLE, "data/weights/"), (CONSTANTS_TABLE, "data/constants/")):
        for name, entry in document(table)["config"].items() if table in members else ():
            member = folder + str(entry["path_name"])
            if member not in read:
                read[member] = content(member, 2**32)
            stored[name] = _numbers_of(name, entry, read[member])
    if (numbers := sum(values.size for values in stored.values())) > MAX_WEIGHT_ELEMENTS:
        raise ValueError(f"its tensors have {numbers:,} elements, over the limit of {MAX_WEIGHT_ELEMENTS:,}")
    graph, signature = graph_module["graph"], graph_module["signature"]
    if len(graph["nodes"]) > MAX_PROGRAM_NODES:
        raise ValueError(f"it has {len(graph['nodes']):,} nodes, over the limit of {MAX_PROGRAM_NODES:,}")
    tensors, images = {}, []
    for entry in signature["input_specs"]:
        (kind, spec), = entry.items()
        if kind == "user_input":
            images.append(spec["arg"]["as_tensor"]["name"])
        else:
            tensors[spec["arg"]["name"]] = stored[spec[{"parameter": "parameter_name", "buffer": "buffer_name",
                                                        "tensor_constant": "tensor_constant_name"}[kind]]]
    outputs = [spec["user_output"]["arg"]["as_tensor"]["name"] for spec in signature["output_specs"]]
    if len(images) != 1 or len(outputs) != 1:
        raise VerificationError(f"{path}: expected one input and one output, got {len(images)} and {len(outputs)}")
    calls, known = [], {*tensors, images[0]}
    for node in graph["nodes"]:
        calls.append(_call(path, node))
        unknown = next((each.name for each in _named(calls[-1]) if each.name not in known), None)
        if unknown is not None:
            raise ValueError(f"{unknown[:60]!r} is used before any call gives it")
        if len({*calls[-1].results}) < len(calls[-1].results) or not known.isdisjoint(calls[-1].results):
            raise ValueError("two calls give a result of the same name")
        known.update(calls[-1].results)
    _check_in_place(calls, outputs[0])
    if outputs[0] not in known:
        raise ValueError("no call gives the output")
    return TorchProgram(tensors=tensors, calls=calls, image=images[0], logits=outputs[0])


def _check_in_place(calls: list[ProgramCall], output: str) -> None:
    """Refuse a call in place unless nothing else reads what it changes: then the functional operator gives the same.

    Raises:
        ValueError: the tensor is read again, or shares its memory with others, or may.
    """
    uses = Counter(each.name for call in calls for each in _named(call))
    fresh: set[str] = set()
    for call in calls:
        if call.in_place and call.operator[1] != "dropout":  # outside of training, dropout does nothing
            first = call.args[0] if call.args else None
            name = first.name if isinstance(first, NamedValue) else ""
            if name not in fresh or name == output or uses[name] != 1:
                raise ValueError(f"{call.operator[1]}_ changes a tensor that others may read; export the program with "
                                 "run_decompositions()")
            fresh.update(call.results)
        if call.operator[1] in FRESH_OPERATORS:
            fresh.update(call.results[:1])


def _whole_number(value: Any) -> int:
    """Return a whole number of the file. Raise ValueError for anything else, or one beyond 64 bits."""
    if type(value) is not int or not -2**63 <= value < 2**63:
        raise ValueError(f"expected a whole number of 64 bits, got {str(value)[:40]!r}")
    return value


def _real_number(value: Any) -> float:
    """Return a number of the file; torch writes infinite ones as text. Raise ValueError for anything else."""
    if value in ("Infinity", "-Infinity"):
        return math.inf if value == "Infinity" else -math.inf
    if type(value) is int:
        return float(_whole_number(value))
    if type(value) is not float or math.isnan(value):
        raise ValueError(f"expected a number, got {str(value)[:40]!r}")
    return value


def _short_text(value: Any) -> str:
    if type(value) is not str or len(value) > 40:
        raise ValueError(f"expected a short text, got {str(value)[:40]!r}")
    return value


def _truth_value(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"expected true or false, got {str(value)[:40]!r}")
    return value


PLAIN_ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "as_int": _whole_number, "as_float": _real_number, "as_bool": _truth_value, "as_string": _short_text,
    "as_ints": lambda values: [_whole_number(each) for each in values],
    "as_floats": lambda values: [_real_number(each) for each in values],
    "as_bools": lambda values: [_truth_value(each) for each in values]}


def _numbers_of(name: str, entry: dict[str, Any], content: bytes) -> np.ndarray:
    """Return a stored tensor. Raise ValueError for one that is pickled, a view, or not as long as its shape says."""
    meta = entry["tensor_meta"]
    sizes = [_whole_number(size["as_int"]) for size in meta["sizes"]]
    dtype = PROGRAM_DTYPES[meta["dtype"]]
    strides, expected = [_whole_number(stride["as_int"]) for stride in meta["strides"]], 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            raise ValueError(f"tensor {name[:60]!r} is stored as a view of another")
        expected *= size
    if entry.get("use_pickle") or meta["storage_offset"] != {"as_int": 0} or not all(
            0 <= size < 2**31 for size in sizes):
        raise ValueError(f"tensor {name[:60]!r} is pickled or a view of another; this evaluator unpickles nothing")
    if len(content) != math.prod(sizes) * np.dtype(dtype).itemsize:
        raise ValueError(f"tensor {name[:60]!r} has {len(content):,} bytes, its shape {sizes[:9]} of {dtype} needs others")
    numbers = np.frombuffer(content, dtype).reshape(sizes)
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        raise ValueError(f"tensor {name[:60]!r} holds NaN or infinite values")
    return numbers


def _call(path: Path, node: dict[str, Any]) -> ProgramCall:
    """Return a node as a call. Raise VerificationError for an operator beyond the table."""
    target = str(node["target"])
    operator = TORCH_TARGETS.get(target) or IN_PLACE_TARGETS.get(target)
    if operator is None:
        raise VerificationError(f"{path}: operator {target[:100]!r} is not one of those that image classifiers are "
                                "made of")
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for entry in node["inputs"]:
        value = _argument(entry["arg"])
        if entry["kind"] == 1:
            args.append(value)
        elif entry["name"] not in ("device", "layout", "pin_memory", "memory_format"):
            kwargs[str(entry["name"])] = value
    results = []
    for entry in node["outputs"]:
        (kind, value), = entry.items()
        results += [value["as_name"]] if kind == "as_sym_int" else [
            each["name"] for each in (value if kind == "as_tensors" else [value])]
    return ProgramCall(operator=operator, in_place=target in IN_PLACE_TARGETS, args=args, kwargs=kwargs, results=results)


def _argument(entry: dict[str, Any]) -> Any:
    """Return an argument as Python's. Raise ValueError for a kind that classifiers do not need."""
    (kind, value), = entry.items()
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return NamedValue(value["name"])
    if kind == "as_tensors":
        return [NamedValue(each["name"]) for each in value]
    if kind == "as_optional_tensors":
        return [NamedValue(each["as_tensor"]["name"]) if "as_tensor" in each else None for each in value]
    if kind in ("as_sym_int", "as_sym_ints"):
        each = [NamedValue(one["as_name"]) if "as_name" in one else _whole_number(one["as_int"])
                for one in (value if kind == "as_sym_ints" else [value])]
        return each if kind == "as_sym_ints" else each[0]
    if kind == "as_scalar_type":
        import torch
        return getattr(torch, PROGRAM_DTYPES[value])
    if kind in PLAIN_ARGUMENTS:
        return PLAIN_ARGUMENTS[kind](value)
    raise ValueError(f"an argument of the kind {kind[:40]!r}")


def program_costs(path: Path, program: TorchProgram, input_shape: Sequence[int]) -> tuple[int, dict[str, int], int]:
    """Return multiply-adds for one image, other steps by call, and the number of logits, from shapes alone.

    Raises:
        VerificationError: a shape is over the limits, or an operator does not take its arguments.
    """
    work: dict[str, int] = {}
    macs = 0

    def watch(name: str, bound: dict[str, Any], elements: int, shapes: list[tuple[int, ...]]) -> None:
        nonlocal macs
        steps = elements + sum(map(math.prod, shapes))
        if name in ("conv2d", "convolution"):
            macs += elements * math.prod(shapes[1][1:])
        elif name in ("linear", "matmul", "mm", "bmm", "addmm"):
            macs += elements * shapes[1 if name == "addmm" else 0][-1]
        elif name == "scaled_dot_product_attention":
            macs += elements * 2 * shapes[1][-2]
        elif name in ("avg_pool2d", "max_pool2d", "max_pool2d_with_indices"):
            kernel = bound["kernel_size"]
            side = math.prod(kernel) ** (2 // len(kernel))  # one number stands for both sides
            steps += elements * min(side, math.prod(shapes[0][2:]))
        elif name.startswith(("upsample", "adaptive", "_adaptive")):
            steps *= 16
        work[f"{name} ({len(work)})"] = steps

    try:
        logits, _ = _shapes_alone(program, input_shape, 1, watch)
    except CALL_ERRORS as error:
        raise VerificationError(f"{path}: not a program for one image of shape {list(input_shape)}: "
                                f"{first_line(error)}") from error
    return macs, work, int(logits.shape[1])


def check_batch(program: TorchProgram, input_shape: Sequence[int], images: int) -> None:
    """Check that so many images take at most as many times the memory of one.

    Raises:
        ValueError: they take more. Also what torch raises where the program does not take so many: `CALL_ERRORS`.
    """
    one, many = (_shapes_alone(program, input_shape, count)[1] for count in (1, images))
    if many > images * one:
        raise ValueError(f"{images} images give {many:,} elements, over {images} times the {one:,} of one image")


def _shapes_alone(program: TorchProgram, input_shape: Sequence[int], images: int,
                  watch: Callable[[str, dict[str, Any], int, list[tuple[int, ...]]], None] | None = None
                  ) -> tuple[Tensor, int]:
    """Return logits without numbers, and the elements of all results. No memory is taken for either.

    Args:
        watch: called with operator, arguments by name, elements of the results, and shapes of the tensors of every call.

    Raises:
        ValueError: a result is over the limits. Also what torch raises: `CALL_ERRORS`.
    """
    import torch
    total = 0

    def count(name: str, bound: dict[str, Any], results: list[Any]) -> None:
        nonlocal total
        given = [each for value in bound.values() for each in (value if isinstance(value, list) else [value])]
        elements = sum(each.numel() for each in results if isinstance(each, torch.Tensor))
        total += elements
        if elements > images * MAX_ACTIVATION_ELEMENTS or total > images * MAX_TOTAL_ELEMENTS:
            raise ValueError(f"{name} gives {elements:,} elements, {total:,} with those before, over the limits of "
                             f"{MAX_ACTIVATION_ELEMENTS:,} and {MAX_TOTAL_ELEMENTS:,} an image")
        if watch:
            watch(name, bound, elements, [tuple(each.shape) for each in given if isinstance(each, torch.Tensor)])

    stored = {name: torch.empty(values.shape, dtype=getattr(torch, str(values.dtype)), device="meta")
              for name, values in program.tensors.items()}
    return program.run(torch.empty(images, *input_shape, device="meta"), stored, count), total
