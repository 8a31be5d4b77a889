"""Torchvision's classifiers, exported by torch's own exporter, come back with equal logits."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.onnx_round_trip import round_trip
from benchmarks.zoo_networks import torchvision_networks


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", torchvision_networks())
def test_a_classifier_comes_back(name: str, tmp_path: Path) -> None:
    row = round_trip(name, tmp_path)
    assert row["right"], row


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "mobilenet_v3_small", "swin_t", "vit_b_32"])
def test_a_classifier_of_the_newer_exporter_comes_back(name: str, tmp_path: Path) -> None:
    row = round_trip(f"torchvision:{name}", tmp_path, dynamo=True)
    assert row["right"], row
