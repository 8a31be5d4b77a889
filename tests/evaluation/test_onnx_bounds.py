"""ONNX files whose nodes would take for ever, or whose attributes are absurd, are refused by their shapes alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from compress.evaluation.onnx_costs import onnx_macs, onnx_work
from compress.evaluation.onnx_files import read_onnx
from metadata.errors import VerificationError
from tests.evaluation.test_foreign_onnx import PLAIN, SIDE, fold, network

VAST = 8000  # pixels of a padded image, one number in 64 million


def padded(*nodes: Any) -> list[Any]:
    """Nodes that work on a vast image, between a padding and the classifier, whose shape they need not give."""
    pad = helper.make_node("Constant", [], ["pads"], value_ints=[0, 0, 0, 0, 0, 0, VAST - SIDE, VAST - SIDE])
    one = [helper.make_node("Constant", [], [name], value_ints=[value]) for name, value in
           (("zero", 0), ("one", 1), ("axis", 1), ("all", 2**31))]
    return [pad, *one, helper.make_node("Slice", ["x", "zero", "one", "axis"], ["grey"]),
            helper.make_node("Pad", ["grey", "pads"], ["vast"]), *nodes]


SLOW: dict[str, list[Any]] = {
    "average pool": [helper.make_node("AveragePool", ["vast"], ["image"], kernel_shape=[4000, 4000])],
    "maximum pool": [helper.make_node("MaxPool", ["vast"], ["image"], kernel_shape=[4000, 4000])],
    "pool with one name for all": [
        helper.make_node("AveragePool", ["vast"], ["p"], kernel_shape=[4000, 4000], name="same"),
        helper.make_node("Relu", ["p"], ["image"], name="same")],
    "pool of an unknown shape": [
        helper.make_node("QLinearAdd", ["vast", *"abcdefg"], ["q"], domain="com.microsoft"),
        helper.make_node("AveragePool", ["q"], ["image"], kernel_shape=[4000, 4000])],
    "normalization of many channels": [
        helper.make_node("AveragePool", ["vast"], ["p"], kernel_shape=[1, 1]),
        helper.make_node("LRN", ["p"], ["image"], size=4000)],
    "resize": [helper.make_node("Constant", [], ["sizes"], value_ints=[1, 1, 2 * VAST, 2 * VAST]),
               helper.make_node("Resize", ["vast", "", "", "sizes"], ["image"], mode="cubic")],
    "sum of products": [helper.make_node("Einsum", ["vast", "vast"], ["image"], equation="abcd,abce->abde")],
}


@pytest.mark.parametrize("what", SLOW)
def test_nodes_that_never_end_are_refused(what: str, tmp_path: Path) -> None:
    model = network(["N", 3, SIDE, SIDE], padded(*SLOW[what]))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    folder = fold(tmp_path / "s", model)
    start = time.perf_counter()
    with pytest.raises(VerificationError, match=r"over the limit|not a valid ONNX graph"):
        read_onnx(folder / "model.onnx", (3, SIDE, SIDE))
    assert time.perf_counter() - start < 5


ABSURD = [0, -1, 2**31, 2**62, -2**63]
NODES = {
    "AveragePool": ("kernel_shape", "pads", "strides", "dilations"), "MaxPool": ("kernel_shape", "pads", "strides"),
    "LRN": ("size",), "Flatten": ("axis",), "Softmax": ("axis",), "Transpose": ("perm",), "DepthToSpace": ("blocksize",),
    "SpaceToDepth": ("blocksize",), "ReduceMean": ("axes",), "Concat": ("axis",), "LeakyRelu": ("alpha",),
    "ArgMax": ("axis",), "Gather": ("axis",), "Split": ("axis",)}


@pytest.mark.parametrize("op", NODES)
def test_absurd_attributes_end_in_one_kind_of_error(op: str, tmp_path: Path) -> None:
    """Or in none, where the value is a fine one: read_onnx runs nothing."""
    for name in NODES[op]:
        for value in ABSURD:
            listed = name in ("kernel_shape", "pads", "strides", "dilations", "perm", "axes")
            count = {"pads": 4, "perm": 4}.get(name, 2)
            usual: dict[str, Any] = {"kernel_shape": [2, 2]} if "Pool" in op else {}
            node = helper.make_node(op, ["x"] * (2 if op == "Gather" else 1), ["image"],
                                    **{**usual, name: [value] * count if listed else value})
            folder = fold(tmp_path / "s", network(["N", 3, SIDE, SIDE], [node]))
            try:
                read_onnx(folder / "model.onnx", (3, SIDE, SIDE))
            except VerificationError as error:
                assert "\n" not in str(error)


def test_work_is_counted_by_node_and_image() -> None:
    shapes = {"x": [4, 3, 8, 8], "p": [4, 3, 7, 7], "a": [4, 10], "b": [10, 1000]}
    nodes = [helper.make_node("MaxPool", ["x"], ["p"], kernel_shape=[2, 2]),
             helper.make_node("Relu", ["p"], ["r"], name="r"),
             helper.make_node("QGemm", ["a", "s", "z", "b", "s", "z"], ["y"], domain="com.microsoft")]
    work = onnx_work(nodes, shapes, 4)
    assert work == {"MaxPool (0)": 192 + 147 + 4 * 147, "r (1)": 147, "QGemm (2)": (40 + 10_000 + 4 * 10_000 // 100) // 4}
    assert onnx_macs(nodes, shapes) == (0, 0)


def test_honest_files_pass(tmp_path: Path) -> None:
    folder = fold(tmp_path / "s", PLAIN)
    weight = numpy_helper.to_array(PLAIN.graph.initializer[0])
    assert read_onnx(folder / "model.onnx", (3, SIDE, SIDE)).macs == np.prod(weight.shape)
