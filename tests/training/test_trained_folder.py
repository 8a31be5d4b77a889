"""What `train` writes is a model by `folder:DIR`, also where the network's layers have other names than its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from architectures.named import LAYERS
from architectures.zoo import make
from compress.training.flags import resolve_training
from compress.training.run import run_training
from compress.training.trackers import terminal


@pytest.mark.parametrize(("name", "renamed"), [("timm:lcnet_035", True), ("slim_resnet18", False)])
def test_a_folder_of_train_is_a_model(name: str, renamed: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = ["--dataset", "digits", "--epochs", "1", "--max_steps", "1", "--stem", "imagenet", "--threads", "1"]
    run_training(resolve_training([*flags, "--model_name", name, "--log_dir", str(folder)]), terminal())
    assert (folder / LAYERS).is_file() == renamed
    model = make(name, num_classes=10).eval()
    model.load_state_dict(torch.load(folder / "weights.pth", weights_only=True))
    again = make(f"folder:{folder}", num_classes=10).eval()
    stored = [sorted(tensor.flatten().tolist() for tensor in each.parameters()) for each in (again, model)]
    assert stored[0] == stored[1]  # to the bit; kernels may sum in another order in the next call
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(again(images), model(images))
