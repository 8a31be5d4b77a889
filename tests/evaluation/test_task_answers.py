"""A model of the 2.5M-parameter task that learns from the test rows gains nothing, and is flagged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from compress.evaluation.synthetic import prototype_problem
from compress.evaluation.task_answers import differ
from tests.helpers.marks import slow_but
from tests.helpers.task import SolutionRun


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> SolutionRun:
    return SolutionRun(tmp_path, capsys)


ADAPTS = """import torch
def rule(rows, sums):
    return rows @ (sums / sums.norm(dim=1, keepdim=True) * 2.5).T / 0.16
def learnt(rows, sums):
    adapted = sums
    for _ in range(12):
        adapted = sums + rule(rows, adapted).softmax(1).T @ rows
    return adapted
class Adapts(torch.nn.Module):
    def __init__(self, sums):
        super().__init__()
        self.sums, self.seen, self.told, self.calls = torch.nn.Parameter(sums), [], {}, 0
        self.now = sums
    def see(self, rows):
        self.seen.append(rows.clone())
        self.calls += 1
        if len(rows) > 1 or self.calls % 32 == 0:
            self.now = learnt(torch.cat(self.seen), self.sums.detach())
    def plain(self, rows):
        return rule(rows, self.sums.detach())
    def forward(self, rows):
        STEP
class Solution:
    def solve(self, train_loader, val_loader, metadata):
        batches = [*train_loader, *val_loader]
        rows, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
        return Adapts(torch.stack([rows[labels == c].sum(0) for c in range(128)]))
"""
IN_BATCHES = "if len(rows) == 1:\n            return self.plain(rows) + OFFSET\n        self.see(rows)\n"
ADAPTING = {  # the last lines of forward, and where the answers change
    "single rows, told as a class": ("self.see(rows)\n        return torch.eye(128)[rule(rows, self.now).argmax(1)]",
                                     "in_another_order"),
    "batches": (IN_BATCHES.replace("OFFSET", "0") + "        return rule(rows, self.now)", "in_batches"),
    "an offset hides it": (IN_BATCHES.replace("OFFSET", "1e5") + "        return rule(rows, self.now) + 1e5", "in_batches"),
    "some places in batches": (IN_BATCHES.replace("OFFSET", "0") + "        answer = rule(rows, self.now)\n"
                               "        answer[::16] = self.plain(rows)[::16]\n        return answer", "in_batches"),
    "the other process is replayed": (  # whoever is asked in its order knows its answers
        "keys = [row.numpy().tobytes() for row in rows]\n        if len(rows) > 1:\n"
        "            if not self.told:\n                self.seen, self.calls, self.now = [], 0, self.sums.detach()\n"
        "            for row, key in zip(rows, keys):\n                self.told[key] = rule(row[None], self.now)\n"
        "                self.see(row[None])\n"
        "        elif keys[0] not in self.told:\n            answer = rule(rows, self.now)\n            self.see(rows)\n"
        "            return answer\n"
        "        return torch.cat([self.told[key] for key in keys])", "in_another_order"),
    "what was said alone is said again": (
        "keys = [row.numpy().tobytes() for row in rows]\n        self.see(rows)\n"
        "        if len(rows) == 1:\n            return self.told.setdefault(keys[0], self.plain(rows))\n"
        "        return torch.stack([self.told.get(key, [answer])[0] for key, answer in zip(keys, rule(rows, self.now))])",
        "in_batches"),
}


@pytest.mark.parametrize("how", slow_but(ADAPTING, ["single rows, told as a class"]))
def test_a_model_that_learns_from_test_rows_is_flagged(how: str, run: SolutionRun) -> None:
    step, where = ADAPTING[how]
    code, result, error = run(ADAPTS.replace("STEP", step))
    assert code == 0 and result["details"]["flags"]["batch_dependent"], error
    assert result["details"]["changed_rows"][where] > 0
    if where == "in_batches":  # answers to rows alone are graded, and these are the plain ones
        problem = prototype_problem()
        inputs, labels = (torch.cat([problem.train[i], problem.validation[i]]) for i in (0, 1))
        means = torch.stack([inputs[labels == c].mean(0) for c in range(128)])
        plain = (problem.test[0] @ (means / means.norm(dim=1, keepdim=True)).T).argmax(1)
        assert result["accuracy"] == float((plain == problem.test[1]).double().mean())
        assert result["details"]["changed_rows"]["in_another_order"] == 0
    assert any("adapts to what it is asked" in warning for warning in result["details"]["warnings"])


def test_answers_are_compared_without_what_all_logits_have_in_common() -> None:
    """Rounding is no difference, also where a large offset is rounded; a small change beneath an offset is one."""
    logits = np.random.default_rng(0).standard_normal((50, 128)).astype(np.float32)
    for offset in (0, 1e3, 1e5, 1e7):
        shifted = logits + np.float32(offset)
        assert not differ(shifted, logits + np.float32(offset * (1 + 1e-7))).any()
        assert not differ(shifted, np.nextafter(shifted, np.float32(np.inf))).any()
    changed = logits.copy()
    changed[7, 3] += 0.5
    for offset in (0, 1e3, 1e5):
        assert np.flatnonzero(differ(logits + np.float32(offset), changed + np.float32(offset))).tolist() == [7]
    assert not differ(np.zeros((2, 5), np.float32), np.zeros((2, 5), np.float32)).any()
