"""A `.tflite` file under construction: tensors, operators and buffers, packed with the schema in the runtime's wheel."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metadata.errors import UserError

# The version of an operator in the schema for float32 and for int8 tensors: the lowest that has what is written here.
VERSIONS = {
    "ADD": (1, 2), "AVERAGE_POOL_2D": (1, 2), "BATCH_MATMUL": (1, 2), "CONCATENATION": (1, 2), "CONV_2D": (1, 3),
    "DEPTHWISE_CONV_2D": (2, 3), "DEQUANTIZE": (1, 2), "FULLY_CONNECTED": (1, 12), "GATHER": (1, 2), "GELU": (1, 2),
    "LEAKY_RELU": (1, 2), "LOGISTIC": (1, 2), "MAXIMUM": (1, 2), "MAX_POOL_2D": (1, 2), "MEAN": (1, 2), "MINIMUM": (1, 2),
    "MUL": (1, 2), "PAD": (1, 2), "PADV2": (1, 2), "RELU": (1, 2), "RELU6": (1, 2), "RESIZE_BILINEAR": (3, 3),
    "RESIZE_NEAREST_NEIGHBOR": (1, 2), "SLICE": (1, 2), "SOFTMAX": (1, 2), "STRIDED_SLICE": (1, 2), "SUB": (1, 2),
    "TANH": (1, 2), "TRANSPOSE": (1, 2)}
ALIGNMENT = 16  # of a buffer's first byte, as the schema demands
FORMAT_VERSION = 3


def schema() -> Any:
    """Return the classes of the schema.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return importlib.import_module("ai_edge_litert.schema_py_generated")
    except ImportError as error:
        raise UserError("export.format litert: the packages that write .tflite files are not installed; pip install "
                        "ai-edge-litert flatbuffers") from error


@dataclasses.dataclass(frozen=True)
class Grid:
    """What the levels of an int8 tensor stand for: `scale` times (level - `zero_point`)."""

    scale: float
    zero_point: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """A tensor of the file.

    Args:
        index: its number in the file.
        shape: in the file's order of axes, for one image.
        order: the file's axis i is the network's axis `order[i]`. Images lie as (N, H, W, C), which is (0, 2, 3, 1) of
            (N, C, H, W); a permutation of axes changes the order alone, and nothing is moved until somebody needs it.
        grid: of an int8 tensor; None for float32.
    """

    index: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    grid: Grid | None = None


class _Quantization:
    """The scales and zero points of a tensor. Tables of a FlatBuffer may share a list: equal ones are written once."""

    def __init__(self, schema: Any, scales: NDArray[Any], zero_points: NDArray[Any], axis: int, known: dict[bytes, int]
                 ) -> None:
        self.schema, self.axis, self.known = schema, axis, known
        self.lists = scales.astype(np.float32), zero_points.astype(np.int64)

    def Pack(self, builder: Any) -> int:  # noqa: N802 - as the schema's own classes are packed
        offsets = []
        for values in self.lists:
            key = values.dtype.char.encode() + values.tobytes()
            if key not in self.known:
                self.known[key] = builder.CreateNumpyVector(values)
            offsets.append(self.known[key])
        self.schema.QuantizationParametersStart(builder)
        self.schema.QuantizationParametersAddScale(builder, offsets[0])
        self.schema.QuantizationParametersAddZeroPoint(builder, offsets[1])
        self.schema.QuantizationParametersAddQuantizedDimension(builder, self.axis)
        return int(self.schema.QuantizationParametersEnd(builder))


class ModelBuilder:
    """The file under construction."""

    def __init__(self) -> None:
        self.schema = schema()
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: dict[tuple[str, int], int] = {}
        self.buffers: list[Any] = [self.schema.BufferT()]  # the first one is that of all tensors without values
        self.vectors: dict[bytes, int] = {}
        self.stored: dict[tuple[str, tuple[int, ...], bytes], int] = {}

    def tensor(self, name: str, shape: Sequence[int], dtype: str = "float32", buffer: int = 0, grid: Grid | None = None,
               scales: NDArray[Any] | None = None, axis: int = 0) -> int:
        """Add a tensor and return its number.

        Args:
            name: for people who look at the file; "" for none.
            shape: in the file's order of axes.
            dtype: "float32", "int8" or "int32".
            buffer: the number of the buffer with its values; 0: it is computed.
            grid: of an int8 tensor.
            scales: of int8 weights, one for each output channel, along `axis`.
        """
        schema, quantization = self.schema, None
        if scales is not None:
            quantization = _Quantization(schema, scales, np.zeros(len(scales)), axis, self.vectors)
        elif grid is not None:
            quantization = _Quantization(schema, np.array([grid.scale]), np.array([grid.zero_point]), 0, self.vectors)
        kind = {"float32": schema.TensorType.FLOAT32, "int8": schema.TensorType.INT8, "int32": schema.TensorType.INT32}
        self.tensors.append(schema.TensorT(shape=np.array(shape, np.int32), type=kind[dtype], buffer=buffer,
                                           name=name or None, quantization=quantization, hasRank=True))
        return len(self.tensors) - 1

    def constant(self, values: NDArray[Any], grid: Grid | None = None, scales: NDArray[Any] | None = None,
                 axis: int = 0) -> int:
        """Add a tensor with values and return its number; equal plain ones are stored once. See `tensor`.

        It gets no name: in a small network names would be a large part of the file.
        """
        values = np.ascontiguousarray(values)
        plain = grid is None and scales is None
        key = (str(values.dtype), values.shape, values.tobytes())
        if plain and key in self.stored:
            return self.stored[key]
        self.buffers.append(self.schema.BufferT(data=values.reshape(-1).view(np.uint8)))
        index = self.tensor("", values.shape, str(values.dtype), len(self.buffers) - 1, grid, scales, axis)
        if plain:
            self.stored[key] = index
        return index

    def operator(self, kind: str, inputs: Sequence[int], output: int, options: Any = None, int8: bool = False) -> None:
        """Add an operator.

        Args:
            kind: as the schema names it.
            inputs: numbers of tensors; -1 for one that is left out.
            output: the number of the tensor that it writes.
            options: an object of a class of the schema.
            int8: whether it computes with integers, which decides the version.
        """
        schema = self.schema
        version = VERSIONS.get(kind, (1, 1))[int8]
        code = self.codes.setdefault((kind, version), len(self.codes))
        of = type(options).__name__.removesuffix("T") if options is not None else "NONE"
        self.operators.append(schema.OperatorT(
            opcodeIndex=code, inputs=np.array(inputs, np.int32), outputs=np.array([output], np.int32),
            builtinOptionsType=getattr(schema.BuiltinOptions, of), builtinOptions=options))

    def _without_unused(self, images: int, logits: int) -> tuple[int, int]:
        """Drop operators, tensors and buffers that the output does not need; return the new numbers of input and output."""
        needed, kept = {images, logits}, []
        for operator in reversed(self.operators):
            if not needed.isdisjoint(operator.outputs.tolist()):
                needed.update(number for number in operator.inputs.tolist() if number >= 0)
                kept.append(operator)
        places = {old: new for new, old in enumerate(sorted(needed))} | {-1: -1}
        self.operators, self.tensors = kept[::-1], [self.tensors[old] for old in sorted(needed)]
        for operator in self.operators:
            operator.inputs, operator.outputs = (np.array([places[number] for number in numbers.tolist()], np.int32)
                                                 for numbers in (operator.inputs, operator.outputs))
        held = {old: new for new, old in enumerate(sorted({0, *(tensor.buffer for tensor in self.tensors)}))}
        self.buffers = [self.buffers[old] for old in held]
        for tensor in self.tensors:
            tensor.buffer = held[tensor.buffer]
        used = sorted({operator.opcodeIndex for operator in self.operators})
        self.codes = {key: used.index(code) for key, code in self.codes.items() if code in used}
        for operator in self.operators:
            operator.opcodeIndex = used.index(operator.opcodeIndex)
        return places[images], places[logits]

    def pack(self, images: int, logits: int) -> bytes:
        """Return the file, given the numbers of its input and its output."""
        import flatbuffers
        images, logits = self._without_unused(images, logits)
        schema = self.schema
        codes = []
        for kind, version in self.codes:
            number = getattr(schema.BuiltinOperator, kind)
            codes.append(schema.OperatorCodeT(deprecatedBuiltinCode=min(number, 127), builtinCode=number, version=version))
        graph = schema.SubGraphT(tensors=self.tensors, operators=self.operators, name="main",
                                 inputs=np.array([images], np.int32), outputs=np.array([logits], np.int32))
        held = sum(buffer.data.nbytes for buffer in self.buffers if buffer.data is not None)
        builder = flatbuffers.Builder(held + 2**16)
        buffers = [_pack_buffer(schema, builder, buffer.data) for buffer in self.buffers]
        schema.ModelStartBuffersVector(builder, len(buffers))
        for offset in reversed(buffers):
            builder.PrependUOffsetTRelative(offset)
        buffer_list = builder.EndVector()
        graph_offset, code_offsets = graph.Pack(builder), [code.Pack(builder) for code in codes]
        schema.ModelStartSubgraphsVector(builder, 1)
        builder.PrependUOffsetTRelative(graph_offset)
        graphs = builder.EndVector()
        schema.ModelStartOperatorCodesVector(builder, len(codes))
        for offset in reversed(code_offsets):
            builder.PrependUOffsetTRelative(offset)
        code_list = builder.EndVector()
        description = builder.CreateString("compress")
        schema.ModelStart(builder)
        schema.ModelAddVersion(builder, FORMAT_VERSION)
        schema.ModelAddOperatorCodes(builder, code_list)
        schema.ModelAddSubgraphs(builder, graphs)
        schema.ModelAddDescription(builder, description)
        schema.ModelAddBuffers(builder, buffer_list)
        builder.Finish(schema.ModelEnd(builder), b"TFL3")
        return bytes(builder.Output())


def _pack_buffer(schema: Any, builder: Any, data: NDArray[np.uint8] | None) -> int:
    """Pack a buffer, its first byte aligned, and return its offset. The schema's own classes align to one byte."""
    vector = None
    if data is not None:
        builder.StartVector(1, len(data), ALIGNMENT)
        builder.head -= len(data)
        builder.Bytes[builder.head:builder.head + len(data)] = data.tobytes()
        vector = builder.EndVector()
    schema.BufferStart(builder)
    if vector is not None:
        schema.BufferAddData(builder, vector)
    return int(schema.BufferEnd(builder))
