"""Which ONNX files may saturate without VNNI: the others run on ONNX Runtime's fast kernels on every CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from architectures.onnx_files import may_saturate
from architectures.onnx_sessions import onnxruntime_options
from tests.helpers.qdq import qdq, run


def graph(op: str, weight: np.ndarray, stored: str = "int8", between: Sequence[str] = (), **attributes: Any) -> Any:
    """Return a graph of one layer between 8-bit activations; `stored` says in which form its weights lie in the file.

    Between the DequantizeLinear and the layer's first and second input stand the operators named in `between`, if any.
    """
    nodes = [helper.make_node("DequantizeLinear", ["levels", "step"], ["x"])]
    if stored == "float through QuantizeLinear":
        nodes.append(helper.make_node("QuantizeLinear", ["w", "step", "zero"], ["w8"]))
        weight = weight.astype(np.float32)
    name = "w8" if stored.startswith("float through") else "w"
    if stored != "float":
        nodes.append(helper.make_node("DequantizeLinear", [name, "step"], ["wide"]))
    read = ["x", "w" if stored == "float" else "wide"]
    for index, other in enumerate(between):
        if other:
            nodes.append(helper.make_node(other, [read[index]], [f"{read[index]} behind {other}"]))
            read[index] = nodes[-1].output[0]
    nodes.append(helper.make_node(op, read, ["y"], **attributes))
    values = {"w": weight, "step": np.float32(1), "zero": np.int8(0)}
    return helper.make_graph(nodes, "one layer", [helper.make_tensor_value_info("levels", TensorProto.UINT8, None)],
                             [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
                             [numpy_helper.from_array(np.asarray(value), key) for key, value in values.items()])


def weight(*shape: int, places: tuple[int, ...], level: int = 65) -> np.ndarray:
    """Return weights of zeros but for some places of the first output channel."""
    values = np.zeros(shape, np.int8)
    values[0].ravel()[list(places)] = level
    return values


@pytest.mark.parametrize(("op", "values", "attributes", "expected"), [
    ("Conv", weight(2, 2, 3, 3, places=(0, 9)), {}, True),  # channels 0 and 1 at position 0
    ("Conv", weight(2, 2, 3, 3, places=(0, 9), level=64), {}, False),
    ("Conv", weight(2, 2, 3, 3, places=(0, 9), level=-65), {}, True),
    ("Conv", weight(2, 4, 1, 1, places=(1, 2)), {}, False),  # of two pairs
    ("Conv", weight(2, 3, 2, 1, places=(4, 1)), {}, True),  # an odd channel and the next position's first: rows of im2col
    ("Conv", weight(2, 1, 3, 3, places=(0, 1)), {"group": 2}, False),  # depthwise
    ("Conv", weight(4, 1, 3, 3, places=(0, 1)), {"group": 2}, True),  # two outputs for each channel
    ("Gemm", weight(2, 4, places=(0, 1)), {"transB": 1}, True),
    ("Gemm", weight(2, 4, places=(0, 1)), {}, False),  # (in, out): two outputs
    ("MatMul", weight(2, 4, places=(0, 1)).T.copy(), {}, True),
    ("MatMul", weight(2, 4, places=(0, 1)), {}, False)])
def test_the_weights_decide(op: str, values: np.ndarray, attributes: dict[str, Any], expected: bool) -> None:
    assert may_saturate(graph(op, values, **attributes)) is expected
    assert may_saturate(graph(op, values.astype(np.uint8), **attributes)) is False
    assert may_saturate(graph(op, values.astype(np.float32), "float", **attributes)) is False


def test_layers_whose_integers_are_not_in_the_file_count_as_saturating() -> None:
    assert may_saturate(graph("Conv", weight(2, 2, 1, 1, places=(0,)), "float through QuantizeLinear"))
    assert may_saturate(helper.make_graph([helper.make_node("ConvInteger", ["x", "w"], ["y"])], "one", [], []))


@pytest.mark.parametrize("op", ["QGemm", "MatMulIntegerToFloat", "QLinearConv", "DynamicQuantizeMatMul"])
def test_integer_operators_count_as_saturating(op: str) -> None:
    assert may_saturate(helper.make_graph([helper.make_node(op, ["x", "w"], ["y"], domain="com.microsoft")], "one", [], []))


def test_a_dequantization_that_onnx_runtime_moves_does_not_hide_a_layer() -> None:
    large, small = weight(2, 2, 3, 3, places=(0, 9)), weight(2, 2, 3, 3, places=(0, 9), level=64)
    assert may_saturate(graph("Conv", large, between=["MaxPool"]))
    assert not may_saturate(graph("Conv", small, between=["MaxPool"]))
    assert not may_saturate(graph("Conv", large.astype(np.float32), "float", between=["MaxPool"]))
    assert may_saturate(graph("MatMul", weight(2, 4, places=(0, 1)), between=["", "Transpose"]))
    attention = helper.make_graph([helper.make_node("MatMul", ["x", "y"], ["z"])], "of two activations", [], [])
    assert not may_saturate(attention)  # in a file without any integers


def test_weights_without_numbers_have_no_pairs() -> None:
    for shape in ((0, 3, 1, 1), (8, 0, 3, 3), (8, 4, 0, 1)):
        assert not may_saturate(graph("Conv", np.zeros(shape, np.int8)))


@pytest.mark.parametrize(("op", "options"), [
    ("MaxPool", {"kernel_shape": [2, 2]}), ("Identity", {}), ("Transpose", {"perm": [0, 1, 3, 2]})])
def test_exact_sums_are_asked_for_where_they_are_needed(op: str, options: dict[str, Any]) -> None:
    """ONNX Runtime's answers with the options that the evaluator takes, on whichever CPU runs the test."""
    model = qdq("Conv", np.full((8, 4, 1, 1), 127, np.int8), requantize=2.0**12)
    layer = next(node for node in model.graph.node if node.op_type == "Conv")
    moved = helper.make_node(op, [layer.input[0]], ["moved"], **options)
    layer.input[0] = "moved"
    model.graph.node.insert(2, moved)
    levels = np.full((1, 4, 4, 4), 127.5, np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), onnxruntime_options(1, may_saturate(model.graph)),
                                           ["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {"input": levels})[0], run(model, levels))
