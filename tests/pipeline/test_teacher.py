"""Where a teacher's weights come from: a checkpoint's classes by name, and what a zoo's weights were trained on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from compress.pipeline.config import resolve
from compress.pipeline.run import run_pipeline
from tests.helpers.commands import Compress, assert_one_line_error

CLASSES = [f"class_{number:03d}" for number in range(4)]


@pytest.fixture
def alone(tiny_recipe: Path, tmp_path: Path) -> Path:
    """The recipe's teacher and nothing behind it."""
    recipe = tmp_path / "alone.yaml"
    recipe.write_text(tiny_recipe.read_text().split("  - distill")[0])
    return recipe


def permuted(weights: dict[str, Any], order: list[int]) -> dict[str, Any]:
    return {name: tensor[order] if name.startswith("fc.") else tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("spelled", [str, lambda name: name.upper().replace("_", "-")], ids=["as-it-is", "other-spelling"])
def test_classes_in_another_order_are_put_into_the_datas_by_name(spelled: Any, alone: Path, tiny_run: Path, tmp_path: Path,
                                                                 compress: Compress) -> None:
    weights = torch.load(tiny_run / "01-teacher" / "weights.pth", weights_only=True)
    order = [2, 0, 3, 1]
    torch.save({"model": permuted(weights, order), "class_to_idx": {spelled(CLASSES[number]): place for place, number
                                                                    in enumerate(order)}}, tmp_path / "other.pth")
    overrides = [f"teacher.checkpoint={tmp_path / 'other.pth'}", "teacher.train.epochs=0", f"run_dir={tmp_path}"]
    done = compress("plan", alone, *overrides)
    assert done.returncode == 0 and "its classes are in another order and are put into the data's, by name" in done.stdout
    outcome = run_pipeline(resolve(str(alone), overrides), Console(file=io.StringIO()))
    taken = torch.load(outcome.folder / "01-teacher" / "weights.pth", weights_only=True)
    assert all(torch.equal(taken[name], weights[name]) for name in weights) and not outcome.warnings


def test_other_classes_are_warned_of_and_the_datas_own_order_is_silent(alone: Path, tiny_run: Path, tmp_path: Path,
                                                                       compress: Compress) -> None:
    weights = torch.load(tiny_run / "01-teacher" / "weights.pth", weights_only=True)
    common = ["plan", alone, "teacher.train.epochs=0", f"teacher.checkpoint={tmp_path / 'named.pth'}"]
    torch.save({"model": weights, "classes": CLASSES}, tmp_path / "named.pth")
    done = compress(*common)
    assert done.returncode == 0 and "class_000" not in done.stdout and "warning" not in done.stdout
    torch.save({"model": weights, "classes": ["cat", "dog", "emu", "fox"]}, tmp_path / "named.pth")
    done = compress(*common)
    assert done.returncode == 0 and "warning" in done.stdout
    assert "it names other classes than the data ('cat' where the data has 'class_000')" in " ".join(done.stdout.split())


def test_a_last_layer_that_cannot_be_reordered_is_refused_before_the_run(alone: Path, tmp_path: Path, compress: Compress,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import Tensor, nn

    import architectures.families.slim_resnet as family

    class Odd(nn.Module):
        """Logits that are moved on by one place behind the last layer."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.mean((2, 3))).cumsum(1)

    monkeypatch.setitem(family.MODELS, "odd", lambda num_classes: Odd())
    torch.save({"model": Odd().state_dict(), "classes": CLASSES[::-1]}, tmp_path / "odd.pth")
    done = compress("plan", alone, "teacher.model=odd", "teacher.options={}", "teacher.train.epochs=0",
                    f"teacher.checkpoint={tmp_path / 'odd.pth'}")
    assert_one_line_error(done, "odd.pth", "its classes are the data's in another order", "cannot be reordered")
