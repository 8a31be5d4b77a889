"""A network that was read from an ONNX file gives the file's answers, as logits; or ONNX Runtime runs the file."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from architectures.named import remarks
from architectures.onnx_network.graph import NotExpressibleError
from architectures.onnx_network.network import OnnxNetwork
from architectures.onnx_network.reading import open_classifier, read_network
from architectures.onnx_network.registry import OPERATORS
from architectures.onnx_network.runtime import PROBABILITIES, RunOnnxFile, TOLERANCE, difference_from_file
from architectures.zoo import make
from metadata.errors import UserError
from tests.helpers.onnx_graphs import STEM, STEM_WEIGHT, drawn, node, read_back, types, with_head, written


@pytest.mark.parametrize(("axis", "shape", "fits"), [
    (1, [0, 1, 1, -1], True), (1, [0, 1, -1, 1], True), (2, [0, 2, -1, 1], True), (1, [0, 2, -1], False),
    (1, [0, 1, 4, -1], False)])
def test_an_old_softmax_goes_over_all_axes_from_one_on(axis: int, shape: list[int], fits: bool, tmp_path: Path) -> None:
    nodes = [STEM, node("Reshape", "stem shape", "cut"), node("Softmax", "cut", "soft", axis=axis),
             node("Reshape", "soft images", "out")]
    nodes, head = with_head(nodes, "out", 8)
    constants = {**STEM_WEIGHT, "shape": np.array(shape), "images": np.array([0, 8, 8, 8]), **head}
    path = written(tmp_path / "old.onnx", nodes, constants, opset=11)
    if fits:
        assert "Softmax" in types(read_back(path))
    else:
        with pytest.raises(NotExpressibleError, match="operator Softmax of node 'node_soft': a softmax over several axes"):
            read_network(open_classifier(path))


@pytest.mark.parametrize("wrong", ["values", "nan"])
def test_a_network_that_is_not_the_file_runs_on_onnx_runtime(wrong: str, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, head = with_head([STEM, node("Relu", "stem", "on")], "on", 8)
    path = written(tmp_path / "net.onnx", nodes, {**STEM_WEIGHT, **head})
    assert isinstance(make(f"onnx:{path}", num_classes=4), OnnxNetwork)
    read = OPERATORS["Relu"]
    monkeypatch.setitem(OPERATORS, "Relu", lambda node, build: build.call(
        torch.mul, read(node, build), 1.29 if wrong == "values" else float("nan"), like=True))
    module = make(f"onnx:{path}", num_classes=4)
    assert isinstance(module, RunOnnxFile)
    assert re.search(r"other logits than the file: they differ by (\d\.\de-01|inf) of the largest", remarks(module)[-1])


def test_without_onnx_runtime_a_file_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, head = with_head([STEM], "stem", 8)
    path = written(tmp_path / "net.onnx", nodes, {**STEM_WEIGHT, **head})
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="needs the package onnxruntime; pip install onnxruntime") as raised:
        make(f"onnx:{path}", num_classes=4)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("behind", ["Flatten", "Reshape", "Squeeze", "nothing"])
def test_a_softmax_before_nodes_that_change_the_shape_alone_is_left_out(behind: str, opset: int, tmp_path: Path) -> None:
    constants = {**STEM_WEIGHT, "head.weight": drawn(4, 8, 1, 1), "list": np.array([0, -1]), "axes": np.array([2, 3])}
    squeeze = node("Squeeze", "soft axes", "y") if opset >= 13 else node("Squeeze", "soft", "y", axes=[2, 3])
    last = {"Flatten": [node("Flatten", "soft", "y")], "Reshape": [node("Reshape", "soft list", "y")],
            "Squeeze": [squeeze], "nothing": []}[behind]
    nodes = [STEM, node("GlobalAveragePool", "stem", "pooled"), node("Conv", "pooled head.weight", "logits"),
             node("Softmax", "logits", "soft" if last else "y", axis=1), *last]
    path = written(tmp_path / "soft.onnx", nodes, constants, opset=opset,
                   output=("n", 4) if last else ("n", 4, 1, 1))
    opened = open_classifier(path)
    assert len(opened.notes) == 1 and "the Softmax at the end is left out" in opened.notes[0]
    assert "Softmax" not in types(read_back(path))


@pytest.mark.parametrize("shape", [[0, 2, 4], [0, 4, 1, 1]])
def test_a_softmax_that_does_not_go_over_the_classes_stays(shape: list[int], tmp_path: Path) -> None:
    """Two heads in one file, or over an axis of one: without it the answers would be others."""
    nodes = [STEM, node("GlobalAveragePool", "stem", "pooled"), node("Conv", "pooled head.weight", "logits"),
             node("Reshape", "logits shape", "heads"), node("Softmax", "heads", "soft", axis=-1),
             node("Flatten", "soft", "y")]
    classes = abs(int(np.prod(shape[1:])))
    path = written(tmp_path / "heads.onnx", nodes, {**STEM_WEIGHT, "head.weight": drawn(classes, 8, 1, 1),
                                                    "shape": np.array(shape)}, output=("n", classes))
    opened = open_classifier(path)
    assert opened.notes == [] and any(entry.op_type == "Softmax" for entry in opened.model.graph.node)


def test_answers_that_seem_to_be_probabilities_are_remarked(tmp_path: Path) -> None:
    """A softmax that a file spells out in its parts is not found."""
    nodes, head = with_head([STEM], "stem", 8)
    nodes[-1].output[0], nodes[-1].name = "logits", "head"
    nodes += [node("Exp", "logits", "powers"), node("ReduceSum", "powers axes", "sum", keepdims=1),
              node("Div", "powers sum", "y")]
    module = make(f"onnx:{written(tmp_path / 'soft.onnx', nodes, {**STEM_WEIGHT, **head, 'axes': np.array([1])})}",
                  num_classes=4)
    assert isinstance(module, OnnxNetwork) and remarks(module) == [PROBABILITIES]


@pytest.mark.parametrize("last", ["Softmax", "LogSoftmax"])
def test_a_softmax_at_the_end_is_left_out_and_said(last: str, tmp_path: Path) -> None:
    nodes, head = with_head([STEM], "stem", 8)
    nodes[-1].output[0], nodes[-1].name = "logits", "head"
    nodes += [node(last, "logits", "probabilities", axis=1), node("Identity", "probabilities", "y")]
    opened = open_classifier(written(tmp_path / "soft.onnx", nodes, {**STEM_WEIGHT, **head}))
    assert opened.notes == [f"the {last} at the end is left out: the network gives logits; the classes and their order "
                            "stay"]
    assert not any("oftmax" in entry.op_type for entry in opened.model.graph.node)
    assert difference_from_file(read_network(opened), opened) < TOLERANCE


def test_a_quantized_file_is_run_with_exact_integer_sums(tmp_path: Path) -> None:
    """On CPUs without VNNI the fast kernel's sums of two products end at 32,767; the evaluator asks for the others."""
    nodes = [node("QuantizeLinear", "x one zero", "levels"), node("DequantizeLinear", "levels one zero", "steps"),
             node("DequantizeLinear", "weight one none", "wide"), node("Conv", "steps wide", "sums"),
             node("QuantizeLinear", "sums large zero", "out"), node("DequantizeLinear", "out large zero", "features"),
             node("GlobalAveragePool", "features", "pooled"), node("Flatten", "pooled", "y")]
    path = written(tmp_path / "int8.onnx", nodes, {
        "one": np.float32(1), "large": np.float32(2**12), "zero": np.uint8(0), "none": np.int8(0),
        "weight": np.full((8, 4, 1, 1), 127, np.int8)}, image=("n", 4, 8, 8), output=("n", 8))
    module = make(f"onnx:{path}", num_classes=8)
    assert isinstance(module, RunOnnxFile) and module.running.file.may_saturate
    expected = np.round(255 * 127 * 4 / 2**12) * 2**12
    assert torch.equal(module(torch.full((2, 4, 8, 8), 255.0)), torch.full((2, 8), float(expected)))
