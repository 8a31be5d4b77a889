"""What an ONNX file computes from constants alone: arithmetic on sizes, and weights that are stored in another form.

Every function works on NumPy arrays. Sizes are checked before an array is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from architectures.build import MAX_ACTIVATION_ELEMENTS
from architectures.onnx_network.graph import Array, OnnxGraph, OnnxNode

Inputs = list[Any]  # arrays, None for an input that is left out
MOST_FLOAT = 3.4e38  # a bound beyond it is none
MOST_CONSTANTS = 2**29  # numbers that are computed from constants, in all


def evaluate(node: OnnxNode, inputs: Inputs) -> list[Array]:
    """Return the outputs of a node whose inputs are known.

    Raises:
        NotExpressibleError: the operator is not one of those below, or its inputs do not fit it.
    """
    function = FUNCTIONS.get(node.op)
    if function is None:
        raise node.refuse("it is computed from constants, and is not among the operators for that")
    try:
        for array in inputs:
            if array is not None and array.size == 0:  # stored in no bytes, and of any shape
                sized(array.shape)
        with np.errstate(all="ignore"):
            found = function(node, inputs)
    except MemoryError as error:
        raise node.refuse("it is computed from constants, and takes more memory than there is") from error
    except (ValueError, TypeError, LookupError, OverflowError, ZeroDivisionError, AttributeError) as error:
        raise node.refuse("its constants do not fit it") from error
    return [np.asarray(array) for array in (found if isinstance(found, list) else [found])]


def fold(graph: OnnxGraph) -> None:
    """Compute what depends on constants alone, once, and leave those nodes out."""
    kept = []
    for node in graph.nodes:
        given = [name for name in node.inputs if name]
        if node.op != "Shape" and any(name not in graph.constants for name in given):
            kept.append(node)
            continue
        if node.op == "Shape" and given[0] not in graph.constants:
            kept.append(node)
            continue
        found = evaluate(node, [graph.constants.get(name) if name else None for name in node.inputs])
        check_total(graph, node, found)
        graph.constants |= dict(zip(node.outputs, found, strict=False))
        floats = {graph.origins.get(name, name) for name in given if graph.constants[name].dtype.kind == "f"
                  and graph.constants[name].size > 1}
        if len(floats) == 1 and node.op != "Constant":
            graph.origins |= dict.fromkeys(node.outputs, floats.pop())
    graph.nodes = kept


def check_total(graph: OnnxGraph, node: OnnxNode, found: Sequence[Array]) -> None:
    """Add what a node has computed to what the graph has.

    Raises:
        NotExpressibleError: it is too much in all.
    """
    graph.computed += sum(array.size for array in found)
    if graph.computed > MOST_CONSTANTS:
        raise node.refuse(f"{graph.computed:,} numbers are computed from constants, over the limit of {MOST_CONSTANTS:,}")


def listed(node: OnnxNode, inputs: Sequence[Any], key: str, position: int) -> list[int] | None:
    """Return whole numbers that are an attribute in older opsets and an input in newer ones; or None."""
    if key in node.attributes:
        value = node.attributes[key]
        return [int(entry) for entry in (value if isinstance(value, list) else [value])]
    if len(inputs) > position and inputs[position] is not None:
        return [int(entry) for entry in np.asarray(inputs[position]).reshape(-1)]
    return None


def sized(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape that may be allocated.

    Raises:
        ValueError: it has more numbers than any activation may have, also along the axes beside an empty one, or a
            negative size.
    """
    if min(shape, default=1) < 0 or math.prod(max(size, 1) for size in shape) > MAX_ACTIVATION_ELEMENTS:
        raise ValueError(f"a shape of {list(shape)}")
    return tuple(int(size) for size in shape)


def reshaped(shape: Sequence[int], target: Sequence[int], allow_zero: bool = False) -> tuple[int, ...]:
    """Return the shape that a Reshape to `target` gives: 0 keeps a size, -1 stands for what is left.

    Raises:
        ValueError: the sizes do not fit.
    """
    full = [shape[at] if size == 0 and not allow_zero else size for at, size in enumerate(target)]
    left = math.prod(size for size in full if size != -1)
    full = [math.prod(shape) // left if size == -1 and left else size for size in full]
    if math.prod(full) != math.prod(shape) or min(full, default=1) < 0:
        raise ValueError(f"{list(shape)} cannot become {list(target)}")
    return tuple(full)


def cuts_of(node: OnnxNode, inputs: Inputs, rank: int) -> list[tuple[int, slice]]:
    """Return the dimensions that a Slice cuts, and how."""
    starts, ends = listed(node, inputs, "starts", 1), listed(node, inputs, "ends", 2)
    axes, steps = listed(node, inputs, "axes", 3), listed(node, inputs, "steps", 4)
    assert starts is not None and ends is not None
    cuts = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        step = steps[number] if steps else 1
        stop = None if (step < 0 and end < -(2**31)) or (step > 0 and end >= 2**31 - 1) else end
        cuts.append(((axes[number] if axes else number) % rank, slice(start, stop, step)))
    return cuts


def split_sizes(node: OnnxNode, inputs: Inputs, size: int) -> list[int]:
    """Return the sizes of the parts of a Split along a dimension."""
    given = listed(node, inputs, "split", 1)
    if given is not None:
        return given
    parts = int(node.number("num_outputs", len(node.outputs)))
    if parts != len(node.outputs):
        raise ValueError(f"{parts} parts")
    each = -(-size // parts)
    return [min(each, size - each * number) for number in range(parts)]


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[OnnxNode, Inputs], Any]:
    def compute(node: OnnxNode, inputs: Inputs) -> Any:
        sized(np.broadcast_shapes(*(array.shape for array in inputs)))
        found = inputs[0]
        for other in inputs[1:]:
            found = function(found, other)
        return found
    return compute


def _unary(function: Callable[[Any], Any]) -> Callable[[OnnxNode, Inputs], Any]:
    return lambda node, inputs: np.asarray(function(inputs[0])).astype(inputs[0].dtype)


def _divide(first: Array, second: Array) -> Any:
    if first.dtype.kind == "f":
        return first / second
    return (np.sign(first) * np.sign(second) * (abs(first) // abs(second))).astype(first.dtype)  # ONNX rounds to zero


def _reduce(function: Callable[..., Any]) -> Callable[[OnnxNode, Inputs], Any]:
    def compute(node: OnnxNode, inputs: Inputs) -> Any:
        axes = listed(node, inputs, "axes", 1)
        if not axes and node.number("noop_with_empty_axes", 0):
            return inputs[0]
        found = function(inputs[0], axis=tuple(axes) if axes else None, keepdims=bool(node.number("keepdims", 1)))
        return np.asarray(found).astype(inputs[0].dtype)
    return compute


def _constant(node: OnnxNode, inputs: Inputs) -> Any:
    if "value" in node.attributes:
        return node.attributes["value"]
    key = next(iter(node.attributes))
    return np.asarray(node.attributes[key], np.int64 if "int" in key else np.float32)


def _cast(node: OnnxNode, inputs: Inputs) -> Any:
    from onnx import helper
    return inputs[0].astype(helper.tensor_dtype_to_np_dtype(node.number("to", 1)))


def _constant_of_shape(node: OnnxNode, inputs: Inputs) -> Any:
    value = np.asarray(node.number("value", np.zeros(1, np.float32))).reshape(-1)[0]
    return np.full(sized(inputs[0].tolist()), value)


def _range(node: OnnxNode, inputs: Inputs) -> Any:
    start, stop, step = (array.reshape(-1)[0] for array in inputs)
    sized([max(0, math.ceil((stop - start) / step))])
    return np.arange(start, stop, step, dtype=inputs[0].dtype)


def _gather(node: OnnxNode, inputs: Inputs) -> Any:
    data, indices = inputs
    at = node.number("axis", 0) % data.ndim
    sized([*data.shape[:at], *indices.shape, *data.shape[at + 1:]])
    return np.take(data, indices, axis=at)


def _gather_nd(node: OnnxNode, inputs: Inputs) -> Any:
    data, indices = inputs
    if node.number("batch_dims", 0):
        raise ValueError("batch_dims")
    sized([*indices.shape[:-1], *data.shape[indices.shape[-1]:]])
    return data[tuple(np.moveaxis(indices, -1, 0))]


def _concatenate(node: OnnxNode, inputs: Inputs) -> Any:
    at, first = node.number("axis", 0) % inputs[0].ndim, inputs[0].shape
    sized([*first[:at], sum(array.shape[at] for array in inputs), *first[at + 1:]])
    return np.concatenate(inputs, at)


def _slice(node: OnnxNode, inputs: Inputs) -> Any:
    cuts = [slice(None)] * inputs[0].ndim
    for at, cut in cuts_of(node, inputs, inputs[0].ndim):
        cuts[at] = cut
    return inputs[0][tuple(cuts)]


def _split(node: OnnxNode, inputs: Inputs) -> list[Array]:
    at = node.number("axis", 0)
    sizes = split_sizes(node, inputs, inputs[0].shape[at])
    return np.split(inputs[0], np.cumsum(sizes)[:-1].tolist(), axis=at)


def _squeeze(node: OnnxNode, inputs: Inputs) -> Any:
    axes = listed(node, inputs, "axes", 1)
    return np.squeeze(inputs[0], None if axes is None else tuple(axes))


def _unsqueeze(node: OnnxNode, inputs: Inputs) -> Any:
    return np.expand_dims(inputs[0], tuple(listed(node, inputs, "axes", 1) or ()))


def _expand(node: OnnxNode, inputs: Inputs) -> Any:
    shape = sized(np.broadcast_shapes(inputs[0].shape, sized(inputs[1].tolist())))
    return np.broadcast_to(inputs[0], shape).copy()


def _tile(node: OnnxNode, inputs: Inputs) -> Any:
    sized([size * int(times) for size, times in zip(inputs[0].shape, inputs[1], strict=True)])
    return np.tile(inputs[0], inputs[1])


def _pad(node: OnnxNode, inputs: Inputs) -> Any:
    pads, rank = listed(node, inputs, "pads", 1) or [], inputs[0].ndim
    if node.number("mode", "constant") != "constant" or len(pads) != 2 * rank or node.has(3):
        raise ValueError("pads")
    width = list(zip(pads[:rank], pads[rank:], strict=True))
    sized([size + sum(pair) for size, pair in zip(inputs[0].shape, width, strict=True)])
    value = inputs[2].reshape(-1)[0] if len(inputs) > 2 and inputs[2] is not None else node.number("value", 0)
    return np.pad(inputs[0], width, constant_values=value)


def _transpose(node: OnnxNode, inputs: Inputs) -> Any:
    return np.transpose(inputs[0], node.number("perm", None))


def _dequantize(node: OnnxNode, inputs: Inputs) -> Any:
    data, scale = inputs[0], inputs[1]
    zero = inputs[2] if len(inputs) > 2 and inputs[2] is not None else np.zeros_like(scale, data.dtype)
    if scale.size > 1:
        if node.number("block_size", 0):
            raise ValueError("blocks")
        shape = [1] * data.ndim
        shape[node.number("axis", 1) % data.ndim] = scale.size
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    elif scale.size == 1:
        scale, zero = scale.reshape(()), zero.reshape(())
    sized(np.broadcast_shapes(data.shape, scale.shape, zero.shape))
    return ((data.astype(np.int32) - zero.astype(np.int32)) * scale).astype(np.float32)


def _matmul(node: OnnxNode, inputs: Inputs) -> Any:
    first, second = inputs[:2]
    sized([*np.broadcast_shapes(first.shape[:-2], second.shape[:-2]), *first.shape[-2:-1], *second.shape[-1:]])
    return first @ second


def _gemm(node: OnnxNode, inputs: Inputs) -> Any:
    first = inputs[0].T if node.number("transA", 0) else inputs[0]
    second = inputs[1].T if node.number("transB", 0) else inputs[1]
    sized([first.shape[0], second.shape[1]])
    found = node.number("alpha", 1.0) * (first @ second)
    if len(inputs) > 2 and inputs[2] is not None:
        sized(np.broadcast_shapes(found.shape, inputs[2].shape))
        found = found + node.number("beta", 1.0) * inputs[2]
    return found.astype(first.dtype)


def _scatter(node: OnnxNode, inputs: Inputs) -> Any:
    if node.number("reduction", "none") != "none":
        raise ValueError("reduction")
    data = inputs[0].copy()
    data[tuple(np.moveaxis(inputs[1], -1, 0))] = inputs[2]
    return data


def _shape(node: OnnxNode, inputs: Inputs) -> Any:
    return np.asarray(inputs[0].shape[node.number("start", 0):node.number("end", None)], np.int64)


def _clip(node: OnnxNode, inputs: Inputs) -> Any:
    low, high = limits(node, inputs)
    return np.clip(inputs[0], low, high).astype(inputs[0].dtype)


def limits(node: OnnxNode, inputs: Inputs) -> tuple[float | None, float | None]:
    """Return the bounds of a Clip, which are attributes in older opsets and inputs in newer ones."""
    given = [node.attributes.get(key) if key in node.attributes else
             float(inputs[at].reshape(-1)[0]) if len(inputs) > at and inputs[at] is not None else None
             for at, key in ((1, "min"), (2, "max"))]
    low, high = (None if value is None or abs(value) > MOST_FLOAT else float(value) for value in given)
    return low, high


def _erf(values: Array) -> Any:
    return np.vectorize(math.erf, otypes=[float])(values)


def _where(node: OnnxNode, inputs: Inputs) -> Any:
    condition, first, second = inputs
    sized(np.broadcast_shapes(condition.shape, first.shape, second.shape))
    return np.asarray(np.where(condition, first, second)).astype(first.dtype)


def _softmax(node: OnnxNode, inputs: Inputs) -> Any:
    """Before opset 13 it goes over all axes from the one named on."""
    values = inputs[0]
    at = node.number("axis", -1 if node.opset >= 13 else 1) % values.ndim
    over = at if node.opset >= 13 else tuple(range(at, values.ndim))
    powers = np.exp(values - values.max(over, keepdims=True))
    return powers / powers.sum(over, keepdims=True)


FUNCTIONS: dict[str, Callable[[OnnxNode, Inputs], Any]] = {
    "Constant": _constant, "Cast": _cast, "ConstantOfShape": _constant_of_shape, "Range": _range, "Gather": _gather,
    "Slice": _slice, "Split": _split, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Expand": _expand, "Tile": _tile,
    "Pad": _pad, "Transpose": _transpose, "DequantizeLinear": _dequantize, "MatMul": _matmul, "Gemm": _gemm,
    "ScatterND": _scatter, "Shape": _shape, "Where": _where, "Softmax": _softmax,
    "Identity": lambda node, inputs: inputs[0], "Dropout": lambda node, inputs: inputs[0],
    "Reshape": lambda node, inputs: inputs[0].reshape(reshaped(inputs[0].shape, inputs[1].tolist(),
                                                               bool(node.number("allowzero", 0)))),
    "Flatten": lambda node, inputs: inputs[0].reshape(math.prod(inputs[0].shape[:node.number("axis", 1)]), -1),
    "Concat": _concatenate, "GatherND": _gather_nd,
    "CumSum": lambda node, inputs: np.cumsum(inputs[0], int(inputs[1])).astype(inputs[0].dtype),
    "Add": _binary(np.add), "Sub": _binary(np.subtract), "Mul": _binary(np.multiply), "Div": _binary(_divide),
    "Mod": _binary(lambda a, b: np.fmod(a, b) if a.dtype.kind == "f" else np.mod(a, b)),
    "Pow": _binary(lambda a, b: np.power(a, b).astype(a.dtype)), "Min": _binary(np.minimum), "Max": _binary(np.maximum),
    "Sum": _binary(np.add), "Equal": _binary(np.equal), "Less": _binary(np.less), "LessOrEqual": _binary(np.less_equal),
    "Greater": _binary(np.greater), "GreaterOrEqual": _binary(np.greater_equal), "And": _binary(np.logical_and),
    "Clip": _clip, "Or": _binary(np.logical_or), "Not": lambda node, inputs: np.logical_not(inputs[0]),
    "Sqrt": _unary(np.sqrt), "Reciprocal": _unary(np.reciprocal), "Exp": _unary(np.exp), "Log": _unary(np.log),
    "Neg": _unary(np.negative), "Abs": _unary(np.abs), "Floor": _unary(np.floor), "Ceil": _unary(np.ceil),
    "Round": _unary(np.round), "Erf": _unary(_erf), "Tanh": _unary(np.tanh), "Sin": _unary(np.sin), "Cos": _unary(np.cos),
    "Sigmoid": _unary(lambda values: 1 / (1 + np.exp(-values))), "Relu": _unary(lambda values: np.maximum(values, 0)),
    "ReduceProd": _reduce(np.prod), "ReduceSum": _reduce(np.sum), "ReduceMean": _reduce(np.mean),
    "ReduceMax": _reduce(np.max), "ReduceMin": _reduce(np.min),
    "ReduceL2": _reduce(lambda values, **options: np.sqrt(np.square(values).sum(**options)))}
