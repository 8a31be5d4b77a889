"""ONNX files become networks whose logits are ONNX Runtime's, for one, two and three images."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from architectures.describe import lower
from architectures.layers.base import Layer
from architectures.named import remarks
from architectures.onnx_network.batch import place_images
from architectures.onnx_network.graph import NotExpressibleError
from architectures.onnx_network.reading import open_classifier, read_network
from architectures.onnx_network.network import OnnxNetwork
from architectures.onnx_network.registry import OPERATORS
from architectures.onnx_network.runtime import PROBABILITIES, RunOnnxFile, TOLERANCE, difference_from_file
from architectures.zoo import make
from metadata.errors import UserError
from tests.helpers.onnx_graphs import drawn, node, with_head, written

STEM = node("Conv", "x stem.weight", "stem", pads=[1, 1, 1, 1])
STEM_WEIGHT = {"stem.weight": drawn(8, 3, 3, 3)}


def read_back(path: Path, **options: Any) -> list[Layer]:
    """Read a file, compare the network and the one rebuilt from its layers with ONNX Runtime, return the layers."""
    opened = open_classifier(path, **options)
    network = read_network(opened)
    assert difference_from_file(network, opened) < TOLERANCE
    lowered = lower(network, opened.input_shape)
    assert difference_from_file(lowered.build(), opened) < TOLERANCE
    return lowered.architecture.layers


def types(layers: list[Layer]) -> list[str]:
    return [layer.type for layer in layers]


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21])
def test_operators_whose_attributes_became_inputs(opset: int, tmp_path: Path) -> None:
    constants: dict[str, np.ndarray] = dict(STEM_WEIGHT)

    def numbers(name: str, values: list[int]) -> str:
        constants[name] = np.array(values, np.int64)
        return f" {name}"

    modern = opset >= 13
    constants |= {"low": np.float32(0), "high": np.float32(6)}
    middle = [
        node("Clip", "stem low high", "clipped") if opset >= 11 else node("Clip", "stem", "clipped", min=0.0, max=6.0),
        node("Pad", "clipped" + numbers("pads", [0, 0, 1, 0, 0, 0, 0, 1]), "padded") if opset >= 11 else
        node("Pad", "clipped", "padded", pads=[0, 0, 1, 0, 0, 0, 0, 1]),
        node("Slice", "padded" + numbers("starts", [1]) + numbers("ends", [2**62]) + numbers("axes", [2]), "sliced")
        if opset >= 10 else node("Slice", "padded", "sliced", starts=[1], ends=[2**31 - 1], axes=[2]),
        node("ReduceMean", "sliced" + numbers("over", [2, 3]), "mean", keepdims=1) if opset >= 18 else
        node("ReduceMean", "sliced", "mean", axes=[2, 3], keepdims=1),
        node("Squeeze", "mean" + numbers("gone", [2, 3]), "squeezed") if modern else
        node("Squeeze", "mean", "squeezed", axes=[2, 3]),
        node("Dropout", "squeezed", "dropped"), node("Identity", "dropped", "same"),
        node("Cast", "same", "cast", to=1), node("MatMul", "cast head", "product"), node("Add", "product bias", "y")]
    constants |= {"head": drawn(8, 4), "bias": drawn(4)}
    for name in ("low", "high"):
        if opset < 11:
            del constants[name]
    layers = read_back(written(tmp_path / "ops.onnx", [STEM, *middle], constants, opset=opset))
    assert types(layers)[:2] == ["Conv2d", "ReLU6"] and types(layers)[-1] == "Linear"
    assert layers[-1].options()["bias"] is True  # the Add behind the product


SPELLED: dict[str, tuple[list[Any], dict[str, np.ndarray], str]] = {
    "gelu": ([node("Div", "stem root", "a"), node("Erf", "a", "b"), node("Add", "b one", "c"), node("Mul", "stem c", "d"),
              node("Mul", "d half", "out")],
             {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}, "GELU"),
    "gelu in another order": (
        [node("Mul", "stem root", "a"), node("Erf", "a", "b"), node("Add", "one b", "c"), node("Mul", "half stem", "d"),
         node("Mul", "d c", "out")], {"root": np.float32(0.5**0.5), "one": np.float32(1), "half": np.float32(0.5)}, "GELU"),
    "hard swish": ([node("Add", "stem three", "a"), node("Clip", "a low high", "b"), node("Div", "b six", "c"),
                    node("Mul", "stem c", "out")], {"three": np.float32(3), "six": np.float32(6), "low": np.float32(0),
                                                    "high": np.float32(6)}, "Hardswish"),
    "hard swish by hard sigmoid": ([node("HardSigmoid", "stem", "a", alpha=1 / 6, beta=0.5),
                                    node("Mul", "a stem", "out")], {}, "Hardswish"),
    "hard sigmoid": ([node("Add", "stem three", "a"), node("Clip", "a low high", "b"), node("Mul", "b sixth", "out")],
                     {"three": np.float32(3), "sixth": np.float32(1 / 6), "low": np.float32(0), "high": np.float32(6)},
                     "Hardsigmoid"),
    "silu": ([node("Sigmoid", "stem", "a"), node("Mul", "stem a", "out")], {}, "SiLU"),
}


@pytest.mark.parametrize("spelling", SPELLED)
def test_activations_in_several_nodes_are_one_layer(spelling: str, tmp_path: Path) -> None:
    middle, constants, kind = SPELLED[spelling]
    nodes, head = with_head([STEM, *middle], "out", 8)
    layers = read_back(written(tmp_path / "spelled.onnx", nodes, {**STEM_WEIGHT, **constants, **head}))
    assert types(layers)[:2] == ["Conv2d", kind] and len(layers) <= 5


def test_a_layer_norm_in_several_nodes_is_one_layer(tmp_path: Path) -> None:
    middle = [node("Transpose", "stem", "last", perm=[0, 2, 3, 1]),
              node("ReduceMean", "last", "mean", axes=[-1]), node("Sub", "last mean", "centred"),
              node("Pow", "centred two", "square"), node("ReduceMean", "square", "variance", axes=[-1]),
              node("Add", "variance eps", "plus"), node("Sqrt", "plus", "root"), node("Div", "centred root", "normal"),
              node("Mul", "normal norm.weight", "scaled"), node("Add", "scaled norm.bias", "shifted"),
              node("Transpose", "shifted", "first", perm=[0, 3, 1, 2])]
    nodes, head = with_head([STEM, *middle], "first", 8)
    constants = {"two": np.float32(2), "eps": np.float32(1e-6), "norm.weight": drawn(8), "norm.bias": drawn(8)}
    layers = read_back(written(tmp_path / "norm.onnx", nodes, {**STEM_WEIGHT, **constants, **head}))
    norm = next(layer for layer in layers if layer.type == "LayerNorm")
    assert (norm.name, norm.options()["eps"]) == ("norm", 1e-6) and "Mean" not in types(layers)


@pytest.mark.parametrize("how", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("op", ["Conv", "MaxPool", "AveragePool"])
def test_padding_that_the_runtime_computes(op: str, how: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"auto_pad": how, "strides": [2, 2], "kernel_shape": [3, 3]}
    middle = node("Conv", "stem inner.weight", "out", **options) if op == "Conv" else node(op, "stem", "out", **options)
    nodes, head = with_head([STEM, middle], "out", 8)
    read_back(written(tmp_path / "padded.onnx", nodes, {**STEM_WEIGHT, "inner.weight": drawn(8, 8, 3, 3), **head}))


def test_weights_that_are_stored_in_another_form(tmp_path: Path) -> None:
    """Quantized, transposed, reshaped, in a Constant node, and doubled by alpha."""
    integers = np.random.default_rng(0).integers(-100, 100, (8, 3, 3, 3)).astype(np.int8)
    nodes = [node("DequantizeLinear", "integers scales zeros", "weight", axis=0),
             node("Conv", "x weight", "stem", pads=[1, 0, 0, 1]), node("Relu", "stem", "on"),
             node("GlobalAveragePool", "on", "pooled"), node("Reshape", "pooled keep", "flat"),
             node("Reshape", "list square", "matrix"), node("Transpose", "matrix", "turned", perm=[1, 0]),
             node("Gemm", "flat turned bias", "y", alpha=2.0, beta=0.5)]
    constants = {"integers": integers, "scales": abs(drawn(8)) / 100, "zeros": np.zeros(8, np.int8),
                 "keep": np.array([0, -1]), "list": drawn(32), "square": np.array([4, 8]), "bias": drawn(4)}
    layers = read_back(written(tmp_path / "stored.onnx", nodes, constants))
    assert types(layers)[0] == "Pad" and types(layers)[-1] == "Linear"


def test_a_batch_of_one_in_every_reshape(tmp_path: Path) -> None:
    """Tokens, positions, and attention over (sequence, N, features): the file says 1 wherever the batch is."""
    reshapes = {"grid": [1, 8, 64], "heads": [65, 2, 4], "rows": [65, 8], "back": [65, 1, 8], "all": [1, -1]}
    nodes = [STEM, node("Reshape", "stem grid", "flat"), node("Transpose", "flat", "tokens", perm=[0, 2, 1]),
             node("Concat", "class_token tokens", "joined", axis=1), node("Add", "joined position", "placed"),
             node("Transpose", "placed", "sequence", perm=[1, 0, 2]),
             node("Reshape", "sequence heads", "split"), node("Transpose", "split", "q", perm=[1, 0, 2]),
             node("Transpose", "split", "k", perm=[1, 2, 0]), node("MatMul", "q k", "scores"),
             node("Softmax", "scores", "shares", axis=-1), node("MatMul", "shares q", "mixed"),
             node("Transpose", "mixed", "turned", perm=[1, 0, 2]), node("Reshape", "turned rows", "flat_rows"),
             node("MatMul", "flat_rows project", "projected"), node("Add", "projected project_bias", "shifted"),
             node("Reshape", "shifted back", "again"), node("Transpose", "again", "result", perm=[1, 0, 2]),
             node("Reshape", "result all", "everything"), node("Gemm", "everything head", "y")]
    constants = {name: np.array(sizes) for name, sizes in reshapes.items()} | {
        "class_token": drawn(1, 1, 8), "position": drawn(1, 65, 8), "project": drawn(8, 8), "project_bias": drawn(8),
        "head": drawn(520, 4)}
    path = written(tmp_path / "fixed.onnx", nodes, {**STEM_WEIGHT, **constants}, image=(1, 3, 8, 8), output=(1, 4))
    opened = open_classifier(path)
    assert "the file takes 1 image a call" in opened.notes[0]
    assert {"class_token", "position"} <= {name for name, _ in read_network(opened).named_parameters()}
    layers = read_back(path)
    assert types(layers).count("Linear") == 2


@pytest.mark.parametrize(("target", "outside", "batch", "where"), [
    ([1, 197, 768], 1, 1, (0, 1, 1)), ([64, 49, 96], 1, 1, (0, 64, 1)), ([197, 12, 64], 197, 1, (1, 12, 1)),
    ([197, 768], 197, 1, (0, 197, 197)), ([197, 1, 768], 197, 1, (1, 1, 1)), ([4, 10], 1, 4, (0, 1, 1)),
    ([3, 2, 5], 3, 2, (1, 1, 1))])
def test_where_the_images_go_in_a_fixed_reshape(target: list[int], outside: int, batch: int,
                                                where: tuple[int, int, int]) -> None:
    assert place_images(target, outside, batch) == where


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


def test_a_file_that_takes_channels_last(tmp_path: Path) -> None:
    nodes, head = with_head([node("Transpose", "x", "turned", perm=[0, 3, 1, 2]),
                             node("Conv", "turned stem.weight", "stem", auto_pad="SAME_UPPER", strides=[2, 2])], "stem", 8)
    path = written(tmp_path / "last.onnx", nodes, {**STEM_WEIGHT, **head}, image=(1, 8, 9, 3), output=(1, 4))
    opened = open_classifier(path)
    assert opened.input_shape == (3, 8, 9) and opened.file.channels_last
    assert "Permute" not in types(read_back(path))


def test_a_size_that_the_file_leaves_open_is_asked_for(tmp_path: Path) -> None:
    nodes, head = with_head([STEM], "stem", 8)
    path = written(tmp_path / "open.onnx", nodes, {**STEM_WEIGHT, **head}, image=("n", 3, "h", "w"))
    with pytest.raises(UserError, match=r"leaves the size of its images open \(3, \?, \?\); give input_shape"):
        open_classifier(path)
    assert types(read_back(path, input_shape=(3, 6, 7)))[0] == "Conv2d"


@pytest.mark.parametrize(("sizes", "wanted", "said"), [
    (("n", 3, 6, 7), (3, 8, 8), r"takes images of 6x7 pixels, not of 8x8; .*data\.image_size=\[6,7\]"),
    ((1, 6, 6, 3), (3, 8, 8), r"takes images of 6x6 pixels, not of 8x8; .*data\.image_size=6\)")])
def test_images_of_another_size_than_the_file_states(sizes: tuple[Any, ...], wanted: tuple[int, int, int], said: str,
                                                     tmp_path: Path) -> None:
    turned = [node("Transpose", "x", "turned", perm=[0, 3, 1, 2])] if sizes[-1] == 3 else []
    nodes, head = with_head([*turned, node("Conv", f"{'turned' if turned else 'x'} stem.weight", "stem")], "stem", 8)
    path = written(tmp_path / "stated.onnx", nodes, {**STEM_WEIGHT, **head}, image=sizes, output=(sizes[0], 4))
    with pytest.raises(UserError, match=said):
        open_classifier(path, wanted)


def test_what_has_no_form_is_named(tmp_path: Path) -> None:
    nodes, head = with_head([STEM, node("CumSum", "stem axis", "out")], "out", 8)
    path = written(tmp_path / "sums.onnx", nodes, {**STEM_WEIGHT, "axis": np.array(1), **head})
    with pytest.raises(NotExpressibleError, match="operator CumSum of node 'node_out': no layer stands for it"):
        read_network(open_classifier(path))


@pytest.mark.parametrize(("opset", "attributes", "fits"), [
    (10, {}, True), (17, {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, True),
    (17, {"mode": "linear"}, True), (17, {"mode": "linear", "coordinate_transformation_mode": "align_corners"}, False),
    (17, {}, False)])
def test_images_are_resized_where_a_layer_does_the_same(opset: int, attributes: dict[str, str], fits: bool,
                                                        tmp_path: Path) -> None:
    nodes, head = with_head([STEM, node("Resize", f"stem {'- ' * (opset > 10)}scales", "out", **attributes),
                             node("MaxPool", "out", "last", kernel_shape=[3, 3], strides=[2, 2])], "last", 8)
    path = written(tmp_path / "resized.onnx", nodes, {
        **STEM_WEIGHT, "scales": np.array([1, 1, 2, 3], np.float32), **head}, opset=opset)
    if fits:
        assert "Upsample" in types(read_back(path))
    else:
        with pytest.raises(NotExpressibleError, match="operator Resize of node 'node_out': only whole factors"):
            read_network(open_classifier(path))


def hostile(kind: str, folder: Path) -> Path:
    """A file that asks for more than an image classifier does."""
    nodes, constants = with_head([STEM], "stem", 8)
    constants |= STEM_WEIGHT
    if kind == "custom":
        nodes[0] = node("Conv", "x stem.weight", "stem", pads=[1, 1, 1, 1], domain="my.own")
    elif kind == "hidden":  # the size is not known to ONNX's inference of shapes
        nodes = [node("Exp", "thirty", "large"), node("Cast", "large", "size", to=7),
                 node("ConstantOfShape", "size", "vast"), node("ReduceSum", "vast", "sum", keepdims=0),
                 node("Add", "x sum", "more"), *nodes]
        nodes[5].input[0] = "more"
        constants |= {"thirty": np.array([30], np.float32)}
    elif kind == "range":
        nodes = [node("Range", "zero end one", "long"), node("ReduceSum", "long", "sum", keepdims=0),
                 node("Cast", "sum", "number", to=1), node("Add", "x number", "more"), *nodes]
        nodes[4].input[0] = "more"
        constants |= {"zero": np.array(0), "end": np.array(2**45), "one": np.array(1)}
    path = written(folder / f"{kind}.onnx", nodes, constants)
    if kind == "outside":
        import onnx
        model = onnx.load(path)
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../secret.bin")
        path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(("kind", "words"), [("custom", "operator 'Conv' of node"), ("hidden", "constants do not fit it"),
                                             ("range", "over the limits"), ("outside", "secret.bin")])
def test_hostile_files_end_in_one_line_before_anything_is_allocated(kind: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as raised:
        read_network(open_classifier(hostile(kind, tmp_path)))
    assert "\n" not in str(raised.value) and raised.value.exit_code == 2


class Squeezed(nn.Module):
    """Parts that torch's exporter writes in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("batch", ["fixed", "free"])
@pytest.mark.filterwarnings("ignore")
def test_torchs_own_exporter_comes_back(batch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    axes = {"dynamic_axes": {"x": {0: "n"}, "y": {0: "n"}}} if batch == "free" else {}
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(Squeezed().eval(), (torch.randn(1, 3, 8, 8),), tmp_path / "net.onnx", dynamo=False,
                          input_names=["x"], output_names=["y"], **axes)
    layers = read_back(tmp_path / "net.onnx")
    named = {layer.name: layer.type for layer in layers}
    assert {"stem.0": "Conv2d", "squeeze": "Conv2d", "excite": "Conv2d", "norm": "LayerNorm", "head": "Linear"}.items() <= (
        named.items())
