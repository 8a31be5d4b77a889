"""Opponents in --compare: whatever the second submission does, the first one keeps its result."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.evaluation.evaluate import evaluate_submission
from compress.evaluation.runtimes import EvaluationSettings
from tests.helpers.archives import two_directories
from tests.helpers.marks import slow_but
from tests.helpers.processes import descendants
from tests.helpers.submissions import edit_json, restate, weights_of
from tests.helpers.verdicts import Evaluate

METADATA = "model_metadata.json"


def append(lines: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.py").write_text((folder / "model.py").read_text() + "\n" + lines)


def forged_archive(folder: Path) -> None:
    weights_of(folder).write_bytes(two_directories(weights_of(folder).read_bytes()))
    restate(folder)


def broken_json(folder: Path) -> None:
    (folder / METADATA).write_text("[" * 100_000)


PACKAGES: dict[str, Callable[[Path], Any]] = {
    "a crop that the images lack": lambda folder: edit_json(
        folder, METADATA, lambda content: content["preprocessing"].update(resize=None, crop=224)),
    "images made vast": lambda folder: edit_json(
        folder, METADATA, lambda content: content["preprocessing"].update(resize=12_000)),
    "a forged archive": forged_archive, "broken JSON": broken_json,
    "a sparse file": lambda folder: os.truncate(_touched(folder / "notes.bin"), 2**42),
    "other classes": lambda folder: edit_json(
        folder, METADATA, lambda content: content.update(class_names=[f"x{label}" for label in range(10)])),
}
CODE: dict[str, Callable[[Path], Any]] = {
    "hangs": append("import time\nSlimResNet18.forward = lambda self, x: time.sleep(10**6)"),
    "crashes": append("import ctypes\nSlimResNet18.forward = lambda self, x: ctypes.string_at(0)"),
    "empties the caches": append(
        "import torch\nTRASH, plain = torch.zeros(2**22), SlimResNet18.forward\n"
        "def forward(self, x):\n    answer = plain(self, x); TRASH.add_(1); return answer\nSlimResNet18.forward = forward"),
    "hangs at import": append("while True: pass"),
}


def _touched(path: Path) -> Path:
    path.touch()
    return path


def kept(outcome: tuple[int, dict[str, Any], str], honest: dict[str, Any]) -> None:
    """The first submission has the result that it has alone, but for what a clock decides."""
    code, result, error = outcome
    assert code == 0, error
    same = ("accuracy", "model_size", "size_score", "accuracy_score")
    assert {key: result[key] for key in same} == {key: honest[key] for key in same}
    mine, alone = result["details"], honest["details"]
    assert mine["accuracy"]["predictions_sha256"] == alone["accuracy"]["predictions_sha256"]
    assert mine["sha256"] == alone["sha256"] and mine["status"] == "ok"


@pytest.mark.parametrize("opponent", PACKAGES)
def test_a_hostile_package_beside_it(opponent: str, submission: Path, package: Path, attacked: Evaluate,
                                     honest: dict[str, Any]) -> None:
    PACKAGES[opponent](package)
    outcome = attacked(submission, "--compare", str(package))
    kept(outcome, honest)
    assert json.dumps(outcome[1]["details"]["compare"]).count("failed: ") == 1
    assert any("there is no comparison" in warning for warning in outcome[1]["details"]["warnings"])


@pytest.mark.parametrize("opponent", slow_but(CODE, []))
def test_hostile_code_beside_it(opponent: str, submission: Path, code: Path, attacked: Evaluate,
                                honest: dict[str, Any]) -> None:
    CODE[opponent](code)
    limit = ["--time_limit_s", "15"] if opponent.startswith("hangs") else []
    outcome = attacked(submission, "--compare", str(code), "--allow_code", *limit)
    kept(outcome, honest)
    compared = outcome[1]["details"]["compare"]
    if opponent == "empties the caches":  # which is allowed, and slows only the calls of the comparison
        assert compared["latency"]["pairs"] == 50 and "status" not in compared
    else:
        assert compared["status"].startswith("failed: ")


def test_the_first_one_is_measured_before_the_second_is_started(submission: Path, package: Path, few: Path) -> None:
    """Nothing of the second is in the first one's latency: its process starts when the first one's answers are complete."""
    readers: list[set[int]] = [set()]

    def look(done: int, total: int) -> None:
        if done % 10 == 0:  # looking takes time
            readers[-1].add(sum("--nursery" in line for line in descendants(os.getpid()).values()) - 1)
        if done == total:
            readers.append(set())

    result = evaluate_submission(submission, few, settings=EvaluationSettings(runs=20, warmup=2), compare=package,
                                 progress=look)
    assert readers == [{1}, {1}, {2}, set()]  # images are read, classified alone, classified by both
    assert result["details"]["latency"]["runs"] == 20 and "latency" in result["details"]["compare"]
