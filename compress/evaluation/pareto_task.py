"""The 2.5M-parameter synthetic task: train a foreign `Solution` in the sandbox and score the model that it returns.

    python model_loader.py --task imagenet_pareto_2_5m --solution FILE --output_file results.json
    python model_loader.py --task imagenet_pareto_2_5m --solution FILE --draws 5 --secret

The public data and the score are those of the public evaluator. A process in the sandbox trains the model and leaves it as
bytes, whose number is limited. The process ends. New ones, each with a folder of its own, get these bytes and nothing else.
Our own code there counts what the bytes hold (inventory.py) before anything in them runs. Then the model is made from the
bytes and asked for the test rows, in a way that gives nothing to a model that learns from what it is asked
(task_answers.py). The labels stay in the evaluator's process.

Whoever knows the seed of a draw can rebuild its test rows. Secret draws come from a salt that is drawn for the evaluation
and written into the result. `details.guarded_score` is given for these alone, and is 0 where a flag is set.
"""

from __future__ import annotations

import dataclasses
import secrets
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from compress.evaluation.measure import Progress
from compress.evaluation.plausibility import IMPLAUSIBLE, at_least, bayes_distribution
from compress.evaluation.runtimes import EvaluationSettings
from compress.evaluation.sandbox import Child
from compress.evaluation.score import TASK_KEYS, wilson
from compress.evaluation.synthetic import PUBLIC_SEED, Problem, data_sha256, prototype_problem, secret_problem
from compress.evaluation.task_answers import BATCH_SIZE, answer_alone, count_in
from metadata.errors import UserError, VerificationError
from metadata.files import sha256
from metadata.machine import machine, versions

TASK = "imagenet_pareto_2_5m"
BASELINE_ACCURACY = 0.85
SEED = 2025  # of torch and numpy before `solve`, as in the public evaluator
SALT_BYTES = 16
DRAWS, MOST_DRAWS = 5, 100
MOST_PARAMETERS = 10**9
CODE_BYTES = 2**16  # of the pickle and the source that do not count as hidden numbers
HIDDEN_SHARE, STATISTICS_SHARE = 0.01, 0.05  # of the parameter limit: hidden numbers, and statistics that are not hidden


def task_score(accuracy: float, baseline_accuracy: float) -> float:
    """Return the points above the baseline, 100 for no mistake; not clamped."""
    return (accuracy - baseline_accuracy) / (1 - baseline_accuracy) * 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """Which data a solution is trained and tested on.

    Args:
        data_seed: of the one public draw; 2025 gives the public evaluator's data.
        salt: 16 bytes; None for the public draw.
        number: of draws from the salt.
        repeated: the salt comes from the user, so a solution may have been made for it.
    """

    data_seed: int = PUBLIC_SEED
    salt: bytes | None = None
    number: int = 1
    repeated: bool = False

    def problems(self) -> list[Callable[[], Problem]]:
        """Return what makes the problem of each draw."""
        if (salt := self.salt) is None:
            return [lambda: prototype_problem(self.data_seed)]
        return [lambda draw=draw: secret_problem(salt, draw) for draw in range(self.number)]  # type: ignore[misc]


def chosen_draws(data_seed: int | None, draws: int | None, secret: bool, salt: str | None) -> Draws:
    """Return the draws that the flags ask for.

    Args:
        data_seed: of a public draw; None is the public evaluator's.
        draws: how many secret ones; None is 5.
        secret: draw a new salt.
        salt: 32 hex digits, to repeat an evaluation.

    Raises:
        UserError: the flags contradict each other, or a value is out of range.
    """
    if not secret and salt is None:
        if draws is not None:
            raise UserError("--draws: expected --secret beside it, or --salt HEX to repeat an evaluation")
        seed = PUBLIC_SEED if data_seed is None else data_seed
        if not 0 <= seed < 2**31:
            raise UserError(f"--data_seed: expected 0 to 2^31 - 1, got {seed}")
        return Draws(data_seed=seed)
    if secret and salt is not None:
        raise UserError("--secret draws a new salt, and --salt repeats an old one: give one of the two")
    if data_seed is not None:
        raise UserError("--data_seed is for a public draw, and does not go with --secret or --salt")
    number = DRAWS if draws is None else draws
    if not 1 <= number <= MOST_DRAWS:
        raise UserError(f"--draws: expected 1 to {MOST_DRAWS}, got {number}")
    if salt is None:
        return Draws(salt=secrets.token_bytes(SALT_BYTES), number=number)
    if len(salt) != 2 * SALT_BYTES or not set(salt.lower()) <= set("0123456789abcdef"):
        raise UserError(f"--salt: expected the {2 * SALT_BYTES} hex digits from a result's details, got {salt[:80]!r}")
    return Draws(salt=bytes.fromhex(salt), number=number, repeated=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What stays the same from draw to draw.

    Args:
        solution: a Python file with a class `Solution` whose `solve(train_loader, val_loader, metadata)` returns an
            nn.Module, (N, 384) float32 -> (N, 128) logits.
        param_limit: trainable parameters; one more scores zero.
        baseline_accuracy: a fraction.
        threads: for training and answering.
        settings: limits on time and memory, for each draw.
    """

    solution: Path
    param_limit: int
    baseline_accuracy: float
    threads: int
    settings: EvaluationSettings

    def metadata(self, problem: Problem) -> dict[str, Any]:
        """Return what `solve` is told."""
        return {"num_classes": problem.num_classes, "input_dim": problem.input_dim, "param_limit": self.param_limit,
                "baseline_accuracy": self.baseline_accuracy, "train_samples": len(problem.train[1]),
                "val_samples": len(problem.validation[1]), "test_samples": len(problem.test[1]), "device": "cpu"}


def evaluate_solution(solution: Path, param_limit: int, baseline_accuracy: float | None, draws: Draws, threads: int,
                      settings: EvaluationSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Train and score a solution on each draw. Return what `results.json` holds.

    With several draws the keys at the top are means over the draws; the two numbers of parameters are the largest.

    Args:
        solution: see `Task`.
        param_limit: see `Task`.
        baseline_accuracy: see `Task`; None is 0.85.
        draws: the data.
        threads: for training and answering.
        settings: limits on time and memory, for each draw.
        progress: called before each draw with the number of draws done and their total.

    Raises:
        UserError: the file is missing, or a setting is out of range.
        VerificationError: the solution fails or takes too long, its model cannot be served, or does not answer with logits.
    """
    baseline = BASELINE_ACCURACY if baseline_accuracy is None else baseline_accuracy
    settings.check()
    if not solution.is_file():
        raise UserError(f"--solution {solution}: there is no such file")
    if not 0 <= baseline < 1:
        raise UserError(f"--baseline_accuracy: expected a fraction below 1 for this task, got {baseline}")
    if not 1 <= param_limit <= MOST_PARAMETERS:
        raise UserError(f"--param_limit: expected 1 to {MOST_PARAMETERS:,}, got {param_limit:,}")
    task = Task(solution=solution, param_limit=param_limit, baseline_accuracy=baseline, threads=threads, settings=settings)
    rows, distribution, metadata = [], np.ones(1), {}
    for index, make in enumerate(draws.problems()):
        if progress:
            progress(index, draws.number)
        problem = make()
        metadata = task.metadata(problem)
        chances = bayes_distribution(problem)
        place = f" (draw {index + 1} of {draws.number})" if draws.salt else ""
        try:
            rows.append(_evaluate_draw(task, problem, chances, draws.number, place))
        except VerificationError as error:
            if draws.salt is None:
                raise
            # The salt is no secret any more, and only who knows it can look into what failed.
            raise VerificationError(f"{error}; --salt {draws.salt.hex()} repeats the evaluation") from error
        distribution = np.convolve(distribution, chances)
    correct, total = (sum(row[key] for row in rows) for key in ("correct", "total"))
    probability = at_least(distribution, correct)
    flags = {flag: any(row["flags"][flag] for row in rows) for flag in rows[0]["flags"]}
    flags["implausible"] |= probability < IMPLAUSIBLE
    over = [row for row in rows if row["parameters_trainable"] > param_limit]
    score = statistics.fmean(row["score"] for row in rows)
    fresh = draws.salt is not None and not draws.repeated
    details = {
        "status": "ok" if not over else "over the parameter limit",
        "task": TASK,
        "data": "secret" if fresh else "repeated" if draws.salt else "public",
        "flags": flags,
        "guarded_score": (0.0 if any(flags.values()) else score) if fresh else None,
        "warnings": _warnings(rows, flags, draws, param_limit, probability),
        "correct": correct, "total": total, "wilson_95": list(wilson(correct, total)),
        "probability_under_bayes": probability, "metadata": metadata, "threads": threads,
        "time_limit_s": settings.time_limit_s, "memory_limit_mb": settings.memory_limit_mb,
        "sha256": {"solution": sha256(solution)}, "machine": machine(), "versions": versions()}
    if draws.salt is None:
        details = {key: value for key, value in rows[0].items() if key not in TASK_KEYS} | details
        details["data_seed"] = draws.data_seed
    else:
        details |= {"salt": draws.salt.hex(), "draws": rows,
                    "over_draws": {key: _spread([row[key] for row in rows]) for key in ("accuracy", "score")}}
    return {
        "score": score, **{key: statistics.fmean(row[key] for row in rows) for key in ("score_unbounded", "accuracy")},
        **{key: max(row[key] for row in rows) for key in ("parameters_trainable", "parameters_all")},
        "train_time_seconds": statistics.fmean(row["train_time_seconds"] for row in rows),
        "details": details}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None,
            "worst": min(values), "n": len(values)}


# -------------------------------------------------------------------------------------------------------- one draw


def _evaluate_draw(task: Task, problem: Problem, chances: np.ndarray, draws: int, place: str) -> dict[str, Any]:
    """Train the solution on one draw, count what its model holds, and let the model answer the test rows in a new process.

    Args:
        task: the solution and its limits.
        problem: the draw.
        chances: of each number of right answers, for the Bayes rule.
        draws: how many draws there are, each of which may seem implausible by chance.
        place: which draw, for messages.
    """
    source_bytes = task.solution.stat().st_size
    most = 2 * 4 * task.param_limit + CODE_BYTES
    why = (f"together {most:,} are allowed: twice what {task.param_limit:,} float32 numbers need, and {CODE_BYTES:,} for "
           "code")
    if source_bytes > most:
        raise VerificationError(f"{task.solution}{place}: the source takes {source_bytes:,} bytes without a model; {why}")
    content, seconds, training = _train(task, problem, most, why, place)
    if len(content) + source_bytes > most:
        raise VerificationError(f"{task.solution}{place}: the model takes {len(content):,} bytes and its source "
                                f"{source_bytes:,}; {why}")
    answers = answer_alone(content, problem.test[0].numpy(), problem.num_classes, task.settings, task.threads,
                           f"{task.solution}{place}: its model, in a new process", SEED)
    counts = model_counts(answers.held, answers.stated, task.param_limit, source_bytes)
    labels = problem.test[1].numpy()
    correct = int((answers.classes == labels).sum())
    accuracy, probability = correct / len(labels), at_least(chances, correct)
    unbounded = 0.0 if counts["parameters_trainable"] > task.param_limit else task_score(accuracy, task.baseline_accuracy)
    return {"score": min(100.0, max(0.0, unbounded)), "score_unbounded": unbounded, "accuracy": accuracy,
            **{key: counts.pop(key) for key in ("parameters_trainable", "parameters_all")}, "train_time_seconds": seconds,
            "correct": correct, "total": len(labels),
            "expected_under_bayes": float(chances @ np.arange(len(chances))), "probability_under_bayes": probability,
            "flags": {"hidden_capacity": counts.pop("hidden_capacity"),
                      "batch_dependent": answers.changed + answers.changed_in_batches > 0,
                      "implausible": probability < IMPLAUSIBLE / draws},
            "changed_rows": {"in_another_order": answers.changed, "in_batches": answers.changed_in_batches},
            "accuracy_in_batches": float((answers.classes_in_batches == labels).mean()), **counts,
            "data_sha256": data_sha256(problem),
            "sandbox": {"protection": answers.protection, "training": training, "answering": answers.usage},
            "unprotected": answers.unprotected}


def _train(task: Task, problem: Problem, most: int, why: str, place: str) -> tuple[bytes, float, dict[str, Any]]:
    """Return the serialised model that the solution trains, the seconds it took, and the process's usage."""
    arrays, rows = _pack([*problem.train, *problem.validation])
    boot = {"mode": "solution", "arrays": arrays, "metadata": task.metadata(problem), "seed": SEED,
            "batch_size": BATCH_SIZE, "most_bytes": most, "most_words": why}
    child = Child(boot, {"solution.py": task.solution}, task.settings, task.threads, f"{task.solution}{place}",
                  max(len(rows), most), rows)
    try:
        facts = child.facts()
        content = child.left_in_memory(count_in(facts, "bytes", child))
        return content, facts["seconds"], child.usage()
    finally:
        child.close()


def model_counts(held: dict[str, Any], stated: int, param_limit: int, source_bytes: int) -> dict[str, Any]:
    """Return the counts of a serialised model.

    The bytes decide, so no pickle can hide numbers from the flag: all that is stored is a trainable parameter, a running
    statistic within 5 % of the limit, code within `CODE_BYTES`, or hidden.

    Args:
        held: what `inventory.take_inventory` found.
        stated: the trainable parameters that the model itself states; this can only raise the count.
        param_limit: trainable parameters.
        source_bytes: the length of the solution's file.
    """
    trainable = max(held["trainable"], stated)
    parameter_bytes = held["trainable_bytes"] + min(held["elsewhere_bytes"], 4 * (trainable - held["trainable"]))
    statistics_bytes = min(held["statistics_bytes"], int(4 * STATISTICS_SHARE * param_limit))
    code_bytes = max(0, held["other_bytes"] + source_bytes - CODE_BYTES)
    rest = held["storage_bytes"] - statistics_bytes + code_bytes
    hidden = max(0, rest - parameter_bytes) // 4
    return {"parameters_trainable": trainable, "parameters_all": trainable + statistics_bytes // 4 + hidden,
            "hidden_numbers": hidden, "serialised_bytes": held["storage_bytes"] + held["other_bytes"],
            "source_bytes": source_bytes,
            # the second half of float64 parameters is not hidden, but must have its place below the limit
            "hidden_capacity": hidden > HIDDEN_SHARE * param_limit or trainable <= param_limit < max(trainable + hidden,
                                                                                                     rest // 4)}


def _warnings(rows: Sequence[dict[str, Any]], flags: dict[str, bool], draws: Draws, param_limit: int,
              probability: float) -> list[str]:
    warnings = list(rows[0]["unprotected"])
    worst = max(rows, key=lambda row: row["parameters_trainable"])
    if worst["parameters_trainable"] > param_limit:
        warnings.append(f"{worst['parameters_trainable']:,} trainable parameters are over the limit of {param_limit:,}: "
                        "the score is 0")
    if flags["hidden_capacity"]:
        warnings.append(f"hidden capacity: {max(row['hidden_numbers'] for row in rows):,} numbers (4 bytes each) that the "
                        "model brings are no trainable parameters (buffers, frozen or unregistered tensors, constants in "
                        "code), or float64 parameters need the place of more than the limit")
    if flags["batch_dependent"]:
        again, batched = (sum(row["changed_rows"][key] for row in rows) for key in ("in_another_order", "in_batches"))
        accuracy = statistics.fmean(row["accuracy_in_batches"] for row in rows)
        warnings.append(f"{again:,} answers change with the rows asked before, and {batched:,} with the other rows of a "
                        "batch: the model adapts to what it is asked. The score is that of rows asked alone; in batches "
                        f"{100 * accuracy:.2f} % are right")
    if flags["implausible"]:
        correct, total = (sum(row[key] for row in rows) for key in ("correct", "total"))
        warnings.append(f"{correct:,} of {total:,} right is more than the given rows can teach: the Bayes rule expects "
                        f"{sum(row['expected_under_bayes'] for row in rows):,.0f}, and is right so often with a "
                        f"probability of {probability:.1g}")
    if draws.salt is None:
        warnings.append("a public draw can be looked up: its test rows follow from the seed, so this score proves nothing "
                        f"about a solution that does so; --draws {DRAWS} --secret evaluates on draws that no solution "
                        "knows")
    elif draws.repeated:
        warnings.append("the salt was known before this evaluation: it repeats an earlier one, and proves nothing about a "
                        "solution that was made after it")
    return warnings


def _pack(tensors: list[Tensor]) -> tuple[list[dict[str, Any]], bytes]:
    """Return where each tensor lies, and the concatenated bytes of all tensors."""
    arrays, content = [], b""
    for tensor in tensors:
        array = np.ascontiguousarray(tensor.numpy())
        arrays.append({"dtype": str(array.dtype), "count": array.size, "offset": len(content), "shape": list(array.shape)})
        content += array.tobytes()
    return arrays, content
