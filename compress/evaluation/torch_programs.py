"""Read `.pt2` files of torch.export as data: a graph of known ATen operators in JSON, and numbers.

torch's own reader evaluates expressions that stand in the file, and unpickles what the file says is pickled. This reader
does neither: it takes plain numbers, a table of operators, static shapes with any number of images, and nothing else.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy as np

from architectures.archives import check_archive, is_archive, UNREADABLE_ARCHIVE
from architectures.build import MAX_ACTIVATION_ELEMENTS, MAX_TOTAL_ELEMENTS
from metadata.errors import VerificationError, first_line
from metadata.files import MAX_JSON_BYTES, check_download, parse_json

if TYPE_CHECKING:
    from torch import Tensor

_ATEN = """
    _softmax _to_copy abs adaptive_avg_pool2d adaptive_max_pool2d add addmm amax amin avg_pool2d batch_norm bmm cat
    chunk clamp clamp_min clone constant_pad_nd contiguous conv2d convolution cos div dropout elu erf exp expand
    feature_dropout flatten floor gelu group_norm hardsigmoid hardswish hardtanh index_select layer_norm leaky_relu
    linear linalg_vector_norm log_softmax matmul max_pool2d maximum mean minimum mish mm mul neg pad permute
    pixel_shuffle pow prelu reciprocal relu relu6 reshape roll rsqrt scaled_dot_product_attention select sigmoid
    silu sin slice softmax softplus split split_with_sizes sqrt squeeze stack sub sum sym_size t tanh transpose
    unbind unflatten unsqueeze var var_mean view where to upsample_bilinear2d upsample_nearest2d alias detach
    lift_fresh_copy"""
PROGRAM_OPERATORS = {"aten": frozenset(_ATEN.split()),
                     "quantized_decomposed": frozenset({"quantize_per_tensor", "dequantize_per_tensor",
                                                        "dequantize_per_channel"})}
TARGET = re.compile(r"torch\.ops\.(\w{1,40})\.(\w{1,60})\.(\w{1,40})")
PROGRAM_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
                  12: "bool"}  # by the numbers of torch's schema
GRAPH, WEIGHTS_TABLE, CONSTANTS_TABLE = ("models/model.json", "data/weights/model_weights_config.json",
                                         "data/constants/model_constants_config.json")
MAX_PROGRAM_NODES = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramCall:
    """A call of an operator: its name and overload, positional and named arguments, and the names of its results."""

    operator: tuple[str, str, str]
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

    def run(self, images: Tensor, stored: dict[str, Tensor], watch: Callable[[str, list[Any], Any], None] | None = None
            ) -> Tensor:
        """Return the logits.

        Args:
            images: (N, C, H, W) float32, on any device.
            stored: `tensors` as torch's.
            watch: called with operator, arguments and result of every call.
        """
        import torch
        importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers quantized_decomposed
        last = {each.name: index for index, call in enumerate(self.calls) for each in _named(call)}
        found: dict[str, Any] = {**stored, self.image: images}
        for index, call in enumerate(self.calls):
            space, name, overload = call.operator
            operator = getattr(getattr(getattr(torch.ops, space), name), overload)
            args, kwargs = ([_read(each, found) for each in call.args],
                            {key: _read(each, found) for key, each in call.kwargs.items()})
            result = operator(*args, **kwargs)
            if watch:
                watch(name, [*args, *kwargs.values()], result)
            found.update(zip(call.results, result if len(call.results) > 1 or isinstance(result, list) else [result],
                             strict=True))
            for each in _named(call):
                if last[each.name] == index and each.name != self.logits:
                    found.pop(each.name, None)
        logits: Tensor = found[self.logits]
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
        with zipfile.ZipFile(path) as archive:
            return _program(path, archive)
    except UNREADABLE_ARCHIVE as error:
        raise VerificationError(f"{path}: not a program of torch.export: {first_line(error)}") from error
    except (TypeError, AttributeError) as error:
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
    for table, folder in ((WEIGHTS_TABLE, "data/weights/"), (CONSTANTS_TABLE, "data/constants/")):
        for name, entry in document(table)["config"].items() if table in members else ():
            stored[name] = _numbers_of(name, entry, content(folder + str(entry["path_name"]), 2**32))
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
        known.update(calls[-1].results)
    if outputs[0] not in known:
        raise ValueError("no call gives the output")
    return TorchProgram(tensors=tensors, calls=calls, image=images[0], logits=outputs[0])


def _numbers_of(name: str, entry: dict[str, Any], content: bytes) -> np.ndarray:
    """Return a stored tensor. Raise ValueError for one that is pickled, a view, or not as long as its shape says."""
    meta = entry["tensor_meta"]
    sizes = [size["as_int"] for size in meta["sizes"]]
    dtype = PROGRAM_DTYPES[meta["dtype"]]
    strides, expected = [stride["as_int"] for stride in meta["strides"]], 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            raise ValueError(f"tensor {name[:60]!r} is stored as a view of another")
        expected *= size
    if entry.get("use_pickle") or meta["storage_offset"] != {"as_int": 0} or not all(
            isinstance(size, int) and 0 <= size < 2**31 for size in sizes):
        raise ValueError(f"tensor {name[:60]!r} is pickled or a view of another; this evaluator unpickles nothing")
    if len(content) != math.prod(sizes) * np.dtype(dtype).itemsize:
        raise ValueError(f"tensor {name[:60]!r} has {len(content):,} bytes, its shape {sizes[:9]} of {dtype} needs others")
    numbers = np.frombuffer(content, dtype).reshape(sizes)
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        raise ValueError(f"tensor {name[:60]!r} holds NaN or infinite values")
    return numbers


def _call(path: Path, node: dict[str, Any]) -> ProgramCall:
    """Return a node as a call. Raise VerificationError for an operator beyond the table."""
    found = TARGET.fullmatch(node["target"])
    if found is None or found[2] not in PROGRAM_OPERATORS.get(found[1], ()):
        raise VerificationError(f"{path}: operator {node['target'][:100]!r} is not one of those that image classifiers are "
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
    return ProgramCall(operator=(found[1], found[2], found[3]), args=args, kwargs=kwargs, results=results)


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
        return [_argument(each) for each in value]
    if kind in ("as_sym_int", "as_sym_ints"):
        each = [NamedValue(one["as_name"]) if "as_name" in one else int(one["as_int"])
                for one in (value if kind == "as_sym_ints" else [value])]
        return each if kind == "as_sym_ints" else each[0]
    if kind == "as_scalar_type":
        import torch
        return getattr(torch, PROGRAM_DTYPES[value])
    if kind in ("as_int", "as_float", "as_bool", "as_string", "as_ints", "as_floats", "as_bools"):
        return value
    raise ValueError(f"an argument of the kind {kind[:40]!r}")


def program_costs(path: Path, program: TorchProgram, input_shape: Sequence[int]) -> tuple[int, dict[str, int], int]:
    """Return multiply-adds for one image, other steps by call, and the number of logits, from shapes alone.

    Raises:
        VerificationError: a shape is over the limits, or an operator does not take its arguments.
    """
    import torch
    work: dict[str, int] = {}
    macs = total = 0

    def watch(name: str, args: list[Any], result: Any) -> None:
        nonlocal macs, total
        shapes = [tuple(each.shape) for each in args if isinstance(each, torch.Tensor)]
        results = [each for each in (result if isinstance(result, list | tuple) else [result])
                   if isinstance(each, torch.Tensor)]
        elements = sum(each.numel() for each in results)
        total += elements
        if elements > MAX_ACTIVATION_ELEMENTS or total > MAX_TOTAL_ELEMENTS:
            raise VerificationError(f"{path}: {name} gives {elements:,} elements, {total:,} with those before, over the "
                                    f"limits of {MAX_ACTIVATION_ELEMENTS:,} and {MAX_TOTAL_ELEMENTS:,}")
        steps = elements + sum(map(math.prod, shapes))
        if name in ("conv2d", "convolution"):
            macs += elements * math.prod(shapes[1][1:])
        elif name in ("linear", "matmul", "mm", "bmm", "addmm"):
            macs += elements * shapes[1 if name == "addmm" else 0][-1]
        elif name == "scaled_dot_product_attention":
            macs += elements * 2 * shapes[1][-2]
        elif name in ("avg_pool2d", "max_pool2d"):
            steps += elements * min(math.prod(args[1]), math.prod(shapes[0][2:]))
        elif name.startswith(("upsample", "adaptive")):
            steps *= 16
        work[f"{name} ({len(work)})"] = steps

    stored = {name: torch.empty(values.shape, dtype=getattr(torch, str(values.dtype)), device="meta")
              for name, values in program.tensors.items()}
    try:
        logits = program.run(torch.empty(1, *input_shape, device="meta"), stored, watch)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AttributeError) as error:
        raise VerificationError(f"{path}: not a program for one image of shape {list(input_shape)}: "
                                f"{first_line(error)}") from error
    if logits.dim() != 2 or len(logits) != 1:
        raise VerificationError(f"{path}: expected logits (N, classes), got {list(logits.shape)[:9]} for one image")
    return macs, work, int(logits.shape[1])
