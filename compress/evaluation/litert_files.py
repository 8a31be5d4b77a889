"""Check `.tflite` files without running them: their tensors, operators and costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from architectures.build import MAX_ACTIVATION_ELEMENTS, MAX_TOTAL_ELEMENTS
from architectures.counting import check_costs
from compress.evaluation.flat_tables import MAX_ENTRIES_OF_LIST, FlatTable
from architectures.image_layout import takes_channels_last
from metadata.errors import VerificationError
from metadata.files import check_download

MAX_LITERT_BYTES = 2**31  # a FlatBuffer's limit
CUSTOM = 32
# The operators of image classifiers by their codes in the schema. Others are refused: loops and calls, state, random
# numbers, tables, sparse matrices and sequences, and whatever hostile files may find in a runtime's rarer kernels.
LITERT_OPERATORS = {
    0: "ADD", 1: "AVERAGE_POOL_2D", 2: "CONCATENATION", 3: "CONV_2D", 4: "DEPTHWISE_CONV_2D", 5: "DEPTH_TO_SPACE",
    6: "DEQUANTIZE", 8: "FLOOR", 9: "FULLY_CONNECTED", 11: "L2_NORMALIZATION", 13: "LOCAL_RESPONSE_NORMALIZATION",
    14: "LOGISTIC", 17: "MAX_POOL_2D", 18: "MUL", 19: "RELU", 20: "RELU_N1_TO_1", 21: "RELU6", 22: "RESHAPE",
    23: "RESIZE_BILINEAR", 25: "SOFTMAX", 26: "SPACE_TO_DEPTH", 28: "TANH", 34: "PAD", 36: "GATHER",
    37: "BATCH_TO_SPACE_ND", 38: "SPACE_TO_BATCH_ND", 39: "TRANSPOSE", 40: "MEAN", 41: "SUB", 42: "DIV", 43: "SQUEEZE",
    45: "STRIDED_SLICE", 47: "EXP", 49: "SPLIT", 50: "LOG_SOFTMAX", 53: "CAST", 54: "PRELU", 55: "MAXIMUM", 57: "MINIMUM",
    59: "NEG", 60: "PADV2", 65: "SLICE", 67: "TRANSPOSE_CONV", 70: "EXPAND_DIMS", 73: "LOG", 74: "SUM", 75: "SQRT",
    76: "RSQRT", 77: "SHAPE", 78: "POW", 82: "REDUCE_MAX", 83: "PACK", 88: "UNPACK", 89: "REDUCE_MIN", 92: "SQUARE",
    97: "RESIZE_NEAREST_NEIGHBOR", 98: "LEAKY_RELU", 99: "SQUARED_DIFFERENCE", 100: "MIRROR_PAD", 101: "ABS",
    102: "SPLIT_V", 104: "CEIL", 106: "ADD_N", 111: "ELU", 114: "QUANTIZE", 116: "ROUND", 117: "HARD_SWISH",
    126: "BATCH_MATMUL", 130: "BROADCAST_TO", 150: "GELU", 152: "RELU_0_TO_1"}
# Bits of a number by its code in the schema, and its name; other types (texts, complex numbers, handles) are refused.
TYPES = {0: (32, "float32"), 1: (16, "float16"), 2: (32, "int32"), 3: (8, "uint8"), 4: (64, "int64"), 6: (8, "bool"),
         7: (16, "int16"), 9: (8, "int8"), 17: (4, "int4")}
IMAGES = ("float32", "int8", "uint8", "int16")  # types of images and logits
QUANTIZED = ("int8", "uint8", "int16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a `.tflite` file.

    Args:
        shape: one number is 0 only where the tensor is empty; of a tensor that is computed, what the file states.
        dtype: NumPy's name of its type, or "int4".
        buffer: the number of the buffer with its values; 0 where it is computed.
        scale, zero_point: of all its numbers, where there is one pair; else None.
    """

    shape: tuple[int, ...]
    dtype: str
    buffer: int
    scale: float | None
    zero_point: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredOperator:
    """An operator of a `.tflite` file.

    Args:
        name: as the schema spells it.
        inputs: the numbers of the tensors that it reads; -1 for one that is left out.
        outputs: the numbers of those that it writes.
        window: height and width of a pool's.
        transposed: whether a matrix product takes its first factor transposed.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    window: tuple[int, int]
    transposed: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class LitertFile:
    """What a checked `.tflite` file holds.

    Args:
        content: its bytes.
        parameters: the number of stored numbers.
        macs: multiply-adds an image, by the shapes that the file states.
        operators: in their order.
        batch: the number of images that a call has.
        channels_last: whether the input is (N, H, W, C).
        input, output: the tensors of images and of logits.
        shapes: of all tensors, as the file states them.
    """

    content: bytes
    parameters: int
    macs: int
    operators: tuple[StoredOperator, ...]
    batch: int
    channels_last: bool
    input: StoredTensor
    output: StoredTensor
    shapes: tuple[tuple[int, ...], ...]


def read_litert(path: Path, input_shape: Sequence[int], layout: str | None = None) -> LitertFile:
    """Check a `.tflite` file without running it: images in, one row of logits an image out.

    Args:
        path: the file.
        input_shape: (C, H, W) of an image, also where the file takes (N, H, W, C), as most files do.
        layout: "NCHW" or "NHWC" where the metadata state it.

    Raises:
        VerificationError: not such a file, damaged, operators beyond the table above, several inputs or outputs, images of
            another shape, data outside the file, NaN or infinite weights, or sizes over the limits.
    """
    if path.stat().st_size >= MAX_LITERT_BYTES:
        raise VerificationError(f"{path}: {path.stat().st_size:,} bytes are over the limit of 2 GB for a .tflite file")
    check_download(path)
    content = path.read_bytes()
    model = FlatTable.root(path, content, b"TFL3")
    graphs = model.tables(2)
    if len(graphs) != 1:
        raise VerificationError(f"{path}: expected one graph, got {len(graphs)}: loops, branches and several entry points "
                                "are not supported")
    buffers = _buffers(path, model)
    tensors = [_tensor(path, table, buffers) for table in graphs[0].tables(0)]
    _check_sizes(path, tensors)
    operators = _operators(path, model, graphs[0], len(tensors))
    image, logits = (tensors[_only(path, graphs[0], field, what, len(tensors))]
                     for field, what in ((1, "input"), (2, "output")))
    if len(image.shape) != 4 or image.shape[0] < 1 or image.dtype not in IMAGES or image.buffer:
        raise VerificationError(f"{path}: expected an input of float32, int8, uint8 or int16 images (N, H, W, C), got "
                                f"{image.dtype} with {len(image.shape)} dimensions")
    if logits.dtype not in IMAGES:
        raise VerificationError(f"{path}: the output is {logits.dtype}, expected logits in float32, int8, uint8 or int16")
    for what, tensor in (("input", image), ("output", logits)):
        if tensor.dtype in QUANTIZED and not tensor.scale:
            raise VerificationError(f"{path}: the {what} is {tensor.dtype} and states no scale, so nobody knows what its "
                                    "numbers mean")
    channels_last = takes_channels_last(path, image.shape, input_shape, layout, usual="NHWC")
    _check_numbers(path, content, tensors, buffers)
    shapes = tuple(tensor.shape for tensor in tensors)
    macs, work = litert_costs(operators, shapes, image.shape[0])
    check_costs(str(path), macs, work)
    used = {tensor.buffer: tensor for tensor in tensors if tensor.buffer}
    return LitertFile(
        content=content, parameters=sum(math.prod(tensor.shape) for tensor in used.values()), macs=macs,
        operators=tuple(operators), batch=image.shape[0], channels_last=channels_last, input=image, output=logits,
        shapes=shapes)


def _buffers(path: Path, model: FlatTable) -> list[tuple[int, int]]:
    """Return where each buffer begins and its bytes. Raise VerificationError for data outside of the FlatBuffer."""
    if model.tables(8) or model.tables(9):
        raise VerificationError(f"{path}: its weights lie in other files; write them into the .tflite file")
    found = []
    for table in model.tables(4):
        if table.number(1, "Q") > 1 or table.number(2, "Q") > 1:
            raise VerificationError(f"{path}: its weights lie behind the end of the model; write them into the model")
        found.append(table.data(0))
    return found


def _tensor(path: Path, table: FlatTable, buffers: Sequence[tuple[int, int]]) -> StoredTensor:
    """Return a tensor. Raise VerificationError where its type, shape and bytes do not fit together."""
    code, shape, name = table.number(1, "b"), tuple(table.numbers(0, "i4").tolist()), table.text(3)
    if code not in TYPES:
        raise VerificationError(f"{path}: tensor {name!r} is of the type {code}, expected numbers of at most 64 bits")
    bits, dtype = TYPES[code]
    if len(shape) > 8 or min(shape, default=1) < 0:
        raise VerificationError(f"{path}: tensor {name!r} has the shape {list(shape)[:9]}")
    if table.number(5, "B") or table.table(6) or table.tables(9) or table.number(10, "I"):
        raise VerificationError(f"{path}: tensor {name!r} is sparse, or keeps a state between calls; that is not supported")
    buffer = table.number(2, "I")
    if buffer >= max(1, len(buffers)):
        raise VerificationError(f"{path}: tensor {name!r} names buffer {buffer:,} of {len(buffers):,}")
    held = buffers[buffer][1] if buffers else 0
    if held and held != (math.prod(shape) * bits + 7) // 8:
        raise VerificationError(f"{path}: tensor {name!r} has {held:,} bytes, its shape {list(shape)} of {dtype} needs "
                                f"{(math.prod(shape) * bits + 7) // 8:,}")
    scale: float | None = None
    zero_point: int | None = None
    if quantized := table.table(4):
        scales, zeros = quantized.numbers(2, "f4"), quantized.numbers(3, "i8")
        if not np.isfinite(scales).all() or (scales < 0).any() or len(zeros) not in (0, 1, len(scales)):
            raise VerificationError(f"{path}: tensor {name!r} has {len(scales)} scales and {len(zeros)} zero points; "
                                    "expected positive numbers, as many of the one as of the other")
        if len(scales) == 1:
            scale, zero_point = float(scales[0]), int(zeros[0]) if len(zeros) else 0
    return StoredTensor(shape=shape, dtype=dtype, buffer=buffer if held else 0, scale=scale, zero_point=zero_point)


def _check_sizes(path: Path, tensors: Sequence[StoredTensor]) -> None:
    """Raise VerificationError for tensors over the limits."""
    total = 0
    for index, tensor in enumerate(tensors):
        elements = math.prod(tensor.shape)
        total += elements
        if elements > MAX_ACTIVATION_ELEMENTS or total > MAX_TOTAL_ELEMENTS:
            raise VerificationError(f"{path}: tensor {index} has {elements:,} elements, {total:,} with those before, over "
                                    f"the limits of {MAX_ACTIVATION_ELEMENTS:,} and {MAX_TOTAL_ELEMENTS:,}")


def _operators(path: Path, model: FlatTable, graph: FlatTable, tensors: int) -> list[StoredOperator]:
    """Return the operators. Raise VerificationError for one that is not in the table, or names no tensor."""
    names = []
    for table in model.tables(1):
        code = max(table.number(0, "b"), table.number(3, "i"))  # the first is of older files
        if code == CUSTOM:
            name = table.text(1)
            more = "; it is TensorFlow's own, and no LiteRT runtime has it" if name.startswith("Flex") else ""
            raise VerificationError(f"{path}: the custom operator {name!r} is not one of those that image classifiers are "
                                    f"made of{more}; convert with built-in operators only")
        if code not in LITERT_OPERATORS:
            raise VerificationError(f"{path}: operator {code} of the schema is not one of those that image classifiers are "
                                    "made of")
        names.append(LITERT_OPERATORS[code])
    found: list[StoredOperator] = []
    mentioned = 0
    for table in graph.tables(3):
        which = table.number(0, "I")
        inputs, outputs = (tuple(table.numbers(field, "i4").tolist()) for field in (1, 2))
        mentioned += len(inputs) + len(outputs)
        if which >= len(names) or mentioned > MAX_ENTRIES_OF_LIST or not outputs or not inputs or not (
                min(inputs) >= -1 and min(outputs) >= 0 and max((*inputs, *outputs)) < tensors):
            raise VerificationError(f"{path}: operator {len(found)} names a tensor or an operator that is not there")
        options = table.table(4) if names[which].endswith(("POOL_2D", "BATCH_MATMUL")) else None
        product = names[which] == "BATCH_MATMUL"
        found.append(StoredOperator(
            name=names[which], inputs=inputs, outputs=outputs,
            window=(options.number(4, "i"), options.number(3, "i")) if options and not product else (1, 1),
            transposed=bool(options and product and options.number(0, "B"))))
    return found


def _only(path: Path, graph: FlatTable, field: int, what: str, tensors: int) -> int:
    """Return the number of the graph's only input or output."""
    numbers = graph.numbers(field, "i4").tolist()
    if len(numbers) != 1 or not 0 <= numbers[0] < tensors:
        raise VerificationError(f"{path}: expected one {what}, got {len(numbers)}")
    return int(numbers[0])


def _check_numbers(path: Path, content: bytes, tensors: Sequence[StoredTensor], buffers: Sequence[tuple[int, int]]
                   ) -> None:
    """Raise VerificationError for stored floats that are NaN or infinite."""
    floats = {tensor.buffer: tensor for tensor in tensors if tensor.buffer and tensor.dtype.startswith("float")}
    for tensor in floats.values():
        start, held = buffers[tensor.buffer]
        values = np.frombuffer(content, tensor.dtype, held // np.dtype(tensor.dtype).itemsize, start)
        if not np.isfinite(values).all():
            raise VerificationError(f"{path}: a tensor of shape {list(tensor.shape)} holds NaN or infinite values")


def litert_costs(operators: Sequence[StoredOperator], shapes: Sequence[Sequence[int]], batch: int
                 ) -> tuple[int, dict[str, int]]:
    """Return the multiply-adds for one image, and the other steps of each operator as the layer table counts them.

    Args:
        operators: of the graph.
        shapes: of all tensors.
        batch: images in a call.
    """
    macs, work = 0, {}
    for index, operator in enumerate(operators):
        read = [shapes[number] for number in operator.inputs if number >= 0]
        written = sum(math.prod(shapes[number]) for number in operator.outputs)
        steps = sum(map(math.prod, read)) + written
        if operator.name == "CONV_2D" and len(read) > 1:  # the filter is (out, H, W, in / groups)
            macs += written * math.prod(read[1][1:])
        elif operator.name == "DEPTHWISE_CONV_2D" and len(read) > 1:  # (1, H, W, channels)
            macs += written * math.prod(read[1][1:3])
        elif operator.name == "TRANSPOSE_CONV" and len(read) > 2:  # a shape, (out, H, W, in), images
            macs += math.prod(read[2]) * math.prod(read[1][:3])
        elif operator.name == "FULLY_CONNECTED" and len(read) > 1:
            macs += written * (read[1][-1] if read[1] else 1)
        elif operator.name == "BATCH_MATMUL" and read:
            macs += written * (read[0][-2 if operator.transposed else -1] if len(read[0]) > 1 else 1)
        elif operator.name.endswith("POOL_2D"):
            steps += written * max(1, math.prod(min(size, most) for size, most in zip(
                operator.window, (*read[0][1:3], 1, 1), strict=False)))
        elif operator.name.startswith("RESIZE"):
            steps += 16 * steps
        work[f"{operator.name} ({index})"] = steps // max(1, batch)
    return macs // max(1, batch), work
