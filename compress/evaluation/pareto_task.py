"""The 2.5M-parameter synthetic task: train a foreign `Solution` in the sandbox and score the model that it returns.

    python model_loader.py --task imagenet_pareto_2_5m --solution FILE --output_file results.json

The data and the score are those of the public evaluator. The solution's process never has the test split: its inputs are
sent after training, in a random order, and its labels stay in this process. Parameters are counted inside the solution's
process, with functions that were bound before the solution was loaded; hostile code can still forge the counts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from compress.evaluation.runtimes import EvaluationSettings
from compress.evaluation.sandbox import Child
from compress.evaluation.score import wilson
from compress.evaluation.synthetic import PUBLIC_SEED, Problem, prototype_problem
from metadata.errors import UserError, VerificationError
from metadata.files import sha256
from metadata.machine import machine, versions

TASK = "imagenet_pareto_2_5m"
BASELINE_ACCURACY = 0.85
BATCH_SIZE = 128
SEED = 2025  # of torch and numpy before `solve`, as in the public evaluator
ALONE = 64  # test rows that are asked alone before the batches: an answer must not depend on its batch
PLAUSIBLE = 0.997  # three standard deviations (over draws) above the Bayes rule given the rows


def task_score(accuracy: float, baseline_accuracy: float) -> float:
    """Return the points above the baseline, 100 for no mistake; not clamped."""
    return (accuracy - baseline_accuracy) / (1 - baseline_accuracy) * 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedSolution:
    """A solution's model after its test.

    Args:
        trainable, stored, hidden: counted inside the solution's process: trainable parameters, all numbers within the
            model's reach, and those that are neither trainable parameters nor batch statistics.
        seconds: of `solve`.
        predictions: (N,) class indices of the test rows.
        batch_dependent: how many of `ALONE` rows get another answer in a batch than alone.
        sandbox: protection and usage of the process.
        warnings: for each protection that the system did not offer.
    """

    trainable: int
    stored: int
    hidden: int
    seconds: float
    predictions: np.ndarray
    batch_dependent: int
    sandbox: dict[str, Any]
    warnings: list[str]


def evaluate_solution(solution: Path, param_limit: int, baseline_accuracy: float | None, data_seed: int, threads: int,
                      settings: EvaluationSettings) -> dict[str, Any]:
    """Train and score a solution. Return what `results.json` holds.

    Args:
        solution: a Python file with a class `Solution` whose `solve(train_loader, val_loader, metadata)` returns an
            nn.Module, (N, 384) float32 -> (N, 128) logits.
        param_limit: trainable parameters; one more scores zero.
        baseline_accuracy: a fraction; None is 0.85.
        data_seed: 2025 gives the public data.
        threads: for training and answering.
        settings: limits on time and memory.

    Raises:
        UserError: the file is missing, or a setting is out of range.
        VerificationError: the solution fails, takes too long, or its model does not answer with logits.
    """
    baseline = BASELINE_ACCURACY if baseline_accuracy is None else baseline_accuracy
    settings.check()
    if not solution.is_file():
        raise UserError(f"--solution {solution}: there is no such file")
    if not 0 <= baseline < 1:
        raise UserError(f"--baseline_accuracy: expected a fraction below 1 for this task, got {baseline}")
    if param_limit < 1:
        raise UserError(f"--param_limit: expected at least 1, got {param_limit}")
    if not 0 <= data_seed < 2**31:
        raise UserError(f"--data_seed: expected 0 to 2^31 - 1, got {data_seed}")
    problem = prototype_problem(data_seed)
    metadata = {"num_classes": problem.num_classes, "input_dim": problem.input_dim, "param_limit": param_limit,
                "baseline_accuracy": baseline, "train_samples": len(problem.train[1]),
                "val_samples": len(problem.validation[1]), "test_samples": len(problem.test[1]), "device": "cpu"}
    trained = _train(solution, problem, metadata, threads, settings)
    labels = problem.test[1].numpy()
    correct = int((trained.predictions == labels).sum())
    accuracy = correct / len(labels)
    unbounded = task_score(accuracy, baseline)
    over = trained.trainable > param_limit
    flags = {"hidden_capacity": trained.hidden > 0.01 * param_limit
             or trained.trainable <= param_limit < trained.trainable + trained.hidden,
             "batch_dependent": bool(trained.batch_dependent),
             "implausible": accuracy > PLAUSIBLE and data_seed == PUBLIC_SEED}
    return {
        "score": 0.0 if over else min(100.0, max(0.0, unbounded)),
        "score_unbounded": 0.0 if over else unbounded,
        "accuracy": accuracy,
        "parameters_trainable": trained.trainable,
        "parameters_all": trained.stored,
        "train_time_seconds": trained.seconds,
        "details": {
            "status": "ok" if not over else "over the parameter limit",
            "task": TASK,
            "flags": flags,
            "warnings": _warnings(trained, flags, accuracy, param_limit),
            "correct": correct, "total": len(labels), "wilson_95": list(wilson(correct, len(labels))),
            "hidden_numbers": trained.hidden, "metadata": metadata, "data_seed": data_seed, "threads": threads,
            "time_limit_s": settings.time_limit_s, "memory_limit_mb": settings.memory_limit_mb,
            "sandbox": trained.sandbox,
            "sha256": {"solution": sha256(solution)},
            "machine": machine(), "versions": versions(),
        },
    }


def _train(solution: Path, problem: Problem, metadata: dict[str, Any], threads: int,
           settings: EvaluationSettings) -> TrainedSolution:
    """Train the solution's model in the sandbox, and ask the model for every test row."""
    arrays, content = _pack([*problem.train, *problem.validation])
    boot = {"mode": "solution", "arrays": arrays, "metadata": metadata, "seed": SEED, "batch_size": BATCH_SIZE}
    child = Child(boot, {"solution.py": solution}, settings, threads, str(solution), len(content), content)
    try:
        facts = child.facts()
        trainable, stored, hidden = (_count(facts, key, child) for key in ("trainable", "all", "hidden"))
        child.empty_scratch()
        predictions, batch_dependent = _predict(child, problem.test[0].numpy(), problem.num_classes, solution)
        sandbox = {"protection": child.protection, "stated_by_the_code": ["parameters"]} | child.usage()
    finally:
        child.close()
    return TrainedSolution(trainable=trainable, stored=stored, hidden=hidden, seconds=facts["seconds"],
                           predictions=predictions, batch_dependent=batch_dependent, sandbox=sandbox,
                           warnings=child.unprotected())


def _warnings(trained: TrainedSolution, flags: dict[str, bool], accuracy: float, param_limit: int) -> list[str]:
    warnings = list(trained.warnings)
    if trained.trainable > param_limit:
        warnings.append(f"{trained.trainable:,} trainable parameters are over the limit of {param_limit:,}: the score is "
                        "0")
    if flags["hidden_capacity"]:
        warnings.append(f"hidden capacity: {trained.hidden:,} numbers within the model's reach are no trainable parameters "
                        "(buffers, frozen or unregistered tensors)")
    if flags["batch_dependent"]:
        warnings.append(f"{trained.batch_dependent} of {ALONE} answers differ from those to the row alone: the model "
                        "adapts to its batch")
    if flags["implausible"]:
        warnings.append(f"{100 * accuracy:.2f} % is more than the given rows can teach (98.6 +- 0.3 %): the public data "
                        "can be rebuilt from their seeds; try another --data_seed")
    return warnings


def _pack(tensors: list[Tensor]) -> tuple[list[dict[str, Any]], bytes]:
    """Return where each tensor lies, and the concatenated bytes of all tensors."""
    arrays, content = [], b""
    for tensor in tensors:
        array = np.ascontiguousarray(tensor.numpy())
        arrays.append({"dtype": str(array.dtype), "count": array.size, "offset": len(content), "shape": list(array.shape)})
        content += array.tobytes()
    return arrays, content


def _count(facts: dict[str, Any], key: str, child: Child) -> int:
    """Return a count that the child states. Raise VerificationError for a value that is no count."""
    value = facts.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise child.forged()
    return value


def _predict(child: Child, inputs: np.ndarray, classes: int, solution: Path) -> tuple[np.ndarray, int]:
    """Return the predicted class of every test row, and how many of `ALONE` rows are answered otherwise in a batch."""
    order = np.random.default_rng().permutation(len(inputs))
    alone = {row: _logits(child, inputs[row][None], classes, solution)[0] for row in order[::len(order) // ALONE]}
    predictions, changed = np.empty(len(inputs), np.int64), 0
    for start in range(0, len(inputs), BATCH_SIZE):
        chunk = order[start:start + BATCH_SIZE]
        logits = _logits(child, inputs[chunk], classes, solution)
        predictions[chunk] = logits.argmax(1)
        for row, answer in zip(chunk, logits, strict=True):
            if row in alone and np.abs(answer - alone[row]).max() > 1e-3 * max(1.0, float(np.abs(answer).max())):
                changed += 1
    return predictions, changed


def _logits(child: Child, rows: np.ndarray, classes: int, solution: Path) -> np.ndarray:
    """Return (N, classes) logits. Raise VerificationError for another number of values, or values that are not finite."""
    answer = child.ask(rows)
    if answer.size != len(rows) * classes or not np.isfinite(answer).all():
        raise VerificationError(f"{solution}: the model's answer to {len(rows)} rows has {answer.size} numbers, expected "
                                f"finite logits ({len(rows)}, {classes})")
    return answer.reshape(len(rows), classes)
