"""The 2.5M-parameter task's evaluator: the public data and score, the limit to the parameter, solutions that cheat."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import model_loader
from compress.evaluation import trainee
from compress.evaluation.score import TASK_KEYS
from compress.evaluation.synthetic import prototype_problem
from compress.packaging.bundle import bundle
from tests.helpers.marks import slow_but
from tests.helpers.walls import WEAK_FLAGS

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
TASK = ["--task", "imagenet_pareto_2_5m", "--threads", "1", *WEAK_FLAGS]


class Run:
    """Writes a solution, evaluates it, keeps what came of it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def __call__(self, code: str, *flags: str, limit: int = 2_500_000,
                 base: float = 0.85) -> tuple[int, dict[str, Any], str]:
        solution, output = self.folder / "solution.py", self.folder / "results.json"
        solution.write_text(code.replace("LIMIT", str(limit)).replace("BASE", str(base)))
        exit_code = model_loader.main([*TASK, "--solution", str(solution), "--output_file", str(output), *flags])
        assert sorted(self.folder.iterdir()) == [output, solution]
        return exit_code, json.loads(output.read_text()), self.capsys.readouterr().err


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, capsys)


def finish(code: str) -> str:
    """The class means, with another last step."""
    return MEANS.replace("        return head\n", "".join(f"        {line}\n" for line in code.splitlines()))


def public_score() -> float:
    """The class means on the public data, in this process."""
    problem = prototype_problem()
    inputs = torch.cat([problem.train[0], problem.validation[0]])
    labels = torch.cat([problem.train[1], problem.validation[1]])
    means = torch.stack([inputs[labels == c].mean(0) for c in range(128)])
    predictions = (problem.test[0] @ means.T - 0.5 * (means ** 2).sum(1)).argmax(1)
    return float((predictions == problem.test[1]).float().mean())


def test_class_means_score_what_they_score_outside(run: Run) -> None:
    """At the limit to the parameter, which is no parameter too many."""
    begun = time.monotonic()
    code, result, error = run(MEANS, "--param_limit", "49280", limit=49280)
    assert code == 0 and result["details"]["status"] == "ok", error
    assert result["accuracy"] == pytest.approx(public_score())
    assert result["score"] == pytest.approx((result["accuracy"] - 0.85) / 0.15 * 100) == result["score_unbounded"]
    assert result["parameters_trainable"] == result["parameters_all"] == 384 * 128 + 128
    assert 0 < result["train_time_seconds"] < time.monotonic() - begun
    assert result["details"]["warnings"] == [] and not any(result["details"]["flags"].values())


def test_one_parameter_over_the_limit_scores_zero(run: Run) -> None:
    _, over, _ = run(MEANS, "--param_limit", "49279", limit=49279)
    assert over["score"] == over["score_unbounded"] == 0
    assert over["details"]["status"] == "over the parameter limit"


@pytest.mark.slow
def test_the_limit_of_the_task_counts_to_the_parameter(run: Run) -> None:
    big = finish("head.more = torch.nn.Parameter(torch.zeros(2_500_001 - 49_280))\nreturn head")
    assert run(big)[1]["score"] == 0
    assert run(big.replace("500_001", "500_000"))[1]["score"] > 90


def test_other_baselines_and_draws(run: Run) -> None:
    _, result, _ = run(MEANS, "--baseline_accuracy", "0.5", "--data_seed", "7", base=0.5)
    assert result["score"] == pytest.approx((result["accuracy"] - 0.5) / 0.5 * 100)
    assert result["details"]["data_seed"] == 7 and 0.95 < result["accuracy"] < 1 and result["accuracy"] != public_score()


@pytest.mark.slow
def test_a_score_below_the_baseline_is_zero(run: Run) -> None:
    _, result, _ = run(MEANS, "--baseline_accuracy", "0.999", base=0.999)
    assert result["score"] == 0 and result["score_unbounded"] < 0


HIDDEN = {
    "buffer": "head.register_buffer('table', torch.randn(300, 300))\nreturn head",
    "frozen": "head.more = torch.nn.Parameter(torch.zeros(10**5), requires_grad=False)\nreturn head",
    "list": "head.more = [torch.zeros(10**5)]\nreturn head",
    "array": "import numpy\nhead.more = {'a': (numpy.zeros(10**5),)}\nreturn head",
    "closure": "table = torch.zeros(10**5)\nhead.rule = lambda x: x + table[0]\nreturn head",
    "global": "global TABLE\nTABLE = torch.zeros(10**5)\ndef f(x):\n    return x + TABLE[0]\nhead.rule = f\nreturn head",
    "bytes": "head.more = bytes(10**6)\nreturn head",
    "name of a statistic": "head.register_buffer('running_var', torch.zeros(10**5))\nreturn head",
    "inner function": "global TABLE\nTABLE = torch.zeros(10**5)\nhead.rule = lambda x: [TABLE for _ in x]\nreturn head",
    "class": "class Head(torch.nn.Linear):\n    table = torch.zeros(10**5)\nhead.__class__ = Head\nreturn head",
}


@pytest.mark.parametrize("where", HIDDEN)
def test_every_hiding_place_is_found(where: str, tmp_path: Path) -> None:
    """The count itself, in this process: what is within a model's reach beside its weight and bias."""
    path = tmp_path / "solution.py"
    path.write_text(finish(HIDDEN[where]))
    module = trainee.solution_module(path)
    head = module.Solution().finish(torch.nn.Linear(384, 128))
    found = trainee.numbers_within_reach(head, module)
    assert sum(found.values()) - sum(parameter.numel() for parameter in (head.weight, head.bias)) >= 90_000


@pytest.mark.parametrize("where", slow_but(["name of a statistic", "global"], ["global"]))
def test_hidden_capacity_is_flagged(where: str, run: Run) -> None:
    code, result, error = run(finish(HIDDEN[where]))
    assert code == 0, error
    assert result["details"]["flags"]["hidden_capacity"] and result["details"]["hidden_numbers"] >= 90_000
    assert result["parameters_all"] >= result["parameters_trainable"] + 90_000
    assert any("hidden capacity" in warning for warning in result["details"]["warnings"])


def test_batch_statistics_are_not_hidden_capacity_but_adapting_is_flagged(run: Run) -> None:
    normal = finish("net = torch.nn.Sequential(head, torch.nn.BatchNorm1d(128))\nreturn net")
    _, result, _ = run(normal)
    assert not any(result["details"]["flags"].values()) and result["score"] > 90
    adapting = finish("class Adapting(torch.nn.Linear):\n"
                      "    def forward(self, x):\n        return super().forward(x - x.mean(0))\n"
                      "head.__class__ = Adapting\nreturn head")
    _, result, _ = run(adapting)
    assert result["details"]["flags"]["batch_dependent"]


def test_counters_are_bound_before_the_solution_can_change_them(run: Run) -> None:
    patched = finish("import sys\nsys.modules['sandbox_trainee'].numbers_within_reach = lambda *a: {}\n"
                     "head.parameters = lambda: []\nhead.more = torch.nn.Parameter(torch.zeros(3_000_000))\nreturn head")
    _, result, _ = run(patched)
    assert result["score"] == 0 and result["parameters_trainable"] == 3_049_280


def test_a_temporary_file_is_gone_when_the_test_begins(run: Run) -> None:
    code, _, error = run(finish("torch.save(head.weight, 'w.pt')\nclass Late(torch.nn.Linear):\n"
                                "    def forward(self, x):\n        return x @ torch.load('w.pt').T\n"
                                "head.__class__ = Late\nreturn head"))
    assert code == 1 and "FileNotFoundError" in error


def test_more_than_the_rows_can_teach_is_flagged(run: Run) -> None:
    rebuilt = finish("p = torch.randn(128, 384, generator=torch.Generator().manual_seed(2025))\n"
                     "head.weight.data = 2.5 * p / p.norm(dim=1, keepdim=True)\nhead.bias.data.zero_()\nreturn head")
    _, result, _ = run(rebuilt)
    assert result["accuracy"] > 0.997 and result["details"]["flags"]["implausible"]


FAILS = {
    "syntax error": ("def", "SyntaxError"), "no class": ("x = 1", "no class Solution"),
    "no module": (finish("return 7"), "returned int, expected an nn.Module"),
    "raises": (finish("raise ValueError('no luck')"), "ValueError: no luck"),
    "exits": (finish("import os; os._exit(0)"), "ended its process (exit code 0)"),
    "for ever": (finish("while True: pass"), "within --time_limit_s 1"),
    "too few classes": (finish("return torch.nn.Linear(384, 5)"), "expected finite logits (1, 128)"),
    "NaN": (finish("head.bias.data[0] = float('nan')\nreturn head"), "finite logits"),
    "other inputs": (finish("return torch.nn.Linear(5, 128)"), "shapes cannot be multiplied"),
    "reads elsewhere": (finish(f"open({str(Path(__file__))!r})"), "PermissionError"),
}


@pytest.mark.parametrize("failure", slow_but(FAILS, ["no module", "for ever", "NaN", "reads elsewhere"]))
def test_failing_solutions_score_zero_in_one_line(failure: str, run: Run) -> None:
    code, said = FAILS[failure]
    exit_code, result, error = run(code, "--time_limit_s", "1" if failure == "for ever" else "60")
    assert exit_code == 1 and said in error and len(error.strip().splitlines()) == 1, error
    assert all(result[key] == 0 for key in TASK_KEYS)
    assert result["details"]["status"].startswith("failed: ") and said in result["details"]["status"]


@pytest.mark.parametrize(("flags", "said"), [
    (["--baseline_accuracy", "85"], "expected a fraction below 1"), (["--param_limit", "0"], "--param_limit"),
    (["--data_seed", "-1"], "--data_seed"), (["--solution", "/nowhere.py"], "there is no such file"),
])
def test_users_mistakes(flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solution = tmp_path / "s.py"
    solution.write_text(MEANS)
    assert model_loader.main([*TASK, "--solution", str(solution), "--output_file", str(tmp_path / "r.json"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert json.loads((tmp_path / "r.json").read_text())["score"] == 0


def test_flags_that_must_come_together(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, missing in (([], "--submission_dir, --data_dir"), (TASK, "--solution"),
                               ([*TASK, "--solution", "x", "--compare", "y"], "--compare does not go with --task"),
                               (["--submission_dir", "x", "--data_dir", "y", "--solution", "z"], "without --task")):
        with pytest.raises(SystemExit) as ended:
            model_loader.main(arguments)
        assert ended.value.code == 2 and missing in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    [*TASK, "--solution", "x.py"],
    pytest.param(["--submission_dir", "s", "--data_dir", ".", "--compare", "s"], marks=pytest.mark.slow),
    pytest.param(["--submission_dir", "s", "--data_dir", "d"], marks=pytest.mark.slow)], ids=["task", "compare", "code"])
def test_a_copy_alone_says_what_needs_the_toolkit(flags: list[str], tmp_path: Path) -> None:
    import subprocess
    import sys
    alone = tmp_path / "model_loader.py"
    alone.write_bytes(bundle())
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "metadata.json").write_text("{}")
    (tmp_path / "d" / "class").mkdir(parents=True)
    (tmp_path / "d" / "class" / "image.png").write_bytes(b"")
    done = subprocess.run([sys.executable, "-I", str(alone), *flags], cwd=tmp_path, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 2 and "needs the toolkit" in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
