"""Which ONNX files may saturate without VNNI: the others run on ONNX Runtime's fast kernels on every CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.evaluation.onnx_files import may_saturate


def graph(op: str, weight: np.ndarray, stored: str = "int8", **attributes: Any) -> Any:
    """Return a graph of one layer between 8-bit activations; `stored` says in which form its weights lie in the file."""
    nodes = [helper.make_node("DequantizeLinear", ["levels", "step"], ["x"])]
    if stored == "float through QuantizeLinear":
        nodes.append(helper.make_node("QuantizeLinear", ["w", "step", "zero"], ["w8"]))
        weight = weight.astype(np.float32)
    name = "w8" if stored.startswith("float through") else "w"
    if stored != "float":
        nodes.append(helper.make_node("DequantizeLinear", [name, "step"], ["wide"]))
    nodes.append(helper.make_node(op, ["x", "w" if stored == "float" else "wide"], ["y"], **attributes))
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
def test_the_weights_decide(op: str, values: np.ndarray, attributes: dict[str, int], expected: bool) -> None:
    assert may_saturate(graph(op, values, **attributes)) is expected
    assert may_saturate(graph(op, values.astype(np.uint8), **attributes)) is False
    assert may_saturate(graph(op, values.astype(np.float32), "float", **attributes)) is False


def test_layers_whose_integers_are_not_in_the_file_count_as_saturating() -> None:
    assert may_saturate(graph("Conv", weight(2, 2, 1, 1, places=(0,)), "float through QuantizeLinear"))
    assert may_saturate(helper.make_graph([helper.make_node("ConvInteger", ["x", "w"], ["y"])], "one", [], []))
