"""Units: what is removed together. The network without some units computes what it did with their weights set to zero."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from architectures.architecture import Architecture
from architectures.build import build
from architectures.describe import Lowered, describe
from architectures.layers.channels import Kept
from compress.pruning.groups import channel_groups
from compress.pruning.importance import CRITERIA
from compress.pruning.labels import Units, find_units
from compress.pruning.library import tp
from compress.pruning.shrink import empty_tensors, kept_indices, shrink
from tests.helpers.graphs import graph
from tests.helpers.marks import slow_but
from tests.pruning.networks import NETWORKS, lowered
from tests.pruning.random_graphs import ATTENTION, Sketchbook, finished, random_network


def some_units(network: Lowered, units: Units, seed: int) -> NDArray[np.bool_]:
    """Choose half of the units, but none that a norm sees: its mean would be another without them."""
    removed = np.random.default_rng(seed).random(units.count) < 0.5
    removed[0] = False
    for layer in network.architecture.layers:
        own = units.of[layer.name]
        if layer.type in ("LayerNorm", "GroupNorm") and own.shape[layer.channel_axis or 0] > 1:
            removed[own] = False
    while names := empty_tensors(units, removed):
        removed[units.of[names[0]].flat[0]] = False
    return removed


def zeroed(network: Lowered, units: Units, removed: NDArray[np.bool_]) -> dict[str, torch.Tensor]:
    """Return the weights with zeros where a layer loses them."""
    weights = {key: tensor.clone() for key, tensor in network.weights.items()}
    kept = {name: kept_indices(own, units.shapes[name], removed) for name, own in units.of.items()}
    for layer in network.architecture.layers:
        if layer.type == "Gather":
            continue
        places = {key.removeprefix(f"{layer.name}."): torch.arange(tensor.numel()).view(tensor.shape)
                  for key, tensor in weights.items() if key.rpartition(".")[0] == layer.name}
        for key, stays in layer.pruned(Kept([kept[name] for name in layer.inputs], kept[layer.name]), places)[1].items():
            tensor = weights[f"{layer.name}.{key}"]
            mask = torch.zeros(tensor.numel(), dtype=torch.bool)
            mask[stays.flatten()] = True
            tensor *= mask.view(tensor.shape)
    return weights


def check_removal(network: Lowered, seed: int) -> Architecture:
    """Remove some units at random, and compare with zeros in their place. Return the smaller network."""
    units = find_units(network.architecture, network.weights)
    removed = some_units(network, units, seed)
    assert removed.any()
    smaller, weights = shrink(network.architecture, network.weights, units, removed)
    pruned, whole = build(smaller).eval(), build(network.architecture).eval()
    pruned.load_state_dict(weights)
    whole.load_state_dict(zeroed(network, units, removed))
    images = torch.randn(2, *network.architecture.input_shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected, got = whole(images), pruned(images)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert float(expected.std()) > 0
    return smaller


@pytest.mark.parametrize("name", slow_but(sorted(NETWORKS), NETWORKS.keys() - {"maxvit", "swin_v2"}))
def test_a_network_without_some_units_is_the_network_with_zeros_there(name: str) -> None:
    check_removal(lowered(name), 0)


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs_without_some_units(seed: int) -> None:
    network = random_network(seed)
    smaller = check_removal(network, seed)
    rebuilt = build(smaller)
    assert describe(rebuilt, smaller.input_shape, smaller.model_type) == smaller


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_loses_heads(kind: str) -> None:
    book = Sketchbook(0)
    network = finished(book, book.attention(book.conv("input", 16), kind), 0)
    units = find_units(network.architecture, network.weights)
    own = {layer.name: units.of[layer.name] for layer in network.architecture.layers}
    qkv, = (own[layer.name].reshape(3, 2, 4) for layer in network.architecture.layers if layer.width == 24)
    assert (qkv == qkv[:1, :, :1]).all() and len(set(qkv[0, :, 0])) == 2 and qkv.all()
    width = own[network.architecture.layers[0].name].ravel()
    assert len(set(width)) == 16 and width.all()  # the tokens' channels go one by one


@pytest.mark.parametrize("name", slow_but(["slim_resnet18", "torchvision:mobilenet_v2", "torchvision:regnet_x_400mf",
                                           "torchvision:densenet121"], ["slim_resnet18"]))
def test_channels_that_torch_pruning_couples_are_one_unit_with_the_same_score(name: str) -> None:
    model, architecture = graph(name, size=32)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    units = find_units(architecture, model.state_dict())
    scores = np.full(units.count, np.nan)
    for ours in channel_groups(model, architecture, units, "l2"):
        scores[ours.units] = ours.scores / ours.scores.mean()
    names = {module: name for name, module in model.named_modules()}
    importance = CRITERIA["l2"]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(model, torch.zeros(1, 3, 32, 32), importance, in_channel_groups={},
                                      ignored_layers=[model.get_submodule(architecture.layers[-1].name)],
                                      out_channel_groups={})
        groups = list(pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers,
                                               root_module_types=pruner.root_module_types))
    assert len(groups) > 5
    seen: set[int] = set()
    for group in groups:
        divisions = pruner._get_channel_groups(group)
        theirs = importance(group).detach().view(divisions, -1).mean(0)
        unit_of: dict[int, int] = {}
        for place, (dependency, channels) in enumerate(group):
            module = dependency.target.module
            if not hasattr(module, "weight") or not pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                continue
            own = units.of[names[module]].ravel()
            for channel, root in zip(channels, group[place].root_idxs, strict=True):
                assert unit_of.setdefault(root % len(theirs), own[channel]) == own[channel] != 0
        found = [unit_of[root] for root in range(len(theirs))]
        assert len(set(found)) == len(found) and not seen & set(found)  # one unit each, and in one group only
        seen |= set(found)
        assert np.allclose(scores[found], theirs / theirs.mean(), rtol=1e-4)
    assert seen == set(np.flatnonzero(~np.isnan(scores)))
