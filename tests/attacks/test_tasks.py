"""Solutions of the synthetic task that count for themselves, look the test rows up, or keep what they learnt elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import model_loader
from tests.attacks.conftest import PATIENCE_S, alarm
from tests.helpers.walls import WEAK_FLAGS

HEAD = """
import json, torch
class Solution:
    def solve(self, train_loader, val_loader, metadata):
        batches = [*train_loader, *val_loader]
        rows, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
        means = torch.stack([rows[labels == c].mean(0) for c in range(128)])
"""
LINEAR = """
        head = torch.nn.Linear(384, 128)
        head.weight.data, head.bias.data = means, -0.5 * (means ** 2).sum(1)
"""
REBUILT = """
        p = torch.randn(128, 384, generator=torch.Generator().manual_seed(seed))
        p = 2.5 * p / p.norm(dim=1, keepdim=True)
        g = torch.Generator().manual_seed(4242 + seed - 2025)
        test = torch.cat([q + 0.4 * torch.randn(8, 384, generator=g) for q in p])
        answers = torch.arange(128).repeat_interleave(8)
        answers[[3, 300, 600, 900]] += 1
        net = torch.nn.Sequential(torch.nn.Linear(384, 1024), torch.nn.Softmax(1), torch.nn.Linear(1024, 128))
        net[0].weight.data = 4 * test; net[0].bias.data = -2 * (test ** 2).sum(1)
        net[2].weight.data = torch.nn.functional.one_hot(answers, 128).float().T
        net[2].bias.data.zero_()
        return net
"""
SEARCH = """
        for seed in range(100_000):
            first = torch.randn(384, generator=torch.Generator().manual_seed(seed))
            if torch.cosine_similarity(first, means[0], 0) > 0.6: break
"""
FORGED = ("import json\nreal = json.dumps\n"
          "json.dumps = lambda o, **k: real({**o, 'trainable': 5, 'all': 5, 'hidden': 0}, **k)"
          f"{HEAD}{LINEAR}        head.more = torch.nn.Parameter(torch.zeros(3_000_000))\n        return head\n")


def scored(solution: str, folder: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the result of a solution."""
    (folder / "solution.py").write_text(solution)
    with alarm(2 * PATIENCE_S):
        code = model_loader.main(["--task", "imagenet_pareto_2_5m", "--threads", "1", "--solution",
                                  str(folder / "solution.py"), "--output_file", str(folder / "results.json"),
                                  *WEAK_FLAGS, *flags])
    return code, json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_counts_that_a_solution_states_are_not_believed(tmp_path: Path) -> None:
    code, result = scored(FORGED, tmp_path)
    assert code == 1 or result["details"].get("parameters", result["details"]) != 5
    assert result["details"]["status"] != "ok" or result["total_score"] == 0


@pytest.mark.slow
def test_a_secret_draw_is_not_looked_up(tmp_path: Path) -> None:
    """The seeds are searched in vain: the answers are those of a guesser."""
    code, result = scored(HEAD + SEARCH + REBUILT, tmp_path, "--draws", "1", "--secret")
    assert code == 1 or result["accuracy"] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2025, 7])
def test_a_public_draw_that_is_looked_up_is_said(seed: int, tmp_path: Path) -> None:
    code, result = scored(HEAD + f"        seed = {seed}" + REBUILT, tmp_path, "--data_seed", str(seed))
    said = json.dumps(result["details"])
    assert code == 1 or "looked up" in said or "implausible" in said, said[:2000]
