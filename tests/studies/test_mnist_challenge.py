"""The MNIST challenge: its rules, its files and its check of the committed weights, on tiny files in MNIST's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures.architecture import Architecture
from architectures.weights import open_model
from compress.studies.mnist_challenge import CHALLENGE_MODELS
from compress.studies.mnist_result import ChallengeResult
from compress.studies.mnist_verification import WEIGHTS
from metadata.files import read_json
from metadata.formats import read_csv
from tests.helpers.commands import Compress, assert_one_line_error
from tests.helpers.mnist import write_mnist


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    write_mnist(tmp_path / "data", "MNIST")
    return tmp_path / "data"


def result(**changes: Any) -> ChallengeResult:
    settings = {"model": "m", "seed": 0, "parameters": 7999, "macs": 1, "epochs": 15, "seconds": 1.0} | changes
    return ChallengeResult(**settings)


def test_rules_are_checked_one_by_one() -> None:
    good = result(test_accuracies=[0.994, 0.995, 0.996, 0.9951, 0.9999])
    assert list(good.rules.values()) == [True, True, True] and good.to_json()["passed"]
    assert good.to_json()["minimum"] == 0.994
    low = result(test_accuracies=[0.9939, 0.999, 0.999, 0.999, 0.999])
    assert list(low.rules.values()) == [False, True, True] and not low.to_json()["passed"]
    assert list(result(parameters=8000, epochs=16, test_accuracies=[1.0] * 5).rules.values()) == [True, False, False]
    three = result(parameters=10, epochs=3, test_accuracies=[1.0] * 3)  # the rule asks for five epochs
    assert list(three.rules.values()) == [False, True, True]


def test_entries_are_the_published_models_and_two_of_ours_below_the_limit() -> None:
    from architectures.zoo import make
    counts = {name: sum(p.numel() for p in make(name, num_classes=10).parameters()) for name in CHALLENGE_MODELS}
    assert counts == {"mnist_model_ll": 9412, "mnist_model_gap": 6992, "mnist_model_final": 6972, "mnist_under_8k": 7604,
                      "mnist_under_4k": 3903}
    for entry in CHALLENGE_MODELS.values():  # nothing of the training looks at the split that is measured
        assert entry.settings.get("keep", "last") == "last" and not entry.settings.get("early_patience")


def test_each_run_leaves_its_log_plots_and_weights_and_all_of_them_a_table(mnist: Path, compress: Compress,
                                                                          tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["mnist_challenge", "--data_root", mnist, "--log_dir", out, "--epochs", "2", "--threads", "1"]
    done = compress(*arguments, "--model", "mnist_under_4k", "--seeds", "0,1")
    assert done.returncode == 0, done.stderr
    run = out / "mnist_under_4k" / "seed1"
    assert {path.name for path in run.iterdir()} == {".lock", "config.json", "curves.png", "epochs.csv", "summary.json",
                                                     "weights.pth"}
    rows = read_csv(run / "epochs.csv")
    assert len(rows) == 2
    assert set(rows[0]) >= {"epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["last_epochs_test_accuracy"] == [float(row["test_accuracy"]) for row in rows]
    assert summary["passed"] is False
    assert json.loads((run / "config.json").read_text())["config"]["monitor"] == "train"
    before = (run / "summary.json").read_bytes()
    more = compress(*arguments, "--model", "mnist_model_gap", "--seeds", "0")
    assert more.returncode == 0 and (run / "summary.json").read_bytes() == before
    table = (out / "comparison.md").read_text()
    assert "| mnist_under_4k | 3,903 |" in table and "| mnist_model_gap | 6,992 | 99.36 |" in table
    again = compress(*arguments, "--model", "mnist_under_4k", "--seeds", "1")
    assert again.returncode == 0 and "finished before" in again.stdout and (run / "summary.json").read_bytes() == before
    assert_one_line_error(compress(*arguments[:-4], "--epochs", "3", "--model", "mnist_under_4k", "--seeds", "1"),
                          "another training (epochs: 2 -> 3)", "--log_dir OTHER")
    (run / "summary.json").write_text("{")
    assert_one_line_error(compress(*arguments, "--model", "mnist_model_gap", "--seeds", "0"), "seed1/summary.json: damaged")


def test_bad_input_gets_one_line(mnist: Path, compress: Compress, tmp_path: Path) -> None:
    assert_one_line_error(compress("mnist_challenge", "--model", "mnist_under_8", "--data_root", mnist),
                          "did you mean 'mnist_under_8k'")
    assert_one_line_error(compress("mnist_challenge", "--seeds", "1;2", "--data_root", mnist),
                          "whole numbers such as 0,1,2")
    assert_one_line_error(compress("mnist_challenge", "--verify", "--data_root", tmp_path / "nowhere"),
                          "mnist is not there")


def test_committed_weights_are_networks_below_the_limits(mnist: Path) -> None:
    records = json.loads((WEIGHTS / "weights.json").read_text())["models"]
    assert set(records) == {"mnist_under_8k", "mnist_under_4k"}
    for name, record in records.items():
        architecture: Architecture = read_json(WEIGHTS / f"{name}.json", Architecture)
        model = open_model(architecture, WEIGHTS / f"{name}.pth")
        assert sum(parameter.numel() for parameter in model.parameters()) == record["parameters"]
        assert record["parameters"] < {"mnist_under_8k": 8000, "mnist_under_4k": 4000}[name]
        assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 150_000


def test_verify_tells_what_does_not_hold(mnist: Path, compress: Compress) -> None:
    done = compress("mnist_challenge", "--verify", "--data_root", mnist)  # random images: nothing can be right by skill
    assert_one_line_error(done, "recorded", code=1)


def test_verify_on_real_mnist(real_mnist: Path, compress: Compress) -> None:
    done = compress("mnist_challenge", "--verify", "--data_root", real_mnist)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test images right") == 2
