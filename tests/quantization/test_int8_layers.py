"""Dynamic int8 layer by layer: exact integers, per-channel scales, and the coverage table."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from architectures.architecture import Architecture
from architectures.build import build
from architectures.describe import carry_over, describe
from architectures.int8 import int8_layers
from architectures.weights import load_verified
from compress.quantization.dynamic import quantize_graph
from metadata.errors import UserError
from tests.helpers.graphs import graph


@pytest.fixture(scope="module")
def slim() -> tuple[fx.GraphModule, Architecture]:
    return graph(width=32, stem="small")


def signal_to_noise_db(signal: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(signal.square().sum() / (signal - other).square().sum()))


def test_every_layer_is_int8_and_close_to_float(slim: tuple[fx.GraphModule, Architecture]) -> None:
    model, _ = slim
    quantized, coverage = quantize_graph(model)
    assert coverage[0].layer == "conv1" and len(coverage) == 21
    assert {row.dtype for row in coverage} == {"int8"}
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        assert signal_to_noise_db(model(images), quantized(images)) > 30
    layers = [module for module in quantized.modules() if isinstance(module, int8_layers().Int8Conv2d)]
    assert all(layer.weight.dtype == torch.int8 for layer in layers)
    assert all(parameter.dtype == torch.float32 for parameter in quantized.parameters())
    assert next(quantized.parameters()).dtype == torch.float32
    float_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    int8_bytes = sum(tensor.numel() * tensor.element_size() for tensor in quantized.state_dict().values())
    assert int8_bytes < 0.27 * float_bytes


def test_predictions_do_not_depend_on_the_neighbours(slim: tuple[fx.GraphModule, Architecture]) -> None:
    quantized, _ = quantize_graph(slim[0])
    images = torch.randn(8, 3, 32, 32) * torch.arange(1, 9).view(-1, 1, 1, 1)
    with torch.no_grad():
        together = quantized(images)
        alone = torch.cat([quantized(image[None]) for image in images])
    assert torch.allclose(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("values", ["positive", "negative", "both", "zero", "constant"])
def test_activation_levels_are_exact_integers_and_zero_is_exact(values: str) -> None:
    base = torch.rand(3, 4, 5, 5)
    x = {"positive": base, "negative": -base, "both": base - 0.4, "zero": base * 0, "constant": base * 0 + 2.5}[values]
    x[:, 0, 0, 0] = 0
    levels, scale = int8_layers().quantize_activations(x)
    assert torch.equal(levels, levels.round()) and levels.abs().max() <= 255
    assert bool((levels.amax((1, 2, 3)) - levels.amin((1, 2, 3)) <= 255).all())
    assert torch.equal(levels[:, 0, 0, 0], torch.zeros(3))
    assert torch.allclose(levels * scale, x, atol=float(scale.max()) * 0.51)


def test_int8_convolution_equals_integer_arithmetic() -> None:
    torch.manual_seed(1)
    layer = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
    model = build(describe(nn.Sequential(layer, nn.Flatten(), nn.Linear(128, 3)), (6, 8, 8)))
    quantized, _ = quantize_graph(model, exclude=["2"])
    module = next(m for m in quantized.modules() if isinstance(m, int8_layers().Int8Conv2d))
    x = torch.randn(2, 6, 8, 8)
    levels, scale = int8_layers().quantize_activations(x)
    exact = nn.functional.conv2d(levels.long().double(), module.weight.double(), None, 2, 1, 1, 2).long()
    expected = exact * (scale * module.weight_scale.view(-1, 1, 1)).double() + module.bias.view(-1, 1, 1)
    assert torch.allclose(module(x).double(), expected, rtol=1e-6, atol=1e-6)


def test_excluded_layers_stay_float_and_say_why(slim: tuple[fx.GraphModule, Architecture]) -> None:
    quantized, coverage = quantize_graph(slim[0], exclude=["conv1", "fc"])
    floats = {row.layer: row.reason for row in coverage if row.dtype == "float32"}
    assert floats == {"conv1": "excluded by the recipe", "fc": "excluded by the recipe"}
    assert isinstance(quantized.get_submodule("conv1"), nn.Conv2d)
    with pytest.raises(UserError, match="'conv2' is no Conv2d or Linear layer"):
        quantize_graph(slim[0], exclude=["conv2"])


def test_nothing_to_quantize_is_an_error() -> None:
    model = build(describe(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), (3, 8, 8)))
    with pytest.raises(UserError, match="nothing became int8"):
        quantize_graph(model)


def test_int8_architecture_round_trip(slim: tuple[fx.GraphModule, Architecture]) -> None:
    model, architecture = slim
    quantized, _ = quantize_graph(model)
    described = carry_over(describe(quantized, (3, 32, 32)), architecture)
    assert {layer.type for layer in described.layers} >= {"Int8Conv2d", "Int8Linear"}
    assert not any(layer.type == "BatchNorm2d" for layer in described.layers)
    loaded = load_verified(described, quantized.state_dict(), "here")
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(loaded(images), quantized(images))
