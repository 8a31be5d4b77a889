"""Check ONNX files without running them."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from architectures.build import MAX_ACTIVATION_ELEMENTS, MAX_TOTAL_ELEMENTS
from architectures.pairs import saturating_pairs
from architectures.counting import check_costs
from architectures.onnx_costs import INTEGER_PRODUCTS, ONNX_CONVOLUTIONS, ONNX_PRODUCTS, onnx_macs, onnx_work
from architectures.onnx_data import check_external_data, parse_onnx, read_external_data, stored_tensors
from architectures.image_layout import takes_channels_last
from metadata.errors import VerificationError, first_line

# The operators of image classifiers. Others are refused: hostile files crash a runtime through its rarer kernels.
_OPERATORS = """
    Abs Add And ArgMax AveragePool BatchNormalization Cast Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvInteger
    Cos CumSum DepthToSpace DequantizeLinear Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand Flatten Floor
    Gather GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid
    HardSwish Identity InstanceNormalization LRN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul
    MatMulInteger Max MaxPool Mean Min Mish Mod Mul Neg Not Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear Range
    Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Resize Round ScatterND Selu Shape
    Sigmoid Sin Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh Tile Transpose Unsqueeze
    Where"""
_CONTRIBUTED = """
    DynamicQuantizeMatMul FusedConv FusedGemm FusedMatMul MatMulIntegerToFloat QGemm QLinearAdd QLinearAveragePool
    QLinearConcat QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearSigmoid"""
ONNX_OPERATORS = {"": _OPERATORS.split(), "ai.onnx": _OPERATORS.split(), "com.microsoft": _CONTRIBUTED.split()}
_CONSTANTS = ("value_int", "value_ints", "value_float", "value_floats")
MAX_LRN_SIZE = 4096  # the kernel's memory grows with it
# What finding shapes out from numbers that the file computes may take. It is done in a process of its own: onnx turns a
# row of a million numbers into as many objects, so that a few nodes can ask for any amount of time and memory.
MAX_PROPAGATION_SECONDS = 60
MAX_PROPAGATION_BYTES = 2**32
_LARGE = 2**12  # numbers of a weight; no shape is that long
_PROPAGATE = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
except (ImportError, ValueError, OSError):
    pass
import onnx
model = onnx.load_from_string(sys.stdin.buffer.read())
try:
    found = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
except (onnx.shape_inference.InferenceError, ValueError) as error:
    sys.exit(str(error).strip().splitlines()[0])
sys.stdout.buffer.write(found.SerializeToString())
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """What a checked ONNX file holds.

    Args:
        input_name: the name of the graph's input.
        parameters: the number of stored numbers.
        macs: multiply-adds an image, or None where a shape that counts is not known before running.
        layers: the convolutions and matrix products, by name, and whether both their factors are 8-bit integers.
        may_saturate: see the function of this name.
        batch: the only number of images that a call may have, or None where the file takes any.
        channels_last: whether the input is (N, H, W, C).
        content: the file with its external data, None for a file that holds all its data.
    """

    input_name: str
    parameters: int
    macs: int | None
    layers: dict[str, bool]
    may_saturate: bool
    batch: int | None
    channels_last: bool
    content: bytes | None


def read_onnx(path: Path, input_shape: Sequence[int], layout: str | None = None) -> OnnxFile:
    """Check an ONNX file without running it: images in, one row of logits an image out, nothing outside its folder.

    Args:
        path: the file.
        input_shape: (C, H, W) of an image, also where the file takes (N, H, W, C).
        layout: "NCHW" or "NHWC" where the metadata state it.

    Raises:
        UserError: the packages onnx or onnxruntime are not installed.
        VerificationError: not ONNX, external data outside the folder, operators outside the tables above, several inputs or
            outputs, images of another shape, NaN or infinite weights, or sizes over the limits.
        MemoryError: the check needs several times the memory of the file, and more than there is.
    """
    model = parse_onnx(path)
    _check_versions(path, model)
    graph = model.graph
    _check_contents(path, model)
    tensors = stored_tensors(graph)
    external = check_external_data(path, tensors)
    if external:
        read_external_data(path, model)
    content = model.SerializeToString() if external else None
    image = _check_interface(path, graph)
    _check_values(path, tensors)
    dims = [dim.dim_value for dim in image.type.tensor_type.shape.dim]  # 0 where the file leaves the size open
    channels_last = takes_channels_last(path, dims, input_shape, layout)
    shapes = _infer_shapes(path, model, image, [input_shape[i] for i in (1, 2, 0)] if channels_last else input_shape)
    macs, known = onnx_macs(graph.node, shapes)
    check_costs(str(path), known // (dims[0] or 1), onnx_work(graph.node, shapes, dims[0] or 1))
    macs = None if macs is None else macs // (dims[0] or 1)
    return OnnxFile(
        input_name=image.name, parameters=_stored_numbers(graph, tensors), macs=macs, layers=_onnx_layers(graph),
        may_saturate=may_saturate(graph), batch=dims[0] or None, channels_last=channels_last, content=content)


def _check_versions(path: Path, model: Any) -> None:
    """Raise VerificationError for a file of a later ONNX than the installed package knows."""
    import onnx
    newest = onnx.defs.onnx_opset_version()
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    if model.ir_version > onnx.IR_VERSION or opset > newest:
        raise VerificationError(f"{path}: of a later ONNX (IR {model.ir_version}, opset {opset}) than onnx "
                                f"{onnx.__version__} knows (IR {onnx.IR_VERSION}, opset {newest}); export with a lower "
                                "opset_version, or pip install -U onnx onnxruntime")


def _check_contents(path: Path, model: Any) -> None:
    """Raise VerificationError unless all operators are known."""
    if model.functions or model.graph.sparse_initializer:
        raise VerificationError(f"{path}: local functions and sparse weights are not supported; export plain operators")
    for node in model.graph.node:
        complete = node.output and (node.input or node.op_type == "Constant")
        if node.op_type not in ONNX_OPERATORS.get(node.domain, ()) or not complete:
            raise VerificationError(f"{path}: operator {node.op_type!r} of node {node.name!r} (domain {node.domain!r}) is "
                                    "not one of those that image classifiers are made of")
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Constant" and not attributes.keys() <= {"value", *_CONSTANTS}:
            raise VerificationError(f"{path}: node {node.name!r}: expected a Constant of numbers, got {min(attributes)!r}")
        size = attributes["size"].i if node.op_type == "LRN" and "size" in attributes else 1
        if not 0 < size <= MAX_LRN_SIZE:
            raise VerificationError(f"{path}: node {node.name!r}: LRN over {size} channels, expected 1 to {MAX_LRN_SIZE:,}")


def _stored_numbers(graph: Any, tensors: Sequence[Any]) -> int:
    """Return the number of stored numbers: of the tensors, and of constants that are lists in an attribute."""
    lists: int = sum(len(attribute.ints) + len(attribute.floats) + (attribute.name in ("value_int", "value_float"))
                     for node in graph.node if node.op_type == "Constant" for attribute in node.attribute)
    return lists + sum(int(math.prod(tensor.dims)) for tensor in tensors)


def _check_interface(path: Path, graph: Any) -> Any:
    """Return the graph's only input. Raise VerificationError unless it is float32 images and the output float logits."""
    from onnx import TensorProto
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise VerificationError(f"{path}: expected one input and one output, got {len(inputs)} and {len(graph.output)}")
    declared = inputs[0].type.tensor_type
    if declared.elem_type != TensorProto.FLOAT or len(declared.shape.dim) != 4:
        kinds = {number: name.lower() for name, number in TensorProto.DataType.items()}
        kind = kinds.get(declared.elem_type, "another type")
        raise VerificationError(f"{path}: expected an input of float32 (N, C, H, W) or (N, H, W, C), got {kind} with "
                                f"{len(declared.shape.dim)} dimensions")
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
    """Return the shape of every tensor whose shape is known for one call.

    The model in memory is fixed to one image of the stated size, or to the only number of images that the file takes, so
    that every later shape can be inferred. The file stays as it is.

    Raises:
        VerificationError: the graph is not valid, or sizes are over the limits.
    """
    import onnx
    for dim, size in zip(image.type.tensor_type.shape.dim, (1, *input_shape), strict=True):
        dim.dim_value = dim.dim_value or size
    del model.graph.value_info[:]
    try:
        onnx.checker.check_model(model)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise VerificationError(f"{path}: not a valid ONNX graph: {first_line(error)}") from error
    shapes = _checked_shapes(path, model, inferred)
    if all(name in shapes for node in model.graph.node for name in node.output if name):
        return shapes
    return _checked_shapes(path, model, _propagated(path, model).graph)


def _propagated(path: Path, model: Any) -> Any:
    """Return the model with the shapes that follow from numbers that the file computes, such as sizes and their products.

    Raises:
        VerificationError: they contradict each other, or take too much time or memory.
    """
    import onnx
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.graph.name = model.graph.name
    for key in ("node", "input", "output"):
        getattr(light.graph, key).extend(getattr(model.graph, key))
    declared = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) < _LARGE:
            light.graph.initializer.append(tensor)
        elif tensor.name not in declared:
            light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    absurd = VerificationError(f"{path}: the shapes of its tensors take more than {MAX_PROPAGATION_SECONDS} s or "
                               f"{MAX_PROPAGATION_BYTES >> 30} GB to find out; export it with fixed sizes")
    command = [sys.executable, "-I", "-c", _PROPAGATE, json.dumps([place for place in sys.path if place]),
               str(MAX_PROPAGATION_BYTES)]
    try:
        done = subprocess.run(command, input=light.SerializeToString(), capture_output=True, check=False,
                              timeout=MAX_PROPAGATION_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise absurd from error
    said = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode == 1 and len(said) == 1 and "bad_alloc" not in said[0]:
        raise VerificationError(f"{path}: not a valid ONNX graph: {said[0]}")
    if done.returncode:
        raise absurd
    return onnx.load_from_string(done.stdout)


def _checked_shapes(path: Path, model: Any, inferred: Any) -> dict[str, list[int]]:
    """Return the shapes that are known in a graph. Raise VerificationError for sizes over the limits."""
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
            if node.op_type in ONNX_CONVOLUTIONS or node.op_type in ONNX_PRODUCTS or node.op_type in INTEGER_PRODUCTS:
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
