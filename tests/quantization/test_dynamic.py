"""Int8 kernels: the fused program computes what the layers define, says where it cannot, and any model can be quantized."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from architectures.build import build
from architectures.describe import describe
from architectures.kernels import QuantizedTensor, int8_arithmetic, layer_by_layer, no_int8_kernels
from architectures.program import Program, int8_graph, pack
from architectures.source import source
from architectures.weights import load_verified
from architectures.zoo import make
from compress.quantization.dynamic import quantize, quantize_dynamic, quantize_graph
from compress.quantization.int8_table import sqnr_db
from metadata.errors import UserError

PROJECT = Path(__file__).parents[2]
needs_kernels = pytest.mark.skipif(bool(no_int8_kernels()), reason=no_int8_kernels() or "there are int8 kernels")


class Residual(nn.Module):
    """A convolution, what is added to it, and an activation."""

    def __init__(self, activation: nn.Module, channels: int = 24, squeeze: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.squeeze = nn.AdaptiveAvgPool2d(1) if squeeze else nn.Identity()
        self.activation = activation
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.flatten(self.pool(self.activation(self.conv(x) + self.squeeze(x)))))


class Twice(nn.Module):
    """Outputs that are read twice, added to themselves, or read after they were added to something."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.third, self.fourth = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(32, 16, 1)
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(first) + first
        third = torch.relu(self.third(second) + first)
        fourth = self.fourth(torch.cat([third, first], 1))
        return self.fc(self.flatten(self.pool(fourth + fourth) * self.pool(second)))


def graph_of(model: nn.Module, size: int = 16) -> torch.fx.GraphModule:
    graph = build(describe(model.eval(), (3, size, size)))
    graph.load_state_dict(model.state_dict())
    return graph.eval()


@needs_kernels
@pytest.mark.parametrize("exclude", [[], ["conv"], ["stem", "conv", "fc"]])
@pytest.mark.parametrize("squeeze", [False, True], ids=["", "broadcast"])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.Sigmoid(),
                                        nn.Identity()], ids=lambda layer: type(layer).__name__)
def test_fused_kernels_compute_what_the_layers_define(activation: nn.Module, squeeze: bool, exclude: list[str]) -> None:
    torch.manual_seed(2)
    float_graph = graph_of(Residual(activation, squeeze=squeeze))
    if len(exclude) == 3:
        model = float_graph
        fast: Any = Program(model)
    else:
        model, _ = quantize_graph(float_graph, exclude)
        fast = model
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected, got = layer_by_layer(model)(images), fast(images)
        exact = float_graph(images)
    # A value on the edge between two levels may fall to either side: far below the quantization's own noise.
    assert sqnr_db(expected, got) > 45
    assert sqnr_db(exact, got) > 25 if not exclude else sqnr_db(exact, got) > 30


class ReadLate(nn.Module):
    """A tensor that is added to, and read by a layer whose kernel runs only where its ReLU stands, after the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.third, self.pool = nn.Conv2d(16, 16, 3, padding=1), nn.AdaptiveAvgPool2d(1)
        self.flatten, self.fc = nn.Flatten(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        second = self.second(x)
        total = self.third(x) + x
        return self.fc(self.flatten(self.pool(total + torch.relu(second))))


@needs_kernels
@pytest.mark.parametrize("exclude", [[], ["first"], ["second"], ["third"], ["second", "third"]], ids=str)
@pytest.mark.parametrize("network", [Twice, ReadLate])
def test_tensors_that_are_read_later_are_not_overwritten(network: type[nn.Module], exclude: list[str]) -> None:
    torch.manual_seed(3)
    model, _ = quantize_graph(graph_of(network()), exclude)
    images = torch.randn(3, 3, 16, 16)
    before = images.clone()
    with torch.no_grad():
        assert sqnr_db(layer_by_layer(model)(images), model(images)) > 40
    assert torch.equal(images, before)


@needs_kernels
@pytest.mark.parametrize("start_dim", [1, 2])
def test_linear_layers_take_rows_and_planes(start_dim: int) -> None:
    torch.manual_seed(4)
    features = 8 * 16 * 16 if start_dim == 1 else 16 * 16
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(start_dim), nn.Linear(features, 6), nn.ReLU()]
    model, _ = quantize_graph(graph_of(nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 8 ** (start_dim - 1), 5))))
    images = torch.randn(2, 3, 16, 16)
    assert sqnr_db(layer_by_layer(model)(images), model(images)) > 40


@needs_kernels
@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-1.0, 1.0), (-1.0, 0.0), (-0.001, 1.0), (-1.0, 0.001), (0.0, 0.0),
                                       (-3e4, 3e-4), (2.0, 2.0)])
def test_integers_of_a_tensor_are_those_of_the_layers(low: float, high: float) -> None:
    from architectures.int8 import int8_layers
    tensor = torch.empty(1, 8, 9, 9).uniform_(low, high) if low < high else torch.full((1, 8, 9, 9), low)
    levels, scale, zero_point = QuantizedTensor(tensor).parts()
    expected, expected_scale = int8_layers().quantize_activations(tensor)
    assert levels.dtype == torch.uint8 and 0 <= zero_point <= 255
    assert scale == pytest.approx(float(expected_scale), rel=1e-6)
    off = (levels.float() - zero_point - expected).abs()
    assert off.max() <= 1 and off.mean() < 0.01  # one apart only where a value lies on the edge between two levels
    assert torch.allclose((levels.float() - zero_point) * scale, tensor, atol=0.51 * scale)


@needs_kernels
def test_images_of_a_batch_do_not_see_each_other() -> None:
    model, _ = quantize_graph(graph_of(Residual(nn.ReLU())))
    images = torch.randn(5, 3, 16, 16) * torch.arange(1, 6).view(-1, 1, 1, 1)
    with torch.no_grad():
        assert torch.equal(model(images), torch.cat([model(image[None]) for image in images]))


@needs_kernels
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_not_a_number_comes_out_as_such(activations: str) -> None:
    model, _ = quantize_graph(graph_of(Residual(nn.ReLU())))
    for name in ("stem", "conv", "fc"):
        model.get_submodule(name).activations = activations  # type: ignore[assignment]
    images = torch.randn(1, 3, 16, 16)
    images[0, 0, 0, 0] = float("nan")
    assert bool(model(images).isnan().any()) and bool(layer_by_layer(model)(images).isnan().any())


@needs_kernels
def test_new_weights_are_used_and_copies_are_their_own() -> None:
    model, _ = quantize_graph(graph_of(Residual(nn.ReLU())))
    other, _ = quantize_graph(graph_of(Residual(nn.ReLU())))
    images = torch.randn(1, 3, 16, 16)
    before, theirs = model(images), other(images)
    copied = copy.deepcopy(model)
    assert isinstance(copied, int8_graph())
    copied.load_state_dict(other.state_dict())
    assert torch.equal(copied(images), theirs) and torch.equal(model(images), before)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(images), theirs) and not torch.equal(before, theirs)


@needs_kernels
@pytest.mark.parametrize("change", [
    lambda graph, other: graph.load_state_dict(other),
    lambda graph, other: nn.Sequential(graph).load_state_dict({f"0.{name}": tensor for name, tensor in other.items()}),
    lambda graph, other: graph.load_state_dict(other, assign=True),
    lambda graph, other: (graph.get_parameter("fc.bias").data.add_(9), graph.train().eval()),
    lambda graph, other: (graph.get_parameter("fc.bias").data.add_(9), nn.Sequential(graph).double().float()),
    lambda graph, other: (graph.set_submodule("fc", nn.Linear(96, 5)), graph.recompile()),
], ids=["load_state_dict", "a parent's", "assign", "train", "double", "recompile"])
def test_new_weights_are_packed_anew(change: Callable[[Any, dict[str, Tensor]], Any]) -> None:
    torch.manual_seed(5)
    model, _ = quantize_graph(graph_of(Residual(nn.ReLU())), ["conv", "fc"])
    other = {name: -3 * tensor if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    images = torch.randn(1, 3, 16, 16)
    before = model(images)
    change(model, other)
    with torch.no_grad():
        assert sqnr_db(layer_by_layer(model)(images), model(images)) > 40
        assert sqnr_db(before, model(images)) < 20


@needs_kernels
@pytest.mark.parametrize("change", [
    lambda graph: graph.get_submodule("fc").load_state_dict(nn.Linear(96, 5).state_dict()),
    lambda graph: graph.get_parameter("conv.weight").detach().mul_(-2),
    lambda graph: graph.set_submodule("fc", nn.Linear(96, 5)),
    lambda graph: setattr(graph.get_submodule("fc"), "bias", nn.Parameter(torch.full((5,), 100.0))),
    lambda graph: setattr(graph.get_parameter("fc.bias"), "data", torch.full((5,), -100.0)),
], ids=["a layer's load_state_dict", "in place", "a layer", "a parameter", "data"])
def test_weights_that_are_changed_by_hand_are_used_after_pack(change: Callable[[Any], Any]) -> None:
    torch.manual_seed(5)
    model: Any = quantize_graph(graph_of(Residual(nn.ReLU())), ["conv", "fc"])[0]
    images = torch.randn(1, 3, 16, 16)
    before = model(images)
    change(model)
    pack(model)
    with torch.no_grad():
        assert sqnr_db(layer_by_layer(model)(images), model(images)) > 40
        assert sqnr_db(before, model(images)) < 20


@needs_kernels
@pytest.mark.parametrize("name", ["", "stem", "fc"])
def test_hooks_are_called(name: str) -> None:
    model, _ = quantize_graph(graph_of(Residual(nn.ReLU())))
    images, called = torch.randn(1, 3, 16, 16), []
    without = model(images)
    handles = [model.get_submodule(name).register_forward_pre_hook(lambda *_: called.append("before")),
               model.get_submodule(name).register_forward_hook(lambda *_: called.append("after"))]
    assert sqnr_db(without, model(images)) > 40 and called == ["before", "after"]
    for handle in handles:
        handle.remove()
    assert torch.equal(model(images), without) and len(called) == 2


@needs_kernels
def test_what_broadcasts_at_one_size_of_image_alone() -> None:
    """At 1x1 the pooled branch has the shape of the other, and is added by the convolution's kernel."""
    torch.manual_seed(3)
    model, _ = quantize_graph(graph_of(Residual(nn.ReLU(), squeeze=True)))
    for size in (1, 16, 1, 5):
        images = torch.randn(1, 3, size, size)
        with torch.no_grad():
            assert sqnr_db(layer_by_layer(model)(images), model(images)) > 40


def test_an_image_without_a_batch() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(128, 128, 3), nn.ReLU(), nn.Conv2d(128, 128, 3)).eval()  # int8 is faster
    images = torch.randn(1, 128, 28, 28)
    quantized = quantize_dynamic(model, images)
    with torch.no_grad():
        assert sqnr_db(quantized(images)[0], quantized(images[0])) > 40
        assert sqnr_db(model(images[0]), quantized(images[0])) > 30


@needs_kernels
def test_training_mode_and_other_types_take_the_layers_own_way() -> None:
    model, _ = quantize_graph(graph_of(Residual(nn.ReLU())))
    images = torch.randn(1, 3, 16, 16)
    assert not model(images).requires_grad
    assert model.train()(images).requires_grad
    model.eval().double()
    assert model(images.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf",
                                  "squeezenet1_1"])
def test_torchvision_models(name: str) -> None:
    """SiLU, hard activations, squeeze-and-excitation, concatenation: fused, and measured layer by layer."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, num_classes=10)
    with torch.no_grad():
        for _ in range(5):  # so that batch norms keep activations in a range
            model(torch.randn(8, 3, 64, 64))
    model.eval()
    images = torch.randn(1, 3, 64, 64)
    quantized, coverage = quantize(model, images)
    weighted = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert [row.layer for row in coverage] == weighted and all(row.dtype == "int8" for row in coverage)
    assert sum(row.macs_share for row in coverage) == pytest.approx(1)
    assert min(row.sqnr_db or 0.0 for row in coverage) > 12
    assert all(row.before_ms and row.after_ms for row in coverage) or no_int8_kernels()
    with torch.no_grad():
        assert sqnr_db(model(images), quantized(images)) > 18
    size = sum(tensor.numel() * tensor.element_size() for tensor in quantized.state_dict().values())
    assert size < 0.3 * sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def test_models_outside_the_layer_table_are_quantized_where_their_layers_stand() -> None:
    torch.manual_seed(0)
    model = torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=10).eval()
    images = torch.randn(2, 3, 64, 64)
    quantized, coverage = quantize(model, images, exclude=["fc"])
    assert len(coverage) == 57 and [row.layer for row in coverage if row.dtype == "float32"] == ["fc"]
    with torch.no_grad():
        assert sqnr_db(model(images), quantized(images)) > 20
    assert all(not parameter.requires_grad or parameter.dtype == torch.float32 for parameter in quantized.parameters())
    again, _ = quantize(model, images, exclude=["fc"])
    for name, layer in quantized.named_modules():
        if isinstance(getattr(layer, "activations", None), str):  # the choice is no weight, and another day's may differ
            again.get_submodule(name).activations = layer.activations  # type: ignore[assignment]
    again.load_state_dict(quantized.state_dict())
    with torch.no_grad():
        assert torch.equal(quantized(images), again(images))


class Own(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Named(nn.Conv2d):
    """A convolution that differs by its name alone."""


class Odd(nn.Module):
    """Layers that are hard to exchange: subclasses, one that two names share, attention, rows of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.named = Own(3, 8, 1), Named(8, 8, 3, padding=1)
        self.one = self.other = nn.Conv2d(8, 8, 3, padding=1)
        self.attention, self.rows = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.named(self.own(x))
        x = (self.one(x) + self.other(x)).flatten(2).transpose(1, 2)
        if x.mean() > 1e9:  # keeps it out of the layer table
            return x
        return self.fc(torch.relu(self.rows(self.attention(x, x, x)[0])).mean(1))


def test_what_cannot_be_int8_where_it_stands_is_said() -> None:
    torch.manual_seed(6)
    model, images = Odd().eval(), torch.randn(2, 3, 12, 12)
    with pytest.warns(UserWarning, match=r"float stays own \(a Own with a forward of its own\); attention \(.*out_proj"):
        quantized, coverage = quantize(model, images)
    types = {row.layer: row.dtype for row in coverage}
    assert types == {"own": "float32", "named": "int8", "one": "int8", "attention": "float32",
                     "attention.out_proj": "float32", "rows": "int8", "fc": "int8"}
    assert quantized.get_submodule("one") is quantized.get_submodule("other")
    with torch.no_grad():
        assert sqnr_db(model(images), quantized(images)) > 20
        if not no_int8_kernels():
            assert quantized.get_submodule("rows")._program is not None  # rows of rows run on the kernels
    quantize_dynamic(model, images, ["own", "attention", "attention.out_proj"])  # no warning: it was asked for


class Encoder(nn.Module):
    """Patches, and an encoder layer whose fast path reads the weights of its layers instead of calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def test_layers_whose_weights_another_module_reads_stay_float() -> None:
    torch.manual_seed(8)
    model, images = Encoder().eval(), torch.randn(2, 3, 16, 16)
    with pytest.warns(UserWarning, match=r"layer.linear1 \(not called by itself"):
        quantized, coverage = quantize(model, images)
    assert {row.layer for row in coverage if row.dtype == "int8"} == {"patches", "fc"}
    with torch.no_grad():
        assert sqnr_db(model(images), quantized(images)) > 25


def test_a_forward_that_was_put_on_a_layer_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Upsample(scale_factor=2), nn.Conv2d(16, 4, 1)).eval()
    put = model[2].forward = lambda x: x[:, :4] * 2
    images = torch.randn(1, 3, 12, 12)
    with pytest.warns(UserWarning, match="float stays 2 .a Conv2d with a forward of its own"):
        quantized = quantize_dynamic(model, images)
    assert model[2].forward is put and vars(model[0]).get("forward") is None
    with torch.no_grad():
        assert sqnr_db(model(images), quantized(images)) > 25


def test_the_coverage_of_a_layer_whose_weight_is_computed() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 32, 3, bias=False))
    model = nn.Sequential(layer, nn.Upsample(scale_factor=2), nn.Conv2d(32, 4, 1)).eval()
    assert [row.weights for row in quantize(model, torch.randn(1, 3, 12, 12))[1]] == [864, 128]


def test_inputs_that_the_model_does_not_take_are_one_line() -> None:
    with pytest.raises(UserError, match=r"does not take inputs of shape \[1, 1, 8, 8\]"):
        quantize_dynamic(make("slim_resnet18", num_classes=3), torch.randn(1, 1, 8, 8))
    broken = make("slim_resnet18", num_classes=3)
    with torch.no_grad():
        broken.get_parameter("fc.bias")[1] = float("nan")
    for model, images, said in ((broken, torch.randn(1, 3, 8, 8), "fc.bias holds NaN"),
                                (nn.Conv2d(3, 8, 1), torch.full((1, 3, 8, 8), torch.inf), "the example holds NaN"),
                                (nn.Conv2d(3, 8, 1), torch.randn(0, 3, 8, 8), "one image or more in float32, not .0, 3"),
                                (nn.Conv2d(3, 8, 1), torch.randn(1, 3, 8, 8).half(), "in torch.float16")):
        with pytest.raises(UserError, match=said):
            quantize_dynamic(model, images)


@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_a_layers_arithmetic_is_in_its_architecture_and_source(activations: str) -> None:
    model, _ = quantize_graph(graph_of(Residual(nn.ReLU())))
    for layer in (model.get_submodule("conv"), model.get_submodule("fc")):
        layer.activations = activations  # type: ignore[assignment]
    described = describe(model, (3, 16, 16))
    rows = {layer.name: layer for layer in described.layers}
    assert [rows[name].options()["activations"] for name in ("stem", "conv", "fc")] == ["int8", activations, activations]
    loaded = load_verified(described, model.state_dict(), "here")
    namespace: dict[str, Any] = {}
    exec(compile(source(described, "weights.pth"), "model.py", "exec"), namespace)
    written = namespace["GraphModule" if "GraphModule" in namespace else described.model_type]().eval()
    written.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(written(images), layer_by_layer(loaded)(images), rtol=1e-5, atol=1e-6)
        assert sqnr_db(written(images), loaded(images)) > 40


CAPPED = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from architectures.architecture import Architecture
from architectures.kernels import int8_arithmetic, layer_by_layer, no_int8_kernels
from architectures.weights import load_verified
architecture = Architecture.model_validate(json.load(open(sys.argv[2] + "/architecture.json")))
quantized = load_verified(architecture, torch.load(sys.argv[2] + "/weights.pth", weights_only=True), "here").eval()
torch.manual_seed(0)
images = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    same = torch.equal(quantized(images), layer_by_layer(quantized)(images))
print(no_int8_kernels(), "|", int8_arithmetic(quantized), "|", same)
torch.save(quantized(images), sys.argv[3])
"""


@needs_kernels
def test_kernels_that_saturate_are_not_used_and_the_results_stay(tmp_path: Path) -> None:
    """The same oneDNN, capped to a CPU without VNNI, whose 16-bit sums saturate."""
    torch.manual_seed(0)
    graph = graph_of(make("slim_resnet18", num_classes=4, width=8, stem="small"), 32)
    quantized, _ = quantize_graph(graph, example_input=torch.randn(2, 3, 32, 32), choose=False)
    torch.save(quantized.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "architecture.json").write_text(json.dumps(describe(quantized, (3, 32, 32)).to_json()))
    said = []
    for name, capped in (("free", {}), ("capped", {"ONEDNN_MAX_CPU_ISA": "AVX2"})):
        done = subprocess.run([sys.executable, "-c", CAPPED, str(PROJECT), str(tmp_path), str(tmp_path / name)], check=True,
                              text=True, capture_output=True, env=os.environ | capped)
        said.append(done.stdout)
    assert said[0].startswith(" | on oneDNN's int8 kernels")
    assert "saturate" in said[1] and "in float32, with the same results to rounding" in said[1]
    assert said[1].endswith("True\n")
    free, capped_result = (torch.load(tmp_path / name, weights_only=True) for name in ("free", "capped"))
    assert sqnr_db(free, capped_result) > 45  # a value on the edge of two levels may fall to either side


def test_a_model_without_int8_layers_says_nothing_of_its_arithmetic() -> None:
    assert int8_arithmetic(nn.Linear(2, 2)) is None
