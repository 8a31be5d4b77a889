"""Sub-networks: shape and weights agree, what is dropped is the identity, and bytes are those of the written file."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from architectures.agreement import largest_difference
from architectures.counting import architecture_macs
from architectures.describe import describe
from compress.packaging.export import export
from compress.quantization.dynamic import quantize_graph
from compress.quantization.static import Calibration, StaticSettings, quantize_static
from compress.search.sizes import UNCERTAIN, weights_file_bytes
from compress.search.space import Choice, Space
from metadata.errors import UserError
from metadata.formats import write_weights
from tests.helpers.graphs import graph_of
from tests.helpers.marks import slow_but
from tests.search.networks import network, space

NAMES = ("slim", "mobile", "compact", "residual")


def test_groups_are_those_of_pruning_and_options_multiples_of_eight() -> None:
    found = {group.name: group.options for group in space("slim").groups}
    assert found["conv1"] == (8, 16) and found["layer2.0.conv1"] == (8, 16, 24, 32)
    assert len(found) == 12 and all(width % 8 == 0 for options in found.values() for width in options)
    assert [block.name for block in space("slim").blocks] == ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]


def test_a_wide_group_is_searched_in_larger_steps() -> None:
    widest = max(space("mobile").groups, key=lambda group: group.channels)
    assert widest.channels == 1280 and widest.options == tuple(range(80, 1281, 80))
    assert all(len(group.options) <= 16 for group in space("mobile").groups)


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_network_is_a_choice(name: str) -> None:
    model, architecture = network(name)
    images = torch.randn(2, *architecture.input_shape)
    assert torch.equal(space(name).network(space(name).full(), {})(images), model(images))
    assert space(name).shape(space(name).full()).layers == architecture.layers


@pytest.mark.parametrize("name", slow_but(NAMES, ["slim", "compact"]))
def test_shape_and_network_agree(name: str) -> None:
    rng = np.random.default_rng(0)
    for choice in (space(name).smallest(drop=True), *(space(name).random(rng, drop=True) for _ in range(2))):
        shape, found = space(name).shape(choice), space(name).network(choice, {})
        assert describe(found, shape.input_shape).layers == shape.layers
        assert space(name).macs(choice) == architecture_macs(shape) < space(name).macs(space(name).full())
        widths = {layer.name: layer.width for layer in shape.layers if layer.width}
        assert all(widths[group] == width for group, width in choice.widths.items()
                   if group not in space(name).lacking(choice.dropped))


def test_the_channels_that_score_lowest_go() -> None:
    model = copy.deepcopy(network("slim")[0])
    dead = torch.arange(0, 16, 2)
    norm = model.get_submodule("layer1.0.bn1")
    with torch.no_grad():
        norm.weight[dead] = norm.bias[dead] = 0
    own = Space.of(network("slim")[1], model.state_dict())
    scores = torch.ones(16).index_fill(0, dead, 0)
    choice = Choice(widths={**own.full().widths, "layer1.0.conv1": 8})
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert largest_difference(model(images), own.network(choice, {"layer1.0.conv1": scores})(images))[0] < 1e-5
        assert largest_difference(model(images), own.network(choice, {"layer1.0.conv1": -scores})(images))[0] > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_block_is_the_identity(name: str) -> None:
    """As if the last norm of its body gave zeros."""
    blocks = space(name).blocks[-2:]
    model = copy.deepcopy(network(name)[0])
    for block in blocks:
        modules = [dict(model.named_modules()).get(name) for name in block.layers]
        last = [module for module in modules if isinstance(module, nn.BatchNorm2d)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    choice = Choice(widths=space(name).full().widths, dropped=frozenset(block.name for block in blocks))
    found = space(name).network(choice, {})
    images = torch.randn(2, *network(name)[1].input_shape)
    with torch.no_grad():
        assert largest_difference(model(images), found(images))[0] < 1e-5
    gone = {layer for block in blocks for layer in block.layers}
    assert gone.isdisjoint(layer.name for layer in space(name).shape(choice).layers)


def test_a_relu_that_has_no_effect_any_more_goes_with_its_block() -> None:
    shape = space("slim").shape(Choice(widths=space("slim").full().widths, dropped=frozenset({"layer1.1"})))
    names = [layer.name for layer in shape.layers]
    assert "layer1.1.relu2" not in names and "layer1.0.relu2" in names
    assert next(layer for layer in shape.layers if layer.name == "layer2.0.conv1").inputs == ["layer1.0.relu2"]


def test_a_group_of_a_dropped_block_counts_for_nothing() -> None:
    own = space("slim")
    choice = Choice(widths={**own.full().widths, "layer1.1.conv1": 8}, dropped=frozenset({"layer1.1"}))
    assert own.lacking(choice.dropped) == {"layer1.1.conv1"}
    assert own.normal(choice).widths == own.full().widths
    assert own.shape(choice) == own.shape(own.normal(choice))


def test_a_choice_survives_json_and_is_a_key() -> None:
    choice = space("slim").random(np.random.default_rng(1), drop=True)
    again = Choice.from_json(json.loads(json.dumps(choice.to_json())))
    assert again == choice and hash(again) == hash(choice) and {again: 1}[choice] == 1


def test_random_choices_span_the_space() -> None:
    rng = np.random.default_rng(0)
    macs = [space("compact").macs(space("compact").random(rng, drop=True)) for _ in range(40)]
    assert min(macs) < 0.3 * space("compact").macs(space("compact").full()) < 0.5 * max(macs)


def test_a_choice_of_another_space_is_refused() -> None:
    own = space("slim")
    with pytest.raises(UserError, match="conv1 keeps 8, 16 channels, not 12"):
        own.shape(Choice(widths={**own.full().widths, "conv1": 12}))
    with pytest.raises(UserError, match="other groups or blocks"):
        own.shape(Choice(widths={"conv1": 8}))


def test_a_network_without_anything_to_remove_is_refused() -> None:
    model = graph_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5)))
    with pytest.raises(UserError, match="there is nothing to choose"):
        Space.of(describe(model, (3, 16, 16)), model.state_dict())


@pytest.mark.parametrize("name", slow_but(NAMES, ["slim", "compact"]))
def test_bytes_are_those_of_a_file_of_other_weights(name: str, tmp_path: Path) -> None:
    choice = space(name).random(np.random.default_rng(2), drop=True)
    found, shape = space(name).network(choice, {}), space(name).shape(choice)
    images = torch.randn(8, *shape.input_shape)
    quantized = quantize_graph(found, (), images)[0]  # some layers may compute in float32 on this machine
    for form, module in (("float32", found), ("int8_dynamic", quantized)):
        write_weights(tmp_path / "weights.pth", module.state_dict())
        assert space(name).size_bytes(choice, form) == (tmp_path / "weights.pth").stat().st_size
    exported, _ = export(found, shape)
    static = quantize_static(Calibration(exported, images.numpy()), StaticSettings()).model
    found_bytes = len(static.SerializeToString())
    assert abs(space(name).size_bytes(choice, "int8_static") - found_bytes) < UNCERTAIN["int8_static"] / 2


def test_bytes_do_not_depend_on_the_state_of_torchs_random_numbers() -> None:
    shape = space("compact").shape(space("compact").smallest(drop=True))
    torch.manual_seed(1)
    first, drawn = weights_file_bytes(shape, "int8_static"), torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn
    assert weights_file_bytes(shape, "int8_static") == first
