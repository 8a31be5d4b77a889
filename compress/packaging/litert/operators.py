"""Write an ONNX network of the toolkit, float or int8, as a `.tflite` file with the same numbers and the same integers.

The file takes one image a call, (1, H, W, C) float32, as LiteRT's own tools and cameras give it, so that nothing is
transposed on the way in; inside, images lie as (N, H, W, C), too. Its output is (1, classes) float32. An int8 network keeps
its grids: levels of 0 to 255 become -128 to 127. An operator that lies between levels, and has a kernel that computes as
ONNX Runtime's, becomes integer; every other one computes in float between a DEQUANTIZE and a QUANTIZE, as it does there.
"""

from __future__ import annotations

import onnx

from compress.packaging.litert.elements import (
    BINARY, PLAIN, binary, clip, erf, hard_sigmoid, leaky_relu, plain_unary, prelu, reciprocal, relu)
from compress.packaging.litert.layers import convolution, global_pool, matrix_product, pool, resize
from compress.packaging.litert.moves import concat, expand, gather, pad, reshape, slices, transpose
from compress.packaging.litert.reductions import REDUCTIONS, channel_norm, layer_norm, length, reduction, softmax
from compress.packaging.litert.writer import Handler, LitertWriter

OPERATORS: dict[str, Handler] = {
    "Conv": convolution, "Gemm": matrix_product, "MatMul": matrix_product, "MaxPool": pool, "AveragePool": pool,
    "GlobalAveragePool": global_pool, "GlobalMaxPool": global_pool, "Clip": clip, "HardSigmoid": hard_sigmoid,
    "LeakyRelu": leaky_relu, "PRelu": prelu, "Erf": erf, "ReduceL2": length, "Reciprocal": reciprocal,
    "LayerNormalization": layer_norm, "InstanceNormalization": channel_norm, "BatchNormalization": channel_norm,
    "Softmax": softmax, "Transpose": transpose, "Concat": concat, "Slice": slices,
    "Pad": pad, "Resize": resize, "Gather": gather, "Expand": expand, "Reshape": reshape, "Flatten": reshape,
    **dict.fromkeys(BINARY, binary), **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(PLAIN, plain_unary), "Relu": relu}


def write_litert(model: onnx.ModelProto) -> bytes:
    """Return a network as a `.tflite` file.

    Args:
        model: as `compress.packaging.export.export` or `compress.quantization.static.quantize_static` give it.

    Raises:
        UserError: an operator has no form in a `.tflite` file; the line names the layer. Or the packages are not installed.
    """
    writer = LitertWriter(model, OPERATORS)
    return writer.file.pack(*writer.write())


def check_litert(model: onnx.ModelProto) -> None:
    """Raise UserError as `write_litert` does, without packing the file."""
    LitertWriter(model, OPERATORS).write()
