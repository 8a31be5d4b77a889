"""Dynamic int8: any model can be quantized, and what stays float is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from architectures.describe import describe
from architectures.kernels import layer_by_layer, no_int8_kernels
from architectures.program import Program
from architectures.source import source
from architectures.weights import load_verified
from architectures.zoo import make
from compress.quantization.dynamic import quantize, quantize_dynamic, quantize_graph
from compress.quantization.int8_table import sqnr_db
from metadata.errors import UserError
from tests.helpers.graphs import graph_of, Residual
from tests.helpers.marks import slow_but


def test_an_image_without_a_batch() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(128, 128, 3), nn.ReLU(), nn.Conv2d(128, 128, 3)).eval()  # int8 is faster
    images = torch.randn(1, 128, 28, 28)
    quantized = quantize_dynamic(model, images)
    with torch.no_grad():
        assert sqnr_db(quantized(images)[0], quantized(images[0])) > 40
        assert sqnr_db(model(images[0]), quantized(images[0])) > 30


@pytest.mark.parametrize("name", slow_but(
    ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "squeezenet1_1"],
    quick=["squeezenet1_1"]))
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


@pytest.mark.slow
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
            assert isinstance(quantized.get_submodule("rows")._program, Program)  # rows of rows run on the kernels
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


def test_scales_and_biases_are_rounded_to_float16_where_that_is_less_than_a_step() -> None:
    layer = nn.Linear(64, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 192).view(3, 64))
        layer.weight[1] = 0
        layer.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    module = quantize_dynamic(nn.Sequential(layer), torch.randn(4, 64)).get_submodule("0.int8")
    for name in ("weight_scale", "bias"):
        numbers = getattr(module, name)
        assert torch.equal(numbers.half().float(), numbers)
    assert module.weight_scale[1] == 1 and not module.weight[1].any()  # type: ignore[index, operator, union-attr]
    assert not torch.equal(module.bias, layer.bias)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([-2049, -2050.6, 0.3]))  # float16 would change them by one
        layer.weight[0] = 1e-9  # and this scale to nothing
        layer.weight[2] *= 1e-6
    module = quantize_dynamic(nn.Sequential(layer), torch.randn(4, 64)).get_submodule("0.int8")
    assert torch.equal(module.bias, layer.bias)  # type: ignore[arg-type]
    assert module.weight_scale[0] > 0  # type: ignore[index, operator]
