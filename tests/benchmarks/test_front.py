"""The front on CIFAR-10: its recipes keep their bytes, its record is what its table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from architectures.describe import lower
from architectures.zoo import make
from benchmarks.front import RECORD, points, ratio_to, rest_of
from benchmarks.front_training import RECIPES, training_stages
from compress.pipeline.stages.distill import Distill
from compress.quantization.dynamic import quantize_graph
from metadata.formats import weights_content

LIMITS = {"cifar10_96kb": 98_496, "cifar10_96kb_fast": 98_496, "cifar10_64kb": 65_536, "cifar10_512kb": 512_024}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_network_of_a_recipe_fits_into_its_bytes(recipe: str) -> None:
    (name, stage), = training_stages(recipe)
    assert name == "distill" and isinstance(stage, Distill)
    model = lower(make(stage.model, num_classes=10, **stage.options).eval(), (3, 32, 32)).build().eval()
    content = weights_content(quantize_graph(model)[0].state_dict())
    assert 0.85 * LIMITS[recipe] < len(content) <= LIMITS[recipe]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_trained_student_goes_through_the_rest_of_its_recipe(recipe: str, tmp_path: Path) -> None:
    stages = yaml.safe_load(rest_of(recipe, tmp_path, tmp_path).read_text())["stages"]
    assert stages[0] == {"student": {"model": f"folder:{tmp_path / 'distill'}"}}
    names = [next(iter(stage)) for stage in stages[1:]]
    assert names[-2:] == ["package", "evaluate"] and not {"teacher", "distill", "finetune"} & set(names)


def test_the_ratio_of_times_is_paired_round_by_round() -> None:
    found = ratio_to([1.0, 2.0, 30.0, 4.0, 5.0], [2.0, 4.0, 60.0, 8.0, 5.0])
    assert found["ratio"] == 0.5 and found["ratio_95"] == [0.5, 1.0]


def test_the_record_has_its_bytes_and_counts() -> None:
    record = json.loads(RECORD.read_text())
    assert {package["recipe"] for package in record["packages"].values()} == set(RECIPES)
    for package in record["packages"].values():
        assert package["bytes"] <= LIMITS[package["recipe"]] and package["images"] == 10_000
    rows = points(record)
    assert [row["bytes"] for row in rows] == sorted(row["bytes"] for row in rows)
    assert sum(row["ours"] for row in rows) == len(RECIPES) and len(rows) == len(RECIPES) + 4
