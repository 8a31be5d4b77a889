"""A solution of the 2.5M-parameter task, as text: the class means, with a last step that a test can replace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import model_loader
from tests.helpers.walls import WEAK_FLAGS

TASK_FLAGS = ["--task", "imagenet_pareto_2_5m", "--threads", "1", *WEAK_FLAGS]

MEANS = """
import torch
class Solution:
    def solve(self, train_loader, val_loader, metadata):
        assert metadata == {"num_classes": 128, "input_dim": 384, "param_limit": LIMIT, "baseline_accuracy": BASE,
                            "train_samples": 2048, "val_samples": 512, "test_samples": 1024, "device": "cpu"}, metadata
        assert train_loader.batch_size == val_loader.batch_size == 128
        batches = [*train_loader, *val_loader]
        inputs, labels = torch.cat([x for x, y in batches]), torch.cat([y for x, y in batches])
        means = torch.stack([inputs[labels == c].mean(0) for c in range(128)])
        head = torch.nn.Linear(384, 128)
        head.weight.data, head.bias.data = means, -0.5 * (means ** 2).sum(1)
        return self.finish(head)
    def finish(self, head):
        return head
"""


def finish(code: str) -> str:
    """Returns the class means with another last step, which has `head`, a linear layer, and `torch`."""
    return MEANS.replace("        return head\n", "".join(f"        {line}\n" for line in code.splitlines()))


class SolutionRun:
    """Writes a solution, evaluates it, keeps what came of it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def __call__(self, code: str, *flags: str, limit: int = 2_500_000,
                 base: float = 0.85) -> tuple[int, dict[str, Any], str]:
        solution, output = self.folder / "solution.py", self.folder / "results.json"
        solution.write_text(code.replace("LIMIT", str(limit)).replace("BASE", str(base)))
        exit_code = model_loader.main([*TASK_FLAGS, "--solution", str(solution), "--output_file", str(output), *flags])
        assert sorted(self.folder.iterdir()) == [output, solution]
        return exit_code, json.loads(output.read_text()), self.capsys.readouterr().err
