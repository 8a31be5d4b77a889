"""Pruning and dynamic int8: what is left is what was asked for, and nothing is skipped in silence."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import fx, nn

from architectures.architecture import Architecture
from architectures.build import build
from architectures.counting import count_macs, count_parameters
from architectures.describe import carry_over, describe
from architectures.folding import fold_batch_norm
from architectures.int8 import int8_layers
from architectures.weights import load_verified
from architectures.zoo import make
from compress.pruning.groups import widths
from compress.pruning.importance import CRITERIA, NEEDS_GRADIENTS, accumulate_gradients
from compress.pruning.prune import prune
from compress.quantization.dynamic import quantize_graph, quantize_weight
from metadata.errors import UserError


def graph(name: str = "slim_resnet18", size: int = 32, **options: object) -> tuple[fx.GraphModule, Architecture]:
    """A built model whose BatchNorms have seen data, so that folding and pruning have something to get wrong."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = make(name, num_classes=5, **options)  # type: ignore[arg-type]
    architecture = describe(module, (3, size, size))
    model = build(architecture)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.3, 0.3)
    for _ in range(3):
        model(torch.randn(8, 3, size, size))
    return model.eval(), architecture


@pytest.fixture(scope="module")
def slim() -> tuple[fx.GraphModule, Architecture]:
    return graph(width=32, stem="small")


def pruned(model: fx.GraphModule, **changes: object) -> fx.GraphModule:
    settings: dict[str, object] = dict(ratio=0.3, multiple=8, criterion="l2", scope="uniform")
    gradients = accumulate_gradients(lambda m: [m(torch.ones(2, 3, 32, 32)).square().sum()])
    settings |= changes
    return prune(model, torch.zeros(1, 3, 32, 32), **settings,  # type: ignore[arg-type]
                 gradients=gradients if settings["criterion"] in NEEDS_GRADIENTS else None)


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_pruning_removes_channels_everywhere(criterion: str, scope: str,
                                             slim: tuple[fx.GraphModule, Architecture]) -> None:
    model, architecture = slim
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = pruned(model, criterion=criterion, scope=scope)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())  # input left alone
    assert count_parameters(small) < 0.8 * count_parameters(model)
    assert count_macs(small, (3, 32, 32)) < 0.8 * count_macs(model, (3, 32, 32))
    after = widths(small)
    assert after["fc"] == 5 and all(width % 8 == 0 for name, width in after.items() if name != "fc")
    described = carry_over(describe(small, (3, 32, 32)), architecture, pruning_rate=0.3)
    for layer in described.layers:
        if layer.width:
            assert layer.pruning_info and layer.pruning_info.remaining_channels == layer.width == after[layer.name]
            original = next(old for old in architecture.layers if old.name == layer.name).width
            assert original == layer.width + layer.pruning_info.num_channels_pruned
    rebuilt = load_verified(described, small.state_dict(), "here")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(rebuilt(images), small(images))


def test_widths_round_to_the_nearest_multiple_not_down(slim: tuple[fx.GraphModule, Architecture]) -> None:
    after = widths(pruned(slim[0]))
    assert (after["conv1"], after["layer2.0.conv1"], after["layer3.0.conv1"], after["layer4.0.conv1"]) \
        == (24, 48, 88, 176)  # 22.4, 44.8, 89.6 and 179.2


def test_least_important_channels_go(slim: tuple[fx.GraphModule, Architecture]) -> None:
    import copy
    model = copy.deepcopy(slim[0])
    weight = model.get_submodule("layer1.0.conv1").weight
    consumer = model.get_submodule("layer1.0.conv2").weight
    norm = model.get_submodule("layer1.0.bn1")
    with torch.no_grad():
        for tensor in (weight, norm.weight, norm.bias):
            tensor[:8] = 0  # dead channels: removing them must not change the output
        consumer[:, :8] = 0
    pruner = prune(model, torch.zeros(1, 3, 32, 32), ratio=0.2, multiple=8, criterion="l1", scope="uniform")
    kept = pruner.get_submodule("layer1.0.conv1").weight
    assert kept.shape[0] == 24 and bool((kept.flatten(1).abs().sum(1) > 0).all())


def test_steps_reach_the_ratio_of_the_original_width(slim: tuple[fx.GraphModule, Architecture]) -> None:
    original = widths(slim[0])
    once = pruned(slim[0], ratio=0.5)
    half_way = pruned(slim[0], ratio=0.25, original=original)
    assert widths(pruned(half_way, ratio=0.5, original=original)) == widths(once)


@pytest.mark.parametrize(("changes", "said"), [
    ({"ratio": 0.95}, "leaves none of its"), ({"ratio": 0.01}, "pruning removed nothing"),
    ({"ratio": 0.99, "multiple": 1}, "leaves none"),
])
def test_ratios_that_leave_nothing_or_take_nothing(changes: dict[str, object], said: str,
                                                   slim: tuple[fx.GraphModule, Architecture]) -> None:
    with pytest.raises(UserError) as caught:
        pruned(slim[0], **changes)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "torchvision:regnet_y_400mf"])
def test_depthwise_and_grouped_convolutions_prune_and_quantize(name: str) -> None:
    model, _ = graph(name, size=64)
    small = prune(model, torch.zeros(1, 3, 64, 64), ratio=0.3, multiple=8, criterion="l2", scope="uniform")
    quantized, coverage = quantize_graph(small)
    assert {row.dtype for row in coverage} == {"int8"}
    images = torch.randn(2, 3, 64, 64)
    assert quantized(images).shape == (2, 5) and count_parameters(small) < count_parameters(model)
    hidden = {name: width for name, width in widths(small).items() if width != 5}
    assert all(width % 8 == 0 for width in hidden.values()), hidden


# ----------------------------------------------------------------------------------------------------------- int8


def signal_to_noise_db(signal: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(signal.square().sum() / (signal - other).square().sum()))


def test_folding_batch_norm_changes_nothing(slim: tuple[fx.GraphModule, Architecture]) -> None:
    model, _ = slim
    folded = fold_batch_norm(model)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    images = torch.randn(4, 3, 32, 32)
    assert torch.allclose(folded(images), model(images), atol=1e-4)


@pytest.mark.parametrize(("layers", "folds"), [
    ([nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6)], True),
    ([nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6)], True),
    ([nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6, affine=False)], False),
    ([nn.Flatten(2), nn.Linear(64, 3), nn.BatchNorm1d(3), nn.Flatten()], False)])  # of the planes
def test_norms_of_linear_layers_fold_where_they_are_of_its_features(layers: list[nn.Module], folds: bool) -> None:
    torch.manual_seed(5)
    network = nn.Sequential(*layers)
    for _ in range(3):
        network(torch.randn(16, 3, 8, 8) * 3 + 1)
    model = build(describe(network.eval(), (3, 8, 8)))
    model.load_state_dict(network.state_dict())
    folded = fold_batch_norm(model)
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(model.eval()(images), folded(images), atol=1e-4)
    assert any(isinstance(module, nn.BatchNorm1d) for module in folded.modules()) is not folds


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


def test_weight_scales_are_per_channel_and_symmetric() -> None:
    weight = torch.tensor([[1.27, -0.5], [0.0, 0.0], [-254.0, 127.0]])
    levels, scale = quantize_weight(weight, "layer")
    assert levels.tolist() == [[127, -50], [0, 0], [-127, 64]]
    assert scale[0] == pytest.approx(0.01) and scale[2] == pytest.approx(2.0)
    with pytest.raises(UserError, match="layer fc: its weights hold NaN"):
        quantize_weight(torch.tensor([[float("nan")]]), "fc")


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
