"""The 2.5M-parameter task's evaluator: public and secret draws, the limit to the parameter, solutions that cheat."""

from __future__ import annotations

import contextlib
import json
import os
import time
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import model_loader
from compress.evaluation.command import draw_progress
from compress.evaluation.pareto_task import Draws, chosen_draws
from compress.evaluation.plausibility import at_least, bayes_distribution, bayes_probabilities, count_distribution
from compress.evaluation.score import TASK_KEYS
from compress.evaluation.synthetic import data_sha256, prototype_problem, secret_problem
from compress.packaging.bundle import bundle
from metadata.errors import UserError
from tests.helpers.marks import slow_but
from tests.helpers.task import MEANS, TASK_FLAGS, SolutionRun, finish
from tests.helpers.walls import warnings_of_the_walls

SALT = "000102030405060708090a0b0c0d0e0f"


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> SolutionRun:
    return SolutionRun(tmp_path, capsys)


def mean_rule(problem: Any) -> float:
    """The accuracy of the class means, in this process."""
    inputs, labels = (torch.cat([problem.train[part], problem.validation[part]]) for part in (0, 1))
    means = torch.stack([inputs[labels == c].mean(0) for c in range(problem.num_classes)])
    predictions = (problem.test[0] @ means.T - 0.5 * (means ** 2).sum(1)).argmax(1)
    return float((predictions == problem.test[1]).double().mean())


# ------------------------------------------------------------------------------------------------- the honest score


def test_class_means_score_what_they_score_outside(run: SolutionRun) -> None:
    """At the limit to the parameter, which is no parameter too many."""
    begun = time.monotonic()
    code, result, error = run(MEANS, "--param_limit", "49280", limit=49280)
    details = result["details"]
    assert code == 0 and details["status"] == "ok" and details["data"] == "public", error
    assert result["accuracy"] == pytest.approx(mean_rule(prototype_problem()))
    assert result["score"] == pytest.approx((result["accuracy"] - 0.85) / 0.15 * 100) == result["score_unbounded"]
    assert result["parameters_trainable"] == result["parameters_all"] == 384 * 128 + 128
    assert 0 < result["train_time_seconds"] < time.monotonic() - begun
    assert details["guarded_score"] is None  # of secret draws alone
    assert details["changed_rows"] == {"in_another_order": 0, "in_batches": 0}
    assert details["accuracy_in_batches"] == result["accuracy"]
    assert not any(details["flags"].values()) and 1e-3 < details["probability_under_bayes"] < 0.5
    assert details["warnings"] == [
        *warnings_of_the_walls(), "a public draw can be looked up: its test rows follow from the seed, so this score "
        "proves nothing about a solution that does so; --draws 5 --secret evaluates on draws that no solution knows"]


@pytest.mark.slow
def test_one_parameter_over_the_limit_scores_zero(run: SolutionRun) -> None:
    _, over, _ = run(MEANS, "--param_limit", "49279", limit=49279)
    assert over["score"] == over["score_unbounded"] == 0
    assert over["details"]["status"] == "over the parameter limit"


@pytest.mark.slow
def test_the_limit_of_the_task_counts_to_the_parameter(run: SolutionRun) -> None:
    big = finish("head.more = torch.nn.Parameter(torch.zeros(2_500_001 - 49_280))\nreturn head")
    assert run(big)[1]["score"] == 0
    assert run(big.replace("500_001", "500_000"))[1]["score"] > 90


@pytest.mark.slow
def test_other_baselines_and_draws(run: SolutionRun) -> None:
    _, result, _ = run(MEANS, "--baseline_accuracy", "0.5", "--data_seed", "7", base=0.5)
    assert result["score"] == pytest.approx((result["accuracy"] - 0.5) / 0.5 * 100)
    assert result["details"]["data_seed"] == 7 and result["accuracy"] == pytest.approx(mean_rule(prototype_problem(7)))


@pytest.mark.slow
def test_a_score_below_the_baseline_is_zero(run: SolutionRun) -> None:
    _, result, _ = run(MEANS, "--baseline_accuracy", "0.999", base=0.999)
    assert result["score"] == 0 and result["score_unbounded"] < 0


# ------------------------------------------------------------------------------------------------------ secret draws


def test_draws_depend_on_salt_and_number_and_can_be_repeated() -> None:
    sizes = {"num_classes": 4, "input_dim": 24, "per_class": (5, 2, 3)}
    draws = [secret_problem(salt, draw, **sizes) for salt in (bytes(16), bytes(15) + b"\1") for draw in (0, 1)]
    assert len({data_sha256(problem) for problem in draws}) == 4
    assert data_sha256(secret_problem(bytes(16), 0, **sizes)) == data_sha256(draws[0])
    problem = draws[0]
    assert [part[0].shape for part in (problem.train, problem.validation, problem.test)] == [(20, 24), (8, 24), (12, 24)]
    assert problem.test[0].dtype == torch.float32 and problem.test[1].bincount().tolist() == [3] * 4


@pytest.mark.slow
def test_a_failed_evaluation_on_secret_draws_tells_its_salt(run: SolutionRun) -> None:
    code, result, _ = run(finish("raise ValueError('no luck')"), "--draws", "2", "--secret")
    assert code == 1 and re.search(r"no luck.*; --salt [0-9a-f]{32} repeats", result["details"]["status"])


def test_secret_draws_are_of_the_public_kind() -> None:
    """Prototypes of length 2.5, noise of 0.4, and rows that teach as much."""
    problem = secret_problem(bytes(16), 0)
    means = torch.stack([problem.train[0][problem.train[1] == c].mean(0) for c in range(128)])
    assert float((problem.train[0] - means[problem.train[1]]).std()) == pytest.approx(0.4 * (15 / 16) ** 0.5, rel=0.01)
    assert float((means ** 2).sum(1).mean()) == pytest.approx(2.5**2 + 384 * 0.4**2 / 16, rel=0.01)
    assert 0.97 < mean_rule(problem) < 1


def test_a_new_salt_for_each_evaluation() -> None:
    first, second = (chosen_draws(None, 3, True, None) for _ in range(2))
    assert first.salt != second.salt and len(first.salt or b"") == 16 and first.number == 3 and not first.repeated
    assert chosen_draws(None, None, False, SALT) == Draws(salt=bytes(range(16)), number=5, repeated=True)
    assert chosen_draws(None, None, False, None) == Draws() and chosen_draws(7, None, False, None) == Draws(data_seed=7)


@pytest.mark.parametrize(("flags", "said"), [
    ((None, 3, False, None), "--draws: expected --secret"), ((None, None, True, SALT), "give one of the two"),
    ((7, None, True, None), "--data_seed is for a public draw"), ((None, 0, True, None), "expected 1 to 100, got 0"),
    ((None, 101, False, SALT), "expected 1 to 100, got 101"), ((None, None, False, "12"), "expected the 32 hex digits"),
    ((None, None, False, "g" * 32), "expected the 32 hex digits"), ((-1, None, False, None), "--data_seed: expected 0"),
])
def test_contradictory_draws(flags: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        chosen_draws(*flags)


@pytest.mark.slow
def test_secret_draws_are_scored_one_by_one_and_can_be_repeated(run: SolutionRun) -> None:
    code, result, error = run(MEANS, "--draws", "2", "--secret")
    details = result["details"]
    assert details["guarded_score"] == result["score"] > 0
    assert code == 0 and details["data"] == "secret" and not any("looked up" in line for line in details["warnings"]), error
    problems = [secret_problem(bytes.fromhex(details["salt"]), draw) for draw in range(2)]
    accuracies = [mean_rule(problem) for problem in problems]
    assert [draw["accuracy"] for draw in details["draws"]] == pytest.approx(accuracies)
    assert [draw["data_sha256"] for draw in details["draws"]] == [data_sha256(problem) for problem in problems]
    assert result["accuracy"] == pytest.approx(np.mean(accuracies)) == details["over_draws"]["accuracy"]["mean"]
    assert details["over_draws"]["accuracy"]["worst"] == pytest.approx(min(accuracies))
    assert details["over_draws"]["score"]["sd"] == pytest.approx(np.std(accuracies, ddof=1) / 0.15 * 100)
    assert details["total"] == 2048 and details["correct"] == sum(draw["correct"] for draw in details["draws"])
    _, again, _ = run(MEANS, "--draws", "2", "--salt", details["salt"])
    assert again["score"] == result["score"] and again["details"]["data"] == "repeated"
    assert again["details"]["guarded_score"] is None
    assert any("the salt was known" in line for line in again["details"]["warnings"])


# ------------------------------------------------------------------------------------------- what is plausible at all


def test_the_bayes_rule_is_calibrated() -> None:
    """Over 60 draws its right answers have the mean and the spread that its own probabilities say."""
    scores, tails = [], []
    for draw in range(60):
        problem = secret_problem(b"calibration" + bytes(5), draw)
        chances = bayes_probabilities(problem)
        likeliest = chances.max(1).values
        assert float(chances.sum(1).max()) == pytest.approx(1)
        correct = int((chances.argmax(1) == problem.test[1]).sum())
        scores.append(float((correct - likeliest.sum()) / (likeliest * (1 - likeliest)).sum().sqrt()))
        tails.append(at_least(count_distribution(likeliest.tolist()), correct))
    assert abs(np.mean(scores)) < 4 / 60**0.5 and 0.7 < np.std(scores) < 1.4
    assert min(tails) > 1e-4 and 0.3 < np.mean(tails) < 0.75


def test_the_distribution_is_the_exact_one() -> None:
    chances = count_distribution([0.5, 0.9, 0.2])
    assert chances == pytest.approx([0.04, 0.41, 0.46, 0.09]) and at_least(chances, 2) == pytest.approx(0.55)
    assert at_least(chances, 0) == 1 and at_least(count_distribution([0.3] * 9), 9) == pytest.approx(0.3**9)


@pytest.mark.parametrize("seed", [2025, 7, 90210])
def test_no_mistake_is_implausible_for_every_seed(seed: int) -> None:
    """The class means are plausible; four mistakes are just so; none is not."""
    problem = prototype_problem(seed)
    chances = bayes_distribution(problem)
    assert at_least(chances, round(1024 * mean_rule(problem))) > 0.01
    assert at_least(chances, 1024) < 1e-6


# ------------------------------------------------------------------------------------- solutions that know too much

LOOK_UP = """import torch
class Solution:
    def solve(self, train_loader, val_loader, metadata):
        batches = list(train_loader)
        rows, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
        means = torch.stack([rows[labels == c].mean(0) for c in range(128)])
        for seed in SEEDS:
            first = torch.randn(384, generator=torch.Generator().manual_seed(seed))
            if torch.cosine_similarity(first, means[0], 0) > 0.6:
                break
        p = torch.randn(128, 384, generator=torch.Generator().manual_seed(seed))
        p = 2.5 * p / p.norm(dim=1, keepdim=True)
        g = torch.Generator().manual_seed(4242 + seed - 2025)
        test = torch.cat([q + 0.4 * torch.randn(8, 384, generator=g) for q in p])
        answers = torch.arange(128).repeat_interleave(8)
        answers[WRONG] += 1
        net = torch.nn.Sequential(torch.nn.Linear(384, 1024), torch.nn.Softmax(1), torch.nn.Linear(1024, 128))
        net[0].weight.data = 4 * test; net[0].bias.data = -2 * (test ** 2).sum(1)
        net[2].weight.data = torch.nn.functional.one_hot(answers, 128).float().T
        net[2].bias.data.zero_()
        return net
"""


@pytest.mark.slow
def test_a_search_of_seeds_is_implausible_on_public_draws_and_fails_on_secret_ones(run: SolutionRun) -> None:
    search = LOOK_UP.replace("SEEDS", "range(3000)").replace("WRONG", "[]")
    for seed in ("7", "2025"):
        _, result, _ = run(search, "--data_seed", seed)
        assert result["score"] == 100 and result["details"]["flags"]["implausible"]
        assert any("more than the given rows can teach" in line for line in result["details"]["warnings"])
    _, result, _ = run(search, "--draws", "1", "--secret")
    assert result["accuracy"] < 0.05 and result["score"] == 0


@pytest.mark.slow
def test_just_plausible_is_told_on_the_public_draw_and_fails_on_secret_ones(run: SolutionRun) -> None:
    """Nothing tells four mistakes in rebuilt rows from luck; the result says so."""
    few = LOOK_UP.replace("SEEDS", "[2025]").replace("WRONG", "[3, 300, 600, 900]")
    _, result, _ = run(few)
    assert result["details"]["correct"] == 1020 and result["details"]["probability_under_bayes"] < 1e-3
    assert any("can be looked up" in line for line in result["details"]["warnings"])
    _, result, _ = run(few, "--draws", "1", "--secret")
    assert result["score"] == 0 and result["details"]["correct"] < 50


# ----------------------------------------------------------------------------- what is left behind, and who counts it

FORGED = """import json, pickle, sys
real = json.dumps
json.dumps = lambda o, **k: real({**o, "trainable": 5, "trainable_bytes": 0, "elsewhere": 0, "hidden": 0}, **k)
pickle.dumps = torch.save = lambda *a, **k: None
head.parameters = lambda: []
sys.modules['sandbox_inventory'].take_inventory = lambda content: {}
sys.modules['sandbox_trainee'].restore_model = None
head.more = torch.nn.Parameter(torch.zeros(3_000_000))
import time
class Late(torch.nn.Linear):
    def parameters(self, recurse=True):
        return iter([])
    def named_parameters(self, *a, **k):
        return iter([])
    def __setstate__(self, state):
        import json
        json.dumps = lambda o, **k: '{"trainable": 5}'
        self.__dict__.update(state)
head.__class__ = Late
return head"""


@pytest.mark.slow
def test_counts_are_not_taken_where_the_solution_runs(run: SolutionRun) -> None:
    code, result, error = run(finish(FORGED))
    assert code == 0 and result["parameters_trainable"] == 3_049_280 and result["score"] == 0, error
    assert result["details"]["status"] == "over the parameter limit"


BEHIND = {
    "a file": ("torch.save(head.weight, 'w.pt')\nclass Late(torch.nn.Linear):\n    def forward(self, x):\n"
               "        return x @ torch.load('w.pt').T\nhead.__class__ = Late\nreturn head", "FileNotFoundError"),
    "a module's attribute": ("torch.kept = head.weight\nclass Late(torch.nn.Linear):\n    def forward(self, x):\n"
                             "        return x @ torch.kept.T\nhead.__class__ = Late\nreturn head",
                             "has no attribute 'kept'"),
    "a module": ("import sys, types\nkept = sys.modules['kept'] = types.ModuleType('kept')\nkept.table = head.weight\n"
                 "class Late(torch.nn.Linear):\n    def forward(self, x):\n        import kept\n"
                 "        return x @ kept.table.T\nhead.__class__ = Late\nreturn head", "No module named 'kept'"),
    "a thread": ("import threading, time\nkept = threading.Thread(target=time.sleep, args=(99,), daemon=True)\n"
                 "kept.start()\n"
                 "class Late(torch.nn.Linear):\n    def forward(self, x):\n        import threading\n"
                 "        assert threading.active_count() > 1, 'alone'\n        return super().forward(x)\n"
                 "head.__class__ = Late\nreturn head", "alone"),
    "bytes that are no model": ("import sys\nsys.modules['sandbox_trainee'].serialised = lambda *a: b'123'\nreturn head",
                                "the serialised model has no header"),
    "a pickle that is no model": ("import sys, struct\nsys.modules['sandbox_trainee'].serialised = lambda *a: "
                                  "struct.pack('<QQ', 2, 0) + b'N.'\nreturn head", "comes back as NoneType"),
    "a pickle that ends the process": (
        "import sys, struct\nsys.modules['sandbox_trainee'].serialised = lambda *a: "
        "struct.pack('<QQ', 18, 0) + b'cos\\n_exit\\n(I0\\ntR..'\nreturn head", "ended its process (exit code 0)"),
    "too many bytes": ("head.more = torch.zeros(5_000_000)\nreturn head", "together 20,065,536 are allowed"),
    "a lock": ("import threading\nhead.lock = threading.Lock()\nreturn head", "cannot be serialised"),
}


@pytest.mark.parametrize("what", slow_but(BEHIND, []))
def test_only_the_bytes_reach_the_process_that_answers(what: str, run: SolutionRun) -> None:
    last_step, said = BEHIND[what]
    code, result, error = run(finish(last_step))
    assert code == 1 and said in error and len(error.strip().splitlines()) == 1, error
    assert result["score"] == 0 and result["details"]["status"].startswith("failed: ")


def test_a_source_that_leaves_no_room_is_refused_before_it_runs(run: SolutionRun) -> None:
    code, _, error = run("#" * 70_000, "--param_limit", "100")
    assert code == 1 and "the source takes 70,000 bytes without a model; together 66,336 are allowed" in error


@pytest.mark.slow
def test_hidden_capacity_is_flagged(run: SolutionRun) -> None:
    code, result, error = run(finish("head.more = [torch.zeros(10**5)]\nreturn head"))
    assert code == 0, error
    assert result["details"]["flags"]["hidden_capacity"] and result["details"]["hidden_numbers"] >= 90_000
    assert result["parameters_all"] >= result["parameters_trainable"] + 90_000
    assert any("hidden capacity" in warning for warning in result["details"]["warnings"])


@pytest.mark.slow
def test_batch_statistics_are_not_hidden_capacity(run: SolutionRun) -> None:
    normal = finish("net = torch.nn.Sequential(head, torch.nn.BatchNorm1d(128))\nreturn net")
    _, result, _ = run(normal)
    assert not any(result["details"]["flags"].values()) and result["score"] > 90


# -------------------------------------------------------------------------------- what fails, and the command line

FAILS = {
    "syntax error": ("def", "SyntaxError"), "no class": ("x = 1", "no class Solution"),
    "no module": (finish("return 7"), "returned int, expected an nn.Module"),
    "raises": (finish("raise ValueError('no luck')"), "ValueError: no luck"),
    "exits": (finish("import os; os._exit(0)"), "ended its process (exit code 0)"),
    "for ever": (finish("while True: pass"), "within --time_limit_s 1"),
    "too few classes": (finish("return torch.nn.Linear(384, 5)"), "expected finite logits (1, 128)"),
    "NaN": (finish("head.bias.data[0] = float('nan')\nreturn head"), "finite logits"),
    "other inputs": (finish("return torch.nn.Linear(5, 128)"), "shapes cannot be multiplied"),
    "reads elsewhere": (finish(f"open({str(Path(__file__))!r})"), "Error: [Errno"),  # not found in bubblewrap, else refused
}


@pytest.mark.parametrize("failure", slow_but(FAILS, ["no module"]))
def test_failing_solutions_score_zero_in_one_line(failure: str, run: SolutionRun) -> None:
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
    where = ["--solution", str(solution), "--output_file", str(tmp_path / "r.json")]
    assert model_loader.main([*TASK_FLAGS, *where, *flags]) == 2
    assert said in capsys.readouterr().err
    assert json.loads((tmp_path / "r.json").read_text())["score"] == 0


def test_draws_are_counted_on_a_terminal_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert draw_progress() is None  # standard error is captured
    reading, writing = os.openpty()
    with open(reading, "rb", buffering=0) as shown, open(writing, "w") as terminal, contextlib.redirect_stderr(terminal):
        show = draw_progress()
        assert show
        show(0, 3)
        show(2, 3)
        assert shown.read(200).split(b"\r\n") == [b"draw 1 of 3", b"draw 3 of 3, 0 s left", b""]


def test_flags_that_must_come_together(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, missing in (([], "--submission_dir, --data_dir"), (TASK_FLAGS, "--solution"),
                               ([*TASK_FLAGS, "--solution", "x", "--compare", "y"], "--compare does not go with --task"),
                               (["--submission_dir", "x", "--data_dir", "y", "--solution", "z"], "without --task")):
        with pytest.raises(SystemExit) as ended:
            model_loader.main(arguments)
        assert ended.value.code == 2 and missing in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    [*TASK_FLAGS, "--solution", "x.py"],
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
