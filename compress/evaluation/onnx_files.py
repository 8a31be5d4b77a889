"""Check ONNX files without running them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from architectures.build import MAX_ACTIVATION_ELEMENTS, MAX_TOTAL_ELEMENTS
from architectures.pairs import saturating_pairs
from architectures.weights import MAX_MACS
from metadata.errors import UserError, VerificationError, first_line

# The operators of image classifiers. Others are refused: hostile files crash a runtime through its rarer kernels.
_OPERATORS = """
    Abs Add ArgMax AveragePool BatchNormalization Cast Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvInteger
    DepthToSpace DequantizeLinear Div Dropout DynamicQuantizeLinear Elu Equal Erf Exp Expand Flatten Floor Gather Gelu
    Gemm GlobalAveragePool GlobalMaxPool Greater GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization
    LayerNormalization LeakyRelu Less Log LogSoftmax MatMul MatMulInteger Max MaxPool Mean Min Mish Mul Neg PRelu Pad Pow
    QLinearConv QLinearMatMul QuantizeLinear Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape
    Resize Round Selu Shape Sigmoid Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh Transpose
    Unsqueeze Where"""
_CONTRIBUTED = """
    DynamicQuantizeMatMul FusedConv FusedGemm FusedMatMul MatMulIntegerToFloat QGemm QLinearAdd QLinearAveragePool
    QLinearConcat QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearSigmoid"""
ONNX_OPERATORS = {"": _OPERATORS.split(), "ai.onnx": _OPERATORS.split(), "com.microsoft": _CONTRIBUTED.split()}
# The input whose shape gives the multiply-adds of one output number: a weight (out, in/groups, ...), or rows of a matrix.
ONNX_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "FusedConv": 1, "QLinearConv": 3}
ONNX_PRODUCTS = {"Gemm", "FusedGemm", "MatMul", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul", "FusedMatMul"}
_INTEGER_PRODUCTS = {"QGemm", "MatMulIntegerToFloat"}  # ONNX infers no shapes for them, so their multiply-adds do not count


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """What a checked ONNX file holds.

    Args:
        input_name: the name of the graph's input.
        parameters: the number of stored numbers.
        macs: multiply-adds an image, or None where a shape that counts is not known before running.
        layers: the convolutions and matrix products, by name, and whether both their factors are 8-bit integers.
        may_saturate: see the function of this name.
    """

    input_name: str
    parameters: int
    macs: int | None
    layers: dict[str, bool]
    may_saturate: bool


def read_onnx(path: Path, input_shape: Sequence[int]) -> OnnxFile:
    """Check an ONNX file without running it: one image (C, H, W) in, one row of logits out, nothing outside the file.

    Raises:
        UserError: the packages onnx or onnxruntime are not installed.
        VerificationError: not ONNX, external data, operators outside the tables above, several inputs or outputs, NaN or
            infinite weights, or sizes over the limits.
    """
    model = _parse(path)
    graph = model.graph
    tensors = _tensors(graph)
    _check_contents(path, model, tensors)
    image = _check_interface(path, graph)
    _check_values(path, tensors)
    shapes = _infer_shapes(path, model, image, input_shape)
    macs = _onnx_macs(graph.node, shapes)
    if macs is not None and macs > MAX_MACS:
        raise VerificationError(f"{path}: {macs:,} multiply-adds an image are over the limit of {MAX_MACS:,}")
    return OnnxFile(input_name=image.name, parameters=sum(math.prod(tensor.dims) for tensor in tensors), macs=macs,
                    layers=_onnx_layers(graph), may_saturate=may_saturate(graph))


def check_onnx_bytes(path: Path) -> None:
    """Raise VerificationError for a file that is too large to be an ONNX file, before anybody reads it."""
    if path.stat().st_size >= 2**31:
        raise VerificationError(f"{path}: {path.stat().st_size:,} bytes; an ONNX file without external data has under 2 GB")


def _parse(path: Path) -> Any:
    """Return the file's ONNX model."""
    try:
        import onnx
    except ImportError as error:
        raise UserError(f"{path}: an ONNX submission needs the packages onnx and onnxruntime; "
                        "pip install onnx onnxruntime") from error
    from google.protobuf.message import DecodeError

    check_onnx_bytes(path)
    try:
        return onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, RecursionError, ValueError, TypeError) as error:
        raise VerificationError(f"{path}: not an ONNX file: {first_line(error)}") from error


def _tensors(graph: Any) -> list[Any]:
    """Return the stored tensors: initializers, and those that are attributes of a node."""
    from onnx import AttributeProto
    return [*graph.initializer, *(attribute.t for node in graph.node for attribute in node.attribute
                                  if attribute.type == AttributeProto.TENSOR)]


def _check_contents(path: Path, model: Any, tensors: Sequence[Any]) -> None:
    """Raise VerificationError unless all data lie in the file and all operators are known."""
    from onnx import TensorProto
    for tensor in tensors:
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise VerificationError(f"{path}: tensor {tensor.name!r} lies in another file; store all data in this one")
    if model.functions or model.graph.sparse_initializer:
        raise VerificationError(f"{path}: local functions and sparse weights are not supported; export plain operators")
    for node in model.graph.node:
        complete = node.output and (node.input or node.op_type == "Constant")
        if node.op_type not in ONNX_OPERATORS.get(node.domain, ()) or not complete:
            raise VerificationError(f"{path}: operator {node.op_type} of node {node.name!r} (domain {node.domain!r}) is "
                                    "not one of those that image classifiers are made of")
        if node.op_type == "Constant" and any(attribute.name != "value" for attribute in node.attribute):
            raise VerificationError(f"{path}: node {node.name!r}: store a Constant's numbers as its tensor 'value'")


def _check_interface(path: Path, graph: Any) -> Any:
    """Return the graph's only input. Raise VerificationError unless it is float32 images and the output float logits."""
    from onnx import TensorProto
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise VerificationError(f"{path}: expected one input and one output, got {len(inputs)} and {len(graph.output)}")
    declared = inputs[0].type.tensor_type
    if declared.elem_type != TensorProto.FLOAT or len(declared.shape.dim) != 4:
        raise VerificationError(f"{path}: the input must be float32 (N, C, H, W)")
    if graph.output[0].type.tensor_type.elem_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        raise VerificationError(f"{path}: the output must be float logits (N, classes)")
    return inputs[0]


def _check_values(path: Path, tensors: Sequence[Any]) -> None:
    """Raise VerificationError for a tensor that is damaged, or holds NaN or infinite values."""
    from onnx import numpy_helper
    for tensor in tensors:
        try:
            values = numpy_helper.to_array(tensor)
        except (ValueError, TypeError, OverflowError, KeyError) as error:
            raise VerificationError(f"{path}: tensor {tensor.name!r} is not what it says: {first_line(error)}") from error
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise VerificationError(f"{path}: tensor {tensor.name!r} holds NaN or infinite values")


def _infer_shapes(path: Path, model: Any, image: Any, input_shape: Sequence[int]) -> dict[str, list[int]]:
    """Return the shape of every tensor whose shape is known for one image.

    The model in memory is fixed to one image of the stated size, so that every later shape can be inferred. The file
    stays as it is.

    Raises:
        VerificationError: the graph is not valid, or sizes are over the limits.
    """
    import onnx
    for dim, size in zip(image.type.tensor_type.shape.dim, (1, *input_shape), strict=True):
        if not dim.dim_value or size == 1:
            dim.dim_value = size
    del model.graph.value_info[:]
    try:
        onnx.checker.check_model(model)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise VerificationError(f"{path}: not a valid ONNX graph: {first_line(error)}") from error
    shapes, total = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}, 0
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims) and value.type.tensor_type.HasField("shape"):
            shapes[value.name] = [dim.dim_value for dim in dims]
            elements = math.prod(shapes[value.name])
            total += elements
            if elements > MAX_ACTIVATION_ELEMENTS or total > MAX_TOTAL_ELEMENTS:
                raise VerificationError(f"{path}: {value.name!r} has {elements:,} elements, {total:,} with those before, "
                                        f"over the limits of {MAX_ACTIVATION_ELEMENTS:,} and {MAX_TOTAL_ELEMENTS:,}")
    return shapes


def _onnx_layers(graph: Any) -> dict[str, bool]:
    """Return the convolutions and matrix products by the name of the node, True where 8-bit integers are multiplied."""
    from onnx import TensorProto
    integers = {tensor.name for tensor in graph.initializer if tensor.data_type in (TensorProto.INT8, TensorProto.UINT8)}
    restored: set[str] = set()  # tensors that were dequantized from 8-bit integers
    layers = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            integers.add(node.output[0])
        elif node.op_type == "DequantizeLinear" and node.input[0] in integers:
            restored.add(node.output[0])
        elif node.op_type in ONNX_CONVOLUTIONS or node.op_type in ONNX_PRODUCTS:
            by_itself = node.op_type not in ("Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul")
            layers[node.name] = by_itself or set(node.input[:2]) <= restored
    return layers


def may_saturate(graph: Any) -> bool:
    """Return whether ONNX Runtime's 16-bit sums of two products may saturate in an int8 layer on CPUs without VNNI.

    That depends on the int8 weights. The activations do not tell: ONNX Runtime moves a DequantizeLinear behind pools,
    slices and the like, so that a layer behind those is int8 too. Where a file restores 8-bit integers at all, a layer
    whose weights are neither stored as floats nor directly as integers counts as one that may.
    """
    from onnx import TensorProto, numpy_helper
    stored = {tensor.name: tensor for tensor in graph.initializer}
    restored = {node.output[0]: stored.get(node.input[0]) for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            if node.op_type in ONNX_CONVOLUTIONS or node.op_type in ONNX_PRODUCTS or node.op_type in _INTEGER_PRODUCTS:
                return True
        elif restored and node.input[1] not in stored:
            tensor, attributes = restored.get(node.input[1]), {attribute.name: attribute.i for attribute in node.attribute}
            if tensor is None or len(tensor.dims) < 2 or (node.op_type != "Conv" and len(tensor.dims) > 2):
                return True
            if tensor.data_type == TensorProto.INT8:  # unsigned weights are multiplied in 16 bits and added in 32
                weight = numpy_helper.to_array(tensor)
                by_output = node.op_type == "Conv" or attributes.get("transB")
                if saturating_pairs(weight if by_output else weight.T, attributes.get("group", 1), "onnxruntime"):
                    return True
    return False


def _onnx_macs(nodes: Any, shapes: dict[str, list[int]]) -> int | None:
    """Return the multiply-adds of the convolutions and matrix products, or None where a shape is not known."""
    total = 0
    for node in nodes:
        if node.op_type not in ONNX_CONVOLUTIONS and node.op_type not in ONNX_PRODUCTS:
            continue
        factors = shapes.get(node.input[ONNX_CONVOLUTIONS.get(node.op_type, 0)])
        output = shapes.get(node.output[0])
        if factors is None or output is None:
            return None
        if node.op_type in ONNX_CONVOLUTIONS:
            total += math.prod(output) * math.prod(factors[1:])
        else:
            transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            total += math.prod(output) * factors[-2 if transposed else -1]
    return total
