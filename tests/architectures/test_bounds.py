"""What an architecture may ask for is bounded: absurd numbers of every layer type, and layers that take for ever."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from architectures.architecture import Architecture
from architectures.build import build
from architectures.counting import MAX_LAYER_WORK, MAX_WORK, check_costs, layer_costs
from architectures.describe import describe
from architectures.layers.table import LAYER_TABLE
from architectures.weights import check_positions
from architectures.zoo import make
from compress.evaluation.runtimes import load_model
from metadata.errors import UserError, VerificationError, describe_validation_error
from tests.architectures.test_layer_table import OPTIONS
from tests.helpers.architectures import layer, tiny

ARCH = "trained_pruned_architecture.json"
ABSURD: list[Any] = [0, 1, -1, 2, 7, -8, 1000, 2**16, 2**20, 2**31, 2**63, -2**63, 10**30, -10**30, 10**400, 1e300, 1e308,
                     float("inf"), float("nan"), True, None, "1", [], [1] * 9, {}]


def with_layer(kind: str, **options: Any) -> dict[str, Any]:
    """Return a network of a convolution, a layer of the type, and a linear layer that takes what is left, in JSON."""
    count = LAYER_TABLE[kind].input_count[0]
    middle = layer("middle", kind, ["conv"] * count, **options)
    return tiny(layers=[layer("conv", "Conv2d", ["input"], in_channels=3, out_channels=4, kernel_size=[3, 3]), middle,
                        layer("mean", "Mean", ["middle"], dim=[2, 3]),
                        layer("fc", "Linear", ["mean"], in_features=4, out_features=4)])


def variants(kind: str) -> list[dict[str, Any]]:
    """Return the type's options, each of them once in the place of every absurd value, alone or in a list of two."""
    found, usual = [], OPTIONS.get(kind, {})
    for name in LAYER_TABLE[kind].option_names():
        for value in ABSURD:
            found += [{**usual, name: value}, {**usual, name: [value]}, {**usual, name: [value, 1]}]
    return found or [{}]


@pytest.mark.parametrize("kind", LAYER_TABLE)
def test_absurd_numbers_of_every_layer_are_refused_or_built(kind: str) -> None:
    """As `load_model` does it before it opens the weights, without the files."""
    for options in variants(kind):
        start, said = time.process_time(), ""
        try:
            architecture = Architecture.model_validate(with_layer(kind, **options))
            costs = layer_costs(architecture)
            work = {name: cost.work for name, cost in costs.items()}
            check_costs("here", sum(cost.macs for cost in costs.values()), work)
            with torch.device("meta"):
                build(architecture)
        except ValidationError as error:
            said = describe_validation_error(error)
        except VerificationError as error:
            said = str(error)
        assert time.process_time() - start < 2 and "\n" not in said, options


@pytest.mark.parametrize("kind", LAYER_TABLE)
def test_an_absurd_number_of_every_option_in_a_file_is_a_verification_error(kind: str, tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "w.pth")
    for position, name in enumerate(LAYER_TABLE[kind].option_names()):
        options = {**OPTIONS.get(kind, {}), name: ABSURD[position % len(ABSURD)]}
        (tmp_path / ARCH).write_text(json.dumps(with_layer(kind, **options)))
        with pytest.raises(VerificationError) as error:  # at the latest because most of the weights are missing
            load_model(tmp_path / "w.pth")
        assert "\n" not in str(error.value), options


def test_checking_the_weights_of_many_layers_takes_no_more_than_building_them(tmp_path: Path) -> None:
    """Each layer looks at its own tensors alone: thousands of layers over thousands of tensors would take minutes."""
    count = 3000
    layers = [layer(f"g{at}", "Gather", [f"g{at - 1}" if at else "input"], dim=1, count=3) for at in range(count)]
    architecture = Architecture.model_validate(tiny(layers=[
        *layers, layer("mean", "Mean", [f"g{count - 1}"], dim=[2, 3]),
        layer("fc", "Linear", ["mean"], in_features=3, out_features=4)]))
    weights = {f"g{at}.index": torch.arange(3) for at in range(count)}
    start = time.process_time()
    check_positions(architecture, weights, "w.pth")
    assert time.process_time() - start < 1


@pytest.mark.parametrize(("kind", "options", "channels"), [
    ("AvgPool2d", {"kernel_size": [4000, 4000], "stride": [1, 1]}, 1),
    ("MaxPool2d", {"kernel_size": [2000, 2000], "stride": [1, 1], "padding": [1000, 1000]}, 2),
    ("AdaptiveMaxPool2d", {"output_size": [10_000, 10_000]}, 2),
])
def test_a_pool_that_never_ends_is_refused(kind: str, options: dict[str, Any], channels: int, tmp_path: Path) -> None:
    """Poolings are no multiply-adds: one call of the first would take days."""
    content = tiny(layers=[
        layer("conv", "Conv2d", ["input"], in_channels=3, out_channels=channels, kernel_size=[1, 1], padding=[4000, 4000]),
        layer("pool", kind, ["conv"], **options), layer("mean", "Mean", ["pool"], dim=[2, 3]),
        layer("fc", "Linear", ["mean"], in_features=channels, out_features=4)])
    (tmp_path / ARCH).write_text(json.dumps(content))
    (tmp_path / "w.pth").write_bytes(b"never read")
    with pytest.raises(VerificationError, match=r"layer 'pool' takes .* steps an image beside multiply-adds"):
        load_model(tmp_path / "w.pth")


def test_many_layers_that_are_cheap_alone_are_counted_together(tmp_path: Path) -> None:
    pools = [layer(f"pool{index}", "AvgPool2d", [f"pool{index - 1}" if index else "conv"], kernel_size=[101, 101],
                   stride=[1, 1], padding=[50, 50]) for index in range(40)]
    content = tiny(layers=[
        layer("conv", "Conv2d", ["input"], in_channels=3, out_channels=1, kernel_size=[1, 1], padding=[100, 100]), *pools,
        layer("mean", "Mean", ["pool39"], dim=[2, 3]), layer("fc", "Linear", ["mean"], in_features=1, out_features=4)])
    costs = layer_costs(Architecture.model_validate(content))
    assert max(cost.work for cost in costs.values()) < MAX_LAYER_WORK
    (tmp_path / ARCH).write_text(json.dumps(content))
    (tmp_path / "w.pth").write_bytes(b"never read")
    with pytest.raises(VerificationError, match="all together"):
        load_model(tmp_path / "w.pth")


def test_work_counts_windows_and_numbers() -> None:
    def work(kind: str, shape: tuple[int, ...], output: tuple[int, ...], **options: Any) -> int:
        return LAYER_TABLE[kind].model_validate(layer("x", kind, ["input"], **options)).work([shape], output)
    assert work("ReLU", (4, 8, 8), (4, 8, 8)) == 2 * 256
    assert work("MaxPool2d", (4, 8, 8), (4, 4, 4), kernel_size=3, stride=2, padding=1) == 256 + 64 + 64 * 9
    assert work("AvgPool2d", (4, 8, 8), (4, 1, 1), kernel_size=100, stride=1, padding=50) == 256 + 4 + 4 * 64
    assert work("AdaptiveAvgPool2d", (4, 8, 8), (4, 1, 1), output_size=1) >= 256


def test_honest_networks_are_far_below_the_limits() -> None:
    costs = layer_costs(describe(make("torchvision:resnet18", num_classes=1000).eval(), (3, 224, 224))).values()
    assert sum(cost.work for cost in costs) < MAX_WORK / 500 and max(cost.work for cost in costs) < MAX_LAYER_WORK / 100


def test_ten_thousand_layers_are_checked_in_seconds(tmp_path: Path) -> None:
    """Also with names that torch's graph would number one by one."""
    chain = [layer(f"a{'._-'[index % 3] if index else ''}{index}".replace("a.", "b."), "ReLU",
                   [f"a{'._-'[(index - 1) % 3] if index > 1 else ''}{index - 1}".replace("a.", "b.") if index else "input"])
             for index in range(9_997)]
    content = tiny(layers=[*chain, layer("mean", "Mean", [chain[-1]["name"]], dim=[2, 3]),
                           layer("fc", "Linear", ["mean"], in_features=3, out_features=4)])
    (tmp_path / ARCH).write_text(json.dumps(content))
    torch.save({}, tmp_path / "w.pth")
    start = time.process_time()
    with pytest.raises(UserError):
        load_model(tmp_path / "w.pth")
    assert time.process_time() - start < 20


@pytest.mark.parametrize("index", [[0, 1, 4], [-1, 0, 0], [2**62, 0, 0]])
def test_positions_outside_the_tensor_are_refused_at_loading(index: list[int], tmp_path: Path) -> None:
    content = tiny(layers=[
        layer("conv", "Conv2d", ["input"], in_channels=3, out_channels=4, kernel_size=[1, 1]),
        layer("some", "Gather", ["conv"], dim=1, count=3), layer("mean", "Mean", ["some"], dim=[2, 3]),
        layer("fc", "Linear", ["mean"], in_features=3, out_features=4)])
    (tmp_path / ARCH).write_text(json.dumps(content))
    weights = {"conv.weight": torch.zeros(4, 3, 1, 1), "conv.bias": torch.zeros(4), "some.index": torch.tensor([3, 0, 1]),
               "fc.weight": torch.zeros(4, 3), "fc.bias": torch.zeros(4)}
    torch.save(weights, tmp_path / "w.pth")
    load_model(tmp_path / "w.pth")
    torch.save(weights | {"some.index": torch.tensor(index)}, tmp_path / "w.pth")
    with pytest.raises(VerificationError, match=r"layer some: index holds a position outside the 4 of dimension 1"):
        load_model(tmp_path / "w.pth")


@pytest.mark.parametrize(("kind", "options"), [
    ("Clamp", {"min": 1e39}), ("Pad", {"pad": [0, 1], "value": -1e39}), ("BatchNorm2d", {"num_features": 4, "eps": -1.0}),
    ("LayerNorm", {"normalized_shape": [6], "eps": -1e-5}), ("LeakyReLU", {"negative_slope": 1e300})])
def test_numbers_that_float32_does_not_hold_are_refused(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"less than or equal|greater than or equal"):
        Architecture.model_validate(with_layer(kind, **options))
