"""The layer table: a new type is one class, and each row keeps what it promises."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from architectures.architecture import Architecture
from architectures.build import build
from architectures.counting import count_macs, count_parameters, layer_costs
from architectures.describe import carry_over, describe
from architectures.layers.arithmetic import MatMul, Reduction, ScaledDotProduct, Softmax
from architectures.layers.base import Layer, OnnxWriter, Operator, Shape, traced_argument
from architectures.layers.moves import Pad, Slice
from architectures.layers.channels import LabelBook, Labels
from architectures.layers.norms import GroupNorm
from architectures.layers.table import LAYER_TABLE, registered, row_of_module
from architectures.layers.weighted import Convolution
from architectures.source import source
from compress.evaluation.channel import Clock
from compress.evaluation.pictures import decode_pictures, list_test_data
from compress.evaluation.runtimes import EvaluationSettings, open_here
from compress.evaluation.serve import serve
from compress.evaluation.submission import read_submission
from compress.packaging.export import export
from compress.packaging.package import TorchPackage
from compress.pruning.prune import prune
from compress.quantization.dynamic import quantize_graph
from compress.quantization.equalization import equalize
from compress.quantization.static import Calibration, StaticSettings, quantize_static
from metadata.errors import UserError
from metadata.records import DatasetCard
from metadata.schemas import Preprocessing
from tests.helpers.commands import PROJECT
from tests.helpers.folders import draw_folder

SHAPE = (3, 16, 16)


class ELU(Layer):
    """A type without weights that is also called as a function."""

    functions = ("torch.nn.functional.elu",)
    operators = {"Elu": Operator()}

    alpha: float = 1.0

    @classmethod
    def from_call(cls, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        return [node.args[0]], {"alpha": traced_argument(node, 1, "alpha", 1.0)}

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        return inputs[0]

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        return writer.node("Elu", self.name, inputs, alpha=self.alpha)


class Network(nn.Module):
    """Convolutions with PReLU, ELU as a module and ELU as a function between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.prelu = nn.PReLU(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.elu = nn.ELU(alpha=0.5)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.elu(self.norm(self.second(self.prelu(self.first(x)))))
        return self.fc(nn.functional.elu(x, alpha=0.75).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def new_types() -> Iterator[None]:
    with registered(ELU):
        yield


@pytest.fixture
def described(new_types: None) -> tuple[fx.GraphModule, Architecture]:
    torch.manual_seed(0)
    model = Network()
    nn.init.uniform_(model.prelu.weight, 0.1, 0.9)
    model(torch.randn(16, *SHAPE))  # so that the norm's statistics are not the identity
    model.eval()
    architecture = describe(model, SHAPE)
    graph = build(architecture)
    graph.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(graph.eval()(images()), model(images()))
    return graph, architecture


def images() -> Tensor:
    return torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1))


def answers(content: bytes) -> Tensor:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": images().numpy()})[0])


def test_a_new_type_is_described_and_built(described: tuple[fx.GraphModule, Architecture]) -> None:
    graph, architecture = described
    assert [layer.type for layer in architecture.layers] == [
        "Conv2d", "PReLU", "Conv2d", "BatchNorm2d", "ELU", "ELU", "Mean", "Linear"]
    assert describe(graph, SHAPE, architecture.model_type) == architecture
    assert Architecture.model_validate(architecture.to_json()) == architecture
    rows = {layer["name"]: layer for layer in architecture.to_json()["layers"]}
    assert rows["prelu"] == {"name": "prelu", "type": "PReLU", "inputs": ["first"], "num_parameters": 16}
    assert sorted(row["alpha"] for row in rows.values() if row["type"] == "ELU") == [0.5, 0.75]
    assert layer_costs(architecture)["prelu"].parameters == 16


def test_a_new_type_is_pruned(described: tuple[fx.GraphModule, Architecture]) -> None:
    graph, architecture = described
    pruned = prune(graph, torch.zeros(1, *SHAPE), ratio=0.5, multiple=4, criterion="l2", scope="uniform")
    smaller = carry_over(describe(pruned, SHAPE), architecture, pruning_rate=0.5)
    row, = (layer for layer in smaller.layers if layer.name == "prelu")
    assert row.options() == {"num_parameters": 8} and pruned.get_submodule("second").weight.shape == (8, 8, 3, 3)
    again = build(smaller).eval()
    again.load_state_dict(pruned.state_dict(), strict=True)
    assert torch.equal(again(images()), pruned(images()))


def test_a_new_type_is_exported_equalised_and_quantized(described: tuple[fx.GraphModule, Architecture]) -> None:
    graph, architecture = described
    exported, _ = export(graph, architecture)
    with torch.no_grad():
        expected = graph(images())
        assert torch.allclose(answers(exported.SerializeToString()), expected, atol=1e-5)
        dynamic, _ = quantize_graph(graph, choose=False)
        assert torch.allclose(dynamic(images()), expected, atol=0.05 * float(expected.abs().max()))
    equalized, pairs = equalize(exported)
    assert pairs == [("first", "second")]  # PReLU passes factors on, ELU does not
    assert torch.allclose(answers(equalized.SerializeToString()), expected, atol=1e-4)
    calibration = Calibration(model=exported, images=images().numpy())
    quantized = quantize_static(calibration, StaticSettings())
    assert torch.allclose(answers(quantized.model.SerializeToString()), expected, atol=0.1 * float(expected.abs().max()))


def test_a_new_type_is_packaged_and_served(described: tuple[fx.GraphModule, Architecture], tmp_path: Path) -> None:
    graph, architecture = described
    card = DatasetCard(name="drawn", class_names=[f"class_{label:03d}" for label in range(4)], input_shape=SHAPE,
                       preprocessing=Preprocessing(resize=16, crop=16, mean=[0.5] * 3, std=[0.5] * 3))
    measured = {"correct": 1, "images": 4, "accuracy": 0.25, "latency_ms": 1.0, "latency_p5_ms": 1.0,
                "latency_p95_ms": 1.0}
    folder = tmp_path / "submission"
    TorchPackage(architecture=architecture, card=card, name="new", measured=measured, model=graph).write(folder)
    data = draw_folder(tmp_path / "data", classes=4, images=2, size=16, splits=("test",))
    # In this process: the evaluator's readers know the types of the table's files, and this one is of a test.
    files, listed = read_submission(folder), list_test_data(data / "test")
    runtime = open_here(files, "torch", 1)
    pictures = decode_pictures(listed.paths, files.preprocessing, files.input_shape, True, Clock(60))
    answered = serve([runtime], [pictures], [4], EvaluationSettings(runs=5, warmup=1), [Clock(60)])[0]
    assert np.isfinite(answered.logits).all() and runtime.parameters["all"] == count_parameters(graph)
    torch.save({"images": images(), "logits": graph(images()).detach()}, tmp_path / "expected.pth")
    script = """import sys, torch
sys.path.insert(0, sys.argv[1])
from model import Network
model = Network().eval()
model.load_state_dict(torch.load(sys.argv[1] + "/compressed_new.pth", weights_only=True), strict=True)
expected = torch.load(sys.argv[2], weights_only=True)
assert torch.allclose(model(expected["images"]), expected["logits"], atol=1e-5)
assert not [name for name in sys.modules if name.split(".")[0] in ("architectures", "compress", "metadata")]
"""
    done = subprocess.run([sys.executable, "-I", "-c", script, str(folder), str(tmp_path / "expected.pth")],
                          capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_a_registration_ends_with_its_block() -> None:
    before = dict(LAYER_TABLE)
    with registered(ELU):
        assert LAYER_TABLE["ELU"] is ELU and row_of_module(nn.ELU()) is ELU
        with pytest.raises(ValueError, match="has a row ELU already"), registered(ELU):
            pass
        assert LAYER_TABLE["ELU"] is ELU
    assert dict(LAYER_TABLE) == before
    with pytest.raises(UserError, match="layer elu: ELU is not in the layer table"):
        describe(Network(), SHAPE)


def test_rows_agree_on_the_operators_that_they_share() -> None:
    seen: dict[str, Operator] = {}
    for row in LAYER_TABLE.values():
        for name, operator in row.operators.items():
            assert seen.setdefault(name, operator) == operator, f"{row.__name__}: {name}"
    assert {name for name, operator in seen.items() if operator.quantized == "weighted"} == {
        "Conv", "Gemm", "MatMul", "Relu", "Clip"}


def test_the_page_on_networks_names_every_type() -> None:
    rows = [line for line in (PROJECT / "docs" / "networks.md").read_text().splitlines() if line.startswith("| ")]
    assert sorted(re.findall(r"`(\w+)`", "".join(rows))) == sorted(LAYER_TABLE)


VALUES = torch.linspace(-8, 8, 2 * 4 * 6 * 6)[torch.randperm(288, generator=torch.Generator().manual_seed(2))].reshape(
    2, 4, 6, 6)
OPTIONS: dict[str, dict[str, Any]] = {
    "Conv2d": {"in_channels": 4, "out_channels": 6, "kernel_size": [3, 2], "stride": [2, 1], "groups": 2},
    "Linear": {"in_features": 6, "out_features": 5, "bias": False},
    "Int8Conv2d": {"in_channels": 4, "out_channels": 6, "kernel_size": [3, 3], "padding": [1, 1], "dilation": [2, 2]},
    "Int8Linear": {"in_features": 6, "out_features": 5},
    "BatchNorm1d": {"num_features": 4}, "BatchNorm2d": {"num_features": 4, "affine": False},
    "GroupNorm": {"num_groups": 2, "num_channels": 4}, "MaxPool2d": {"kernel_size": [2, 2], "stride": [2, 2]},
    "AvgPool2d": {"kernel_size": [2, 2], "stride": [1, 1], "padding": [1, 1]},
    "AdaptiveAvgPool2d": {"output_size": [2, 3]}, "AdaptiveMaxPool2d": {"output_size": [1, 1]},
    "Mean": {"dim": [2, 3]}, "Sum": {"dim": [2, 3]}, "Maximum": {"dim": [1], "keepdim": True}, "Norm": {"dim": [-1]},
    "PReLU": {"num_parameters": 4}, "LayerNorm": {"normalized_shape": [6, 6]}, "Softmax": {"dim": 1},
    "Clamp": {"min": -1.0}, "ScaleShift": {"scale": -0.5, "shift": 2.0}, "ScaledDotProduct": {"scale": 0.5},
    "Reshape": {"shape": [2, 12, 6]}, "Permute": {"dims": [0, 2, 1, 3]}, "Pad": {"pad": [1, 0, 2, 1], "value": 0.5},
    "Slice": {"dim": 2, "start": 1, "stop": 6, "step": 2}, "Gather": {"dim": 1, "count": 3},
    "Upsample": {"size": [12, 9]}, "Parameter": {"shape": [2, 3]}, "Buffer": {"shape": []}}


def example(kind: str) -> tuple[Layer, list[Tensor]]:
    """A layer of the type, and tensors that the layer takes."""
    values = [VALUES] * LAYER_TABLE[kind].input_count[0]
    if kind == "BatchNorm1d":
        values = [VALUES[:, :, 0]]
    return LAYER_TABLE[kind].model_validate({"name": "layer", "type": kind, "inputs": ["input"] * len(values),
                                             **OPTIONS.get(kind, {})}), values


@pytest.mark.parametrize("kind", LAYER_TABLE)
def test_a_row_keeps_what_it_promises(kind: str) -> None:
    torch.manual_seed(0)
    layer, values = example(kind)
    output = layer.run(values)
    if layer.identity:
        assert output is values[0]
    if layer.nonnegative:
        assert bool((output >= 0).all())
    if layer.keeps_sign:
        assert bool((layer.run([value.abs() for value in values]) >= 0).all())
    if layer.keeps_grid:
        assert set(output.unique().tolist()) <= {0.0, *VALUES.unique().tolist()}
    if layer.owns_output:
        assert output.untyped_storage().data_ptr() not in {value.untyped_storage().data_ptr() for value in values}
    if any(operator.passes_factors_on for operator in layer.operators.values()):
        factors = torch.tensor([0.5, 1.0, 2.0, 4.0]).view(-1, 1, 1)
        scaled = layer.run([value * factors for value in values])
        assert torch.allclose(scaled, output * (factors if output.dim() == 4 else factors.flatten()), rtol=1e-5)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        layer.run([value[:1] for value in values])
    shapes = [tuple(value.shape[1:]) for value in values]
    assert counter.get_total_flops() == 2 * layer.macs(shapes, tuple(output.shape[1:]))
    assert layer.weighted == (layer.width is not None)
    assert (counter.get_total_flops() > 0) == (layer.weighted or kind in ("MatMul", "ScaledDotProduct"))


def test_source_of_every_type_builds_the_layer() -> None:
    for kind in LAYER_TABLE:
        layer, values = example(kind)
        namespace: dict[str, Any] = {"torch": torch, "nn": nn, "values": values}
        namespace |= {definition.__name__: definition for definition in layer.definitions()}
        if (row := type(layer)).module_class() is not None:
            namespace["module"] = eval(layer.constructor({}), namespace).eval()
            options = row.from_module(namespace["module"], "layer")
            again = row.model_validate({"name": "layer", "type": kind, "inputs": ["input"], **options})
            assert again.options() == layer.options()
        output = eval(layer.expression([f"values[{index}]" for index in range(len(values))], "module"), namespace)
        assert output.shape == layer.run(values).shape


def test_costs_of_a_network_are_the_sum_of_its_layers(described: tuple[fx.GraphModule, Architecture]) -> None:
    graph, architecture = described
    costs = layer_costs(architecture).values()
    assert sum(cost.parameters for cost in costs) == count_parameters(graph)
    assert sum(cost.macs for cost in costs) == count_macs(graph, SHAPE)
    assert "nn.PReLU(num_parameters=16)" in source(architecture, "weights.pth")


OTHERS: dict[str, list[dict[str, Any]]] = {
    "Conv2d": [{"in_channels": 4, "out_channels": 2, "kernel_size": [4, 1], "padding": [1, 2], "dilation": [2, 1]}],
    "MaxPool2d": [{"kernel_size": [3, 2], "stride": [2, 3], "padding": [1, 0], "dilation": [1, 2], "ceil_mode": ceil}
                  for ceil in (False, True)] + [{"kernel_size": [2, 2], "stride": [3, 3], "padding": [2, 0]}],
    "AvgPool2d": [{"kernel_size": [3, 4], "stride": [3, 2], "padding": [0, 2], "ceil_mode": True}],
    "AdaptiveAvgPool2d": [{"output_size": [1, 1]}],
    "Flatten": [{"start_dim": 2}, {"start_dim": -2, "end_dim": -3}, {"start_dim": -3, "end_dim": 2}, {"start_dim": 0}],
    "Mean": [{"dim": [-1], "keepdim": True}, {"dim": [1, -1]}, {"dim": [], "keepdim": True}, {"dim": [0, 4]}],
    "Concat": [{"dim": 0}, {"dim": -1}, {"dim": 3}],
    "Permute": [{"dims": [0, 2, 1]}, {"dims": [0, 1]}], "Reshape": [{"shape": [144]}, {"shape": [24, 1]}],
    "Slice": [{"dim": 1, "start": 0, "stop": 1}, {"dim": 3, "start": 5, "stop": 6}], "Gather": [{"dim": 3, "count": 1}],
    "Pad": [{"pad": [0, 3]}, {"pad": [1, 1, 1, 1, 1, 1]}], "Softmax": [{"dim": -1}], "Sum": [{"dim": [1, -1]}],
    "LayerNorm": [{"normalized_shape": [6]}, {"normalized_shape": [4]}], "PReLU": [{}],
    "Upsample": [{"size": [3, 6], "mode": "bilinear"}]}
SHAPES: list[Shape] = [(2, 4, 6, 6), (2, 4, 6), (2, 4), (2, 6, 5, 7), (2, 4, 1, 1), (2, 1, 3, 2), (1, 4, 6, 1), (2, 6)]


@pytest.mark.parametrize("kind", LAYER_TABLE)
def test_a_row_knows_the_shape_that_torch_computes(kind: str) -> None:
    """Where torch refuses, the row refuses; for odd inputs, which nobody trains on, a row may refuse more."""
    row, agreed = LAYER_TABLE[kind], 0
    stricter = (GroupNorm, Softmax, Reduction, MatMul, ScaledDotProduct, Slice, Pad)
    for options in [OPTIONS.get(kind, {}), *OTHERS.get(kind, [])]:
        layer = row.model_validate({"name": "layer", "type": kind, "inputs": ["input"] * row.input_count[0], **options})
        count = max(row.input_count[0], 2 if row.input_count[1] > 1 else 1)
        for shapes in itertools.product(SHAPES if count < 3 else SHAPES[:3], repeat=count):
            own, torchs = shape_or_none(layer.output_shape, shapes), shape_or_none(of_torch(layer), shapes)
            agreed += own is not None and own == torchs
            odd = (isinstance(layer, Convolution) and len(shapes[0]) == 3) or isinstance(layer, stricter)
            assert own == torchs or (odd and own is None), (options, shapes)
    assert agreed


def of_torch(layer: Layer) -> Callable[[list[Shape]], Shape]:
    return lambda shapes: Layer.output_shape(layer, shapes)


def shape_or_none(compute: Callable[[list[Shape]], Shape], shapes: tuple[Shape, ...]) -> Shape | None:
    try:
        return compute(list(shapes))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None


@pytest.mark.slow
def test_an_architecture_and_a_small_network_are_checked_without_torchs_compiler() -> None:
    """Its import takes as long as that of torch itself, in each process that opens a submission or makes a plan."""
    names = sorted(path.name for path in (PROJECT / "architectures" / "json").iterdir())
    script = """import sys
from pathlib import Path
from architectures.architecture import Architecture
from architectures.build import build, check_shapes
from metadata.files import read_json
for name in sys.argv[1:]:
    architecture = read_json(Path("architectures/json") / name, Architecture)
    assert check_shapes(architecture)[architecture.layers[-1].name] == architecture.output_shape
    build(architecture)
from architectures.zoo import check_forward, make, without_values
with without_values():
    network = make("slim_resnet18", num_classes=10, width=8, stem="small")
check_forward(network, "it", (3, 8, 8), 10)
assert all(tensor.is_meta for tensor in network.state_dict().values())
print({"torch", "torch._dynamo", "sympy"} & sys.modules.keys())"""
    done = subprocess.run([sys.executable, "-c", script, *names], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'torch'}"
