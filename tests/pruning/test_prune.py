"""Pruning: the widths are those that were asked for, coupled layers fit each other, and nothing is skipped silently."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from architectures.architecture import Architecture
from architectures.counting import architecture_macs, count_parameters
from architectures.describe import carry_over, describe
from architectures.weights import load_verified
from compress.pruning.groups import widths
from compress.pruning.importance import CRITERIA, NEEDS_GRADIENTS, accumulate_gradients
from compress.pruning.prune import prune
from compress.quantization.dynamic import quantize_graph
from metadata.errors import UserError
from tests.helpers.graphs import graph, graph_of
from tests.pruning.networks import lowered


@pytest.fixture(scope="module")
def slim() -> tuple[fx.GraphModule, Architecture]:
    return graph(width=32, stem="small")


@pytest.fixture(scope="module")
def narrow() -> tuple[fx.GraphModule, Architecture]:
    return graph(width=16, stem="small")


def pruned(model: fx.GraphModule, **changes: object) -> fx.GraphModule:
    settings: dict[str, object] = dict(ratio=0.3, multiple=8, criterion="l2", scope="uniform")
    gradients = accumulate_gradients(lambda m: [m(torch.ones(2, 3, 32, 32)).square().sum()])
    settings |= changes
    return prune(model, torch.zeros(1, 3, 32, 32), **settings,  # type: ignore[arg-type]
                 gradients=gradients if settings["criterion"] in NEEDS_GRADIENTS else None)


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_pruning_removes_channels_everywhere(criterion: str, scope: str,
                                             narrow: tuple[fx.GraphModule, Architecture]) -> None:
    model, architecture = narrow
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = pruned(model, criterion=criterion, scope=scope, multiple=4)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())  # input left alone
    assert count_parameters(small) < 0.8 * count_parameters(model)
    after = widths(small)
    assert after["fc"] == 5 and all(width % 4 == 0 for name, width in after.items() if name != "fc")
    described = carry_over(describe(small, (3, 32, 32)), architecture, pruning_rate=0.3)
    assert architecture_macs(described) < 0.8 * architecture_macs(architecture)
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


def test_a_network_without_hidden_channels_is_refused() -> None:
    model = graph_of(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)))
    with pytest.raises(UserError, match="tied to the network's input or output"):
        prune(model, torch.zeros(1, 3, 16, 16), ratio=0.5, multiple=8, criterion="l2", scope="uniform")


def test_a_depthwise_convolution_with_two_outputs_a_channel_is_scored() -> None:
    model = graph_of(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, groups=16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                                   nn.Flatten(), nn.Linear(32, 5)))
    small = prune(model, torch.zeros(1, 3, 16, 16), ratio=0.5, multiple=8, criterion="l2", scope="uniform")
    assert widths(small) == {"0": 8, "1": 16, "5": 5} and small.get_submodule("1").groups == 8


@pytest.mark.parametrize("criterion", sorted(CRITERIA.keys() - {"bn_scale"} - NEEDS_GRADIENTS))
def test_grouped_convolutions_are_scored_by_every_criterion(criterion: str) -> None:
    model = graph_of(nn.Sequential(nn.Conv2d(3, 32, 3), nn.PReLU(32), nn.Conv2d(32, 32, 3, groups=2), nn.ReLU(),
                                   nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)))
    small = prune(model, torch.zeros(1, 3, 16, 16), ratio=0.5, multiple=8, criterion=criterion, scope="uniform")
    assert widths(small) == {"0": 16, "2": 16, "6": 5} and small.get_submodule("2").groups == 2


def mobile() -> fx.GraphModule:
    return graph("torchvision:mobilenet_v2", width_mult=0.25)[0]


def grouped() -> fx.GraphModule:
    return lowered("regnet").build()


@pytest.mark.parametrize("make_model", [mobile, grouped])
def test_depthwise_and_grouped_convolutions_prune_and_quantize(make_model: Callable[[], fx.GraphModule]) -> None:
    model = make_model()
    groups = {module.groups for module in model.modules() if isinstance(module, nn.Conv2d)}
    assert len(groups) > 1
    small = prune(model, torch.zeros(1, 3, 32, 32), ratio=0.3, multiple=8, criterion="l2", scope="uniform")
    quantized, coverage = quantize_graph(small)
    assert {row.dtype for row in coverage} == {"int8"}
    images = torch.randn(2, 3, 32, 32)
    assert quantized(images).shape == (2, 5) and count_parameters(small) < count_parameters(model)
    hidden = {name: width for name, width in widths(small).items() if width != 5}
    assert all(width % 8 == 0 for width in hidden.values()), hidden
