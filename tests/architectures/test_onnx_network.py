"""ONNX files become networks whose logits are ONNX Runtime's, for one, two and three images."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from architectures.describe import lower
from architectures.layers.table import LAYER_TABLE
from architectures.onnx_network import constants as folding
from architectures.onnx_network.batch import place_images
from architectures.onnx_network.graph import NotExpressibleError
from architectures.onnx_network.reading import open_classifier, read_network
from architectures.onnx_network.registry import OPERATORS
from architectures.onnx_network.runtime import TOLERANCE, difference_from_file
from compress.packaging.export import export
from metadata.errors import UserError
from tests.helpers.onnx_graphs import STEM, STEM_WEIGHT, drawn, node, read_back, types, with_head, written
from tests.packaging.test_export import Everything, trained


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
    nodes, constants = with_head([copy.deepcopy(STEM)], "stem", 8)  # it is changed below
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
    elif kind in ("joined", "gathered", "many", "empty"):  # the large tensor's shape is hidden from ONNX's inference
        start = [node("Exp", "fourteen", "large"), node("Cast", "large", "size", to=7),
                 node("ConstantOfShape", "size", "vast")]
        more = {
            "joined": [node("Concat", " ".join(["vast"] * 300), "sums", axis=0)],
            "gathered": [node("Cast", "vast", "zeros", to=7), node("Unsqueeze", "zeros last", "places"),
                         node("GatherND", "rows places", "sums")],
            "many": [node("ConstantOfShape", "size", f"vast{number}") for number in range(9)] + [
                node("Concat", "vast vast", "sums", axis=0)],
            "empty": [node("ReduceSum", "none last", "sums", keepdims=0)]}[kind]
        end = [node("ReduceSum", "sums", "sum", keepdims=0), node("Add", "x sum", "more")]
        nodes = [*start, *more, *end, *nodes]
        nodes[len(start + more + end)].input[0] = "more"
        constants |= {"fourteen": np.array([14], np.float32), "last": np.array([1]), "rows": drawn(2, 4096),
                      "none": np.zeros((2**40, 0), np.float32)}
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
                                             ("range", "over the limits"), ("outside", "secret.bin"),
                                             ("joined", "Concat of node 'node_sums': its constants do not fit it"),
                                             ("gathered", "GatherND of node 'node_sums': its constants do not fit it"),
                                             ("many", "numbers are computed from constants, over the limit"),
                                             ("empty", "over the limits")])
def test_hostile_files_end_in_one_line_before_anything_is_allocated(kind: str, words: str, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "MOST_CONSTANTS", 2**23)
    with pytest.raises(UserError, match=words) as raised:
        read_network(open_classifier(hostile(kind, tmp_path)))
    assert "\n" not in str(raised.value) and raised.value.exit_code == 2


def test_every_operator_that_our_own_export_writes_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    written_ops: set[str] = set()
    for number, module in enumerate((Everything(), whole)):
        exported, _ = export(*trained(module))
        written_ops |= {entry.op_type for entry in exported.graph.node}
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(exported.SerializeToString())
        layers = read_back(path)
    assert written_ops == {name for row in LAYER_TABLE.values() if not row.int8 for name in row.operators}
    assert types(layers) == ["Conv2d", "AdaptiveMaxPool2d", "Flatten", "Linear"]


def test_an_operator_that_is_read_and_has_no_layer_is_named(tmp_path: Path) -> None:
    nodes, head = with_head([STEM, node("Elu", "stem", "out", name="block/Elu_3")], "out", 8)
    opened = open_classifier(written(tmp_path / "elu.onnx", nodes, {**STEM_WEIGHT, **head}))
    network = read_network(opened)
    assert difference_from_file(network, opened) < TOLERANCE
    with pytest.raises(UserError, match=r"layer elu \(operator Elu of node 'block/Elu_3'\): elu"):
        lower(network, opened.input_shape)


def test_more_memory_than_there_is_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, head = with_head([STEM, node("Neg", "shift", "other"), node("Add", "stem other", "out")], "out", 8)
    path = written(tmp_path / "net.onnx", nodes, {**STEM_WEIGHT, "shift": drawn(8, 1, 1), **head})

    def out_of_memory(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setitem(folding.FUNCTIONS, "Neg", out_of_memory)
        with pytest.raises(NotExpressibleError, match=r"operator Neg of node 'node_other': .* more memory than there is"):
            read_network(open_classifier(path))
    monkeypatch.setitem(OPERATORS, "Conv", out_of_memory)
    with pytest.raises(UserError, match="takes more memory than there is") as raised:
        read_network(open_classifier(path))
    assert type(raised.value) is UserError


@pytest.mark.parametrize("folded", [True, False])
def test_batch_norms_come_back(folded: bool, tmp_path: Path) -> None:
    """A norm of its own, and one whose scale is in the convolution's weights and whose shift is its bias."""
    norm = {"norm.weight": drawn(8) + 1, "norm.bias": drawn(8), "norm.mean": drawn(8), "norm.var": drawn(8) ** 2 + 0.5}
    weights, middle = {**STEM_WEIGHT, **norm}, [STEM, node("BatchNormalization", " ".join(["stem", *norm]), "out",
                                                           epsilon=1e-3, momentum=0.9)]
    if folded:
        factor = norm["norm.weight"] / np.sqrt(norm["norm.var"] + 1e-3)
        weights = {"stem.weight": STEM_WEIGHT["stem.weight"] * factor[:, None, None, None],
                   "stem.bias": norm["norm.bias"] - norm["norm.mean"] * factor}
        middle = [node("Conv", "x stem.weight stem.bias", "out", pads=[1, 1, 1, 1])]
    nodes, head = with_head([*middle, node("Relu", "out", "on")], "on", 8)
    path = written(tmp_path / "norm.onnx", nodes, {**weights, **head})
    layers = read_back(path)
    assert types(layers)[:3] == (["Conv2d", "ReLU", "AdaptiveAvgPool2d"] if folded else ["Conv2d", "BatchNorm2d", "ReLU"])
    if not folded:
        assert layers[1].options()["eps"] == 1e-3 and layers[1].name == "norm"
        stored = read_network(open_classifier(path)).state_dict()
        assert torch.equal(stored["norm.running_mean"], torch.from_numpy(norm["norm.mean"]))


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
