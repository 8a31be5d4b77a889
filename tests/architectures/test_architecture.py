"""Architecture JSON: what is refused, what is built from it, and how it is counted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from architectures.build import build, check_shapes
from architectures.counting import count_macs, count_parameters
from architectures.architecture import Architecture
from metadata.errors import VerificationError
from metadata.files import read_json
from tests.helpers.architectures import layer, tiny


def test_architecture_round_trips_and_rebuilds() -> None:
    architecture = Architecture.model_validate(tiny())
    assert Architecture.model_validate(architecture.to_json()) == architecture
    assert build(architecture)(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    assert check_shapes(architecture) == {"conv": (6, 6, 6), "relu": (6, 6, 6), "pool": (6,), "fc": (4,)}


@pytest.mark.parametrize("name", ["pack", "program", "layer_by_layer", "takes"])
def test_layers_may_bear_the_names_that_int8_graphs_use(name: str) -> None:
    content = tiny()
    content["layers"][0] = {"name": name, "type": "Int8Conv2d", "inputs": ["input"], "in_channels": 3, "out_channels": 6,
                            "kernel_size": [3, 3]}
    content["layers"][1]["inputs"] = [name]
    model = build(Architecture.model_validate(content)).eval()
    assert model(torch.ones(2, 3, 8, 8)).shape == (2, 4) and name in dict(model.named_modules())


def test_an_input_beyond_all_limits_is_one_line() -> None:
    content = tiny() | {"input_shape": [2**20] * 3}
    with pytest.raises(VerificationError, match=r"input_shape .* are over the limit"):
        check_shapes(Architecture.model_validate(content))


def changed(index: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["layers"][index].update(changes)
    return change


@pytest.mark.parametrize(("change", "said"), [
    (lambda a: a.update(schema=2), "schema"), (lambda a: a.update(extra=1), "extra"),
    (lambda a: a.pop("num_classes"), "num_classes"), (lambda a: a.update(num_classes="four"), "num_classes"),
    (lambda a: a.update(model_type="X; import os"), "model_type"), (lambda a: a.update(layers=[]), "layers"),
    (lambda a: a.update(output_shape=[5]), "output_shape"), (changed(0, type="Conv3d"), "Conv3d"),
    (changed(0, out_channels=10**9), "out_channels"), (changed(0, out_channels=-1), "out_channels"),
    (changed(0, groups=2), "groups 2 does not divide"), (changed(0, inputs=["fc"]), "is no earlier layer"),
    (changed(0, inputs=["conv"]), "is no earlier layer"), (changed(1, inputs=["nowhere"]), "is no earlier layer"),
    (changed(1, inputs=["conv", "conv"]), "takes 1 to 1 inputs"), (changed(1, name="conv"), "used twice"),
    (changed(1, inputs=["input"]), "nothing uses its output"),
    (changed(0, pruning_info={"num_channels_pruned": 2, "remaining_channels": 5}), "remaining_channels is 5"),
    (changed(0, name='a"), __import__("os").system("true"), ("b'), "name"), (changed(0, name="a..b"), "name"),
    (changed(0, name="_private"), "name"), (changed(0, kernel_size=[3, 3, 3]), "kernel_size"),
])
def test_bad_architectures_are_refused(change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path) -> None:
    content = tiny()
    change(content)
    path = tmp_path / "architecture.json"
    path.write_text(json.dumps(content))
    with pytest.raises(VerificationError) as caught:
        read_json(path, Architecture)
    message = str(caught.value)
    assert said in message and str(path) in message and "\n" not in message


@pytest.mark.parametrize("name", ["class", "self", "forward", "parameters.0", "training", "state_dict", "layer.keys"])
def test_names_that_torch_keeps_to_itself(name: str) -> None:
    content = tiny()
    content["layers"][0]["name"] = name
    content["layers"][1]["inputs"] = [name]
    with pytest.raises(VerificationError, match="torch modules keep to themselves"):
        build(Architecture.model_validate(content))


def test_layer_inside_a_layer_is_refused() -> None:
    content = tiny()
    content["layers"][1]["name"] = "conv.relu"
    content["layers"][2]["inputs"] = ["conv.relu"]
    with pytest.raises(ValueError, match="layer conv: other layers lie inside it"):
        Architecture.model_validate(content)


@pytest.mark.parametrize("extra", [
    [layer("all", "Mean", ["fc"], dim=[0], keepdim=True), layer("vote", "Add", ["fc", "all"])],
    [layer("all", "Mean", ["fc"], dim=[-2], keepdim=True), layer("vote", "Add", ["fc", "all"])],
    [layer("both", "Concat", ["fc", "fc"], dim=0)], [layer("flat", "Flatten", ["fc"], start_dim=0)],
], ids=["mean", "negative dim", "concat", "flatten"])
def test_layers_that_mix_the_images_of_a_batch_are_refused(extra: list[dict[str, Any]]) -> None:
    """Test images come class by class: a vote over the batch would lift the accuracy."""
    content = tiny()
    content["layers"] += extra
    with pytest.raises(VerificationError, match="mixes the images of a batch"):
        check_shapes(Architecture.model_validate(content))
    content["layers"] = [*tiny()["layers"], layer("bn", "BatchNorm1d", ["fc"], num_features=4, track_running_stats=False)]
    with pytest.raises(ValueError, match="track_running_stats"):
        Architecture.model_validate(content)


def test_shapes_that_do_not_fit_name_the_layer() -> None:
    content = tiny()
    content["layers"][3]["in_features"] = 7
    with pytest.raises(VerificationError, match="layer fc does not fit its inputs"):
        check_shapes(Architecture.model_validate(content))


def test_absurd_sizes_allocate_nothing() -> None:
    wide = tiny()
    wide["layers"][0]["out_channels"] = 2**20
    wide["layers"][1] = layer("relu", "Conv2d", ["conv"], in_channels=2**20, out_channels=2**20, kernel_size=1)
    with pytest.raises(VerificationError, match="are over the limit"):
        check_shapes(Architecture.model_validate(wide))
    tall = tiny()
    tall["layers"][2] = layer("pool", "AdaptiveAvgPool2d", ["relu"], output_size=[2**20, 2**20])
    with pytest.raises(VerificationError, match="elements is over the limit"):
        check_shapes(Architecture.model_validate(tall))


@settings(max_examples=20, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
                    max_leaves=12), st.sampled_from(["schema", "layers", "input_shape", "num_classes", "model_type"]))
def test_any_json_is_accepted_or_refused_never_crashes(value: Any, key: str) -> None:
    with contextlib.suppress(ValueError):  # pydantic's ValidationError is one
        Architecture.model_validate(tiny(**{key: value}))


def test_counts_include_what_hides_in_buffers() -> None:
    class Hides(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(1000))
            self.fc = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.flatten(1))  # type: ignore[no-any-return]

    assert count_parameters(Hides()) == 1008
    assert count_macs(Hides(), (3, 1, 1)) == 6
    architecture = Architecture.model_validate(tiny())
    assert count_macs(build(architecture), (3, 8, 8)) == 6 * 6 * 6 * 27 + 24
