"""The 2.5M-parameter synthetic task: train a foreign `Solution` in the sandbox, score the model that it returns.

    python model_loader.py --task imagenet_pareto_2_5m --solution FILE --output_file results.json

The data and the score are those of the public evaluator. The solution's process never has the test split: the inputs are
sent to it once its model stands, in an order of their own, and the labels stay here. The counts of parameters are taken
inside that process, with what was bound before the solution was loaded; code that is bent on it can still forge them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from compress.evaluation.runtimes import EvaluationSettings
from compress.evaluation.sandbox import Child
from compress.evaluation.score import wilson
from compress.evaluation.synthetic import prototype_problem
from metadata.errors import UserError, VerificationError
from metadata.files import sha256
from metadata.machine import machine, versions

TASK = "imagenet_pareto_2_5m"
BASELINE_ACCURACY = 0.85
BATCH_SIZE = 128
SEED = 2025  # of torch and numpy before `solve`, as in the public evaluator
ALONE = 64  # test rows that are asked alone first: an answer must not depend on its batch
PLAUSIBLE = 0.997  # three standard deviations over draws above the Bayes rule of who knows the rows alone


def task_score(accuracy: float, baseline_accuracy: float) -> float:
    """Points above the baseline, 100 for no mistake; not clamped."""
    return (accuracy - baseline_accuracy) / (1 - baseline_accuracy) * 100


def evaluate_solution(solution: Path, param_limit: int, baseline_accuracy: float | None, data_seed: int, threads: int,
                      settings: EvaluationSettings) -> dict[str, Any]:
    """Trains and scores a solution; the result is what `results.json` holds.

    Args:
        solution: a Python file with a class `Solution` whose `solve(train_loader, val_loader, metadata)` returns an
            nn.Module, (N, 384) float32 -> (N, 128) logits.
        param_limit: trainable parameters; one more scores zero.
        baseline_accuracy: a fraction; None is 0.85.
        data_seed: 2025 gives the public data.
        threads: for training and answering.

    Raises:
        UserError: there is no such file, or a setting makes no sense.
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
    inputs, labels = (tensor.numpy() for tensor in problem.test)
    metadata = {"num_classes": problem.num_classes, "input_dim": problem.input_dim, "param_limit": param_limit,
                "baseline_accuracy": baseline, "train_samples": len(problem.train[1]),
                "val_samples": len(problem.validation[1]), "test_samples": len(labels), "device": "cpu"}
    arrays, content = _pack([*problem.train, *problem.validation])
    boot = {"mode": "solution", "arrays": arrays, "metadata": metadata, "seed": SEED, "batch_size": BATCH_SIZE}
    child = Child(boot, {"solution.py": solution}, settings, threads, str(solution), len(content), content)
    try:
        facts = child.facts()
        trainable, stored, hidden = (_count(facts, key, child) for key in ("trainable", "all", "hidden"))
        child.empty_scratch()
        predictions, batch_dependent = _predict(child, inputs, problem.num_classes, solution)
        usage = child.usage()
    finally:
        child.close()

    correct = int((predictions == labels).sum())
    accuracy = correct / len(labels)
    unbounded = task_score(accuracy, baseline)
    over = trainable > param_limit
    warnings = child.unprotected()
    if over:
        warnings.append(f"{trainable:,} trainable parameters are over the limit of {param_limit:,}: the score is 0")
    hides = hidden > 0.01 * param_limit or trainable <= param_limit < trainable + hidden
    if hides:
        warnings.append(f"hidden capacity: {hidden:,} numbers within the model's reach are no trainable parameters "
                        "(buffers, frozen or unregistered tensors)")
    if batch_dependent:
        warnings.append(f"{batch_dependent} of {ALONE} answers differ from those to the row alone: the model adapts to its "
                        "batch")
    implausible = accuracy > PLAUSIBLE and data_seed == 2025
    if implausible:
        warnings.append(f"{100 * accuracy:.2f} % is more than the given rows can teach (98.6 +- 0.3 %): the public data "
                        "can be rebuilt from their seeds; try another --data_seed")
    return {
        "score": 0.0 if over else min(100.0, max(0.0, unbounded)),
        "score_unbounded": 0.0 if over else unbounded,
        "accuracy": accuracy,
        "parameters_trainable": trainable,
        "parameters_all": stored,
        "train_time_seconds": facts["seconds"],
        "details": {
            "status": "ok" if not over else "over the parameter limit",
            "task": TASK,
            "flags": {"hidden_capacity": hides, "batch_dependent": bool(batch_dependent),
                      "implausible": implausible},
            "warnings": warnings,
            "correct": correct, "total": len(labels), "wilson_95": list(wilson(correct, len(labels))),
            "hidden_numbers": hidden, "metadata": metadata, "data_seed": data_seed, "threads": threads,
            "time_limit_s": settings.time_limit_s, "memory_limit_mb": settings.memory_limit_mb,
            "sandbox": {"protection": child.protection, "stated_by_the_code": ["parameters"]} | usage,
            "sha256": {"solution": sha256(solution)},
            "machine": machine(), "versions": versions(),
        },
    }


def _pack(tensors: list[Tensor]) -> tuple[list[dict[str, Any]], bytes]:
    """Tensors one behind the other, and where each lies."""
    arrays, content = [], b""
    for tensor in tensors:
        array = np.ascontiguousarray(tensor.numpy())
        arrays.append({"dtype": str(array.dtype), "count": array.size, "offset": len(content), "shape": list(array.shape)})
        content += array.tobytes()
    return arrays, content


def _count(facts: dict[str, Any], key: str, child: Child) -> int:
    value = facts.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise child.forged()
    return value


def _predict(child: Child, inputs: np.ndarray, classes: int, solution: Path) -> tuple[np.ndarray, int]:
    """The predicted class of every test row, and how many of some rows get another answer in a batch than alone before."""
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
    answer = child.ask(rows)
    if answer.size != len(rows) * classes or not np.isfinite(answer).all():
        raise VerificationError(f"{solution}: the model's answer to {len(rows)} rows has {answer.size} numbers, expected "
                                f"finite logits ({len(rows)}, {classes})")
    return answer.reshape(len(rows), classes)
