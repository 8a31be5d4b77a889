"""One int8 layer as an ONNX file in QDQ form, and ONNX Runtime's answers from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper, TensorProto

Array = NDArray[Any]
UNSIGNED, SIGNED = TensorProto.UINT8, TensorProto.INT8
STEP = 0.5  # of the activations; powers of two leave float32 exact


def qdq(op: str, weight: Array, zero_point: int = 0, dtype: int = UNSIGNED, requantize: float = 0,
        rank: int = 0, axis: int = 0, **attributes: Any) -> onnx.ModelProto:
    """Return one int8 layer, the scales of whose weights are 1, 2, 4, 8, 1...; nothing is named as ONNX Runtime would.

    Args:
        op: Conv, Gemm or MatMul.
        weight: integers, with the output channels along `axis`.
        zero_point, dtype: of the activations.
        requantize: scale of the output's integers; 0: the output is float, and ONNX Runtime computes in float.
        rank: of input and output, where it is not that of the weights.
        axis: of the output channels.
        attributes: of the layer.
    """
    outputs = weight.shape[axis]
    constants = {"step": np.float32(STEP), "w": weight, "steps": 2.0 ** (np.arange(outputs, dtype=np.float32) % 4),
                 "middle": helper.tensor_dtype_to_np_dtype(dtype).type(zero_point), "zeros": np.zeros(outputs, np.int8)}
    nodes = [helper.make_node("QuantizeLinear", ["input", "step", "middle"], ["levels"]),
             helper.make_node("DequantizeLinear", ["levels", "step", "middle"], ["x"]),
             helper.make_node("DequantizeLinear", ["w", "steps", "zeros"], ["weight"], axis=axis),
             helper.make_node(op, ["x", "weight"], ["sums" if requantize else "output"], name="layer", **attributes)]
    if requantize:
        constants["coarse"] = np.float32(requantize)
        nodes += [helper.make_node("QuantizeLinear", ["sums", "coarse", "middle"], ["out levels"]),
                  helper.make_node("DequantizeLinear", ["out levels", "coarse", "middle"], ["output"])]
    given, said = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [
        f"{name} {dim}" for dim in range(rank or weight.ndim)]) for name in ("input", "output"))
    graph = helper.make_graph(
        nodes, "one", [given], [said],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model: onnx.ModelProto, images: Array, precise: bool = True) -> Array:
    """Return ONNX Runtime's answers, by exact sums on every CPU or by its fast kernels."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.add_session_config_entry("session.x64quantprecision", str(int(precise)))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"input": images})[0]  # type: ignore[no-any-return]


def extreme(generator: np.random.Generator, shape: tuple[int, ...], low: int, high: int) -> Array:
    """Return integers from low to high, half of them at the upper end or near."""
    values = generator.integers(low, high, shape, endpoint=True)
    return np.where(generator.random(shape) < 0.5, values, high - generator.integers(0, 10, shape))


def weights(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return random int8 weights."""
    return generator.integers(-127, 127, shape, endpoint=True).astype(np.int8)
