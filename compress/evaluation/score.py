"""Turn answers and times into scores: intervals, percentiles, the plain total and the guarded one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from compress.evaluation.runtimes import EvaluationSettings
from metadata.schemas import Baselines

RATIO_CAP = 10.0  # no single ratio may buy more than this in the guarded score
PERCENTILES = {"p5_ms": (5, 130), "p90_ms": (90, 64), "p95_ms": (95, 130), "p99_ms": (99, 662)}


def latency_details(durations: Sequence[float] | np.ndarray, settings: EvaluationSettings) -> dict[str, Any]:
    """Return the mean, the median and the percentiles that the number of runs can tell, as point estimates.

    Source: MLPerf Inference rules, early stopping: with 64, 130 or 662 runs the second largest bounds p90, p95 or p99 from
    above at 99 % confidence; with fewer none of them is given.
    """
    n = len(durations)
    details: dict[str, Any] = {"mean_ms": float(np.mean(durations)), "median_ms": float(np.median(durations))}
    missing = {}
    for key, (percentile, needed) in PERCENTILES.items():
        details[key] = float(np.percentile(durations, percentile)) if n >= needed else None
        if n < needed:
            missing[key] = f"needs {needed} runs, got {n}"
    return details | {"not_given": missing, "runs": n, "warmup": settings.warmup, "threads": settings.threads,
                      "batch_size": 1}


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of the fraction correct / total.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    z = 1.959963984540054
    centre = (correct + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * math.sqrt(correct * (total - correct) / total + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_details(logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str], batch_size: int) -> dict[str, Any]:
    """Return counts, interval, top-5 accuracy and the counts of every class. Ties in the top 5 count against the model.

    The worst class is one of those that have images.

    Args:
        logits: (N, classes).
        labels: (N,) class indices.
        class_names: the names of the classes, in the order of the logits.
        batch_size: of the calls that gave the logits; stated in the details.
    """
    predictions = logits.argmax(1)
    right = predictions == labels
    per_class = {name: {"correct": int(right[labels == index].sum()), "total": int((labels == index).sum())}
                 for index, name in enumerate(class_names)}
    seen = [name for name, counts in per_class.items() if counts["total"]]
    worst = min(seen, key=lambda name: per_class[name]["correct"] / per_class[name]["total"])
    rank = (logits >= logits[np.arange(len(labels)), labels][:, None]).sum(1)
    correct, total = int(right.sum()), len(labels)
    return {"correct": correct, "total": total, "fraction": correct / total, "wilson_95": list(wilson(correct, total)),
            "top5_fraction": float((rank <= 5).mean()) if len(class_names) > 5 else None,
            "worst_class": {"name": worst, **per_class[worst]}, "per_class": per_class, "batch_size": batch_size,
            "predictions_sha256": hashlib.sha256(bytes(str(predictions.tolist()), "ascii")).hexdigest()}


def score(size_mb: float, latency_ms: float, accuracy_percent: float, baselines: Baselines) -> dict[str, float]:
    """Return the four scores: the ratios to the baselines, and 0.3 size + 0.3 latency + 0.4 accuracy."""
    size, latency = baselines.size_mb / size_mb, baselines.latency_ms / latency_ms
    accuracy = accuracy_percent / baselines.accuracy
    return {"size_score": size, "latency_score": latency, "accuracy_score": accuracy,
            "total_score": 0.3 * size + 0.3 * latency + 0.4 * accuracy}


def guarded_score(scores: dict[str, float], accuracy: float, baseline_accuracy: float, chance: float, floor: float = 0.0,
                  lower: float | None = None) -> float:
    """Return the score that a useless model cannot win: small and fast count only as far as the model is right.

        skill = (accuracy - chance) / (max(baseline_accuracy, chance + (1 - chance) / 10) - chance)
        guarded = min(skill, 1) * (0.3 min(size, cap) + 0.3 min(latency, cap)) + 0.4 min(skill, cap)

    The plain ratios are unbounded, and a public competition was won by a tiny network that guessed. So each ratio is
    capped at RATIO_CAP, and size and latency are multiplied by the share of the baseline's skill that the model keeps.
    The score is zero where `lower` is not above chance, or the accuracy is below `floor`.

    Args:
        scores: `size_score` and `latency_score`.
        accuracy: a fraction, like all accuracies here.
        baseline_accuracy: the baseline's accuracy.
        chance: the accuracy of the best constant answer.
        floor: the least accuracy that scores.
        lower: the lower end of the accuracy's interval; the accuracy itself unless given.
    """
    if (accuracy if lower is None else lower) <= chance or accuracy < floor:
        return 0.0
    reference = max(baseline_accuracy, chance + (1 - chance) / 10)  # a baseline that guesses is no yardstick
    skill = (accuracy - chance) / max(reference - chance, 1e-9)
    size, latency = min(scores["size_score"], RATIO_CAP), min(scores["latency_score"], RATIO_CAP)
    return min(skill, 1.0) * (0.3 * size + 0.3 * latency) + 0.4 * min(skill, RATIO_CAP)


RESULT_KEYS = ("model_size", "latency", "accuracy", "size_score", "latency_score", "accuracy_score", "total_score")
TASK_KEYS = ("score", "score_unbounded", "accuracy", "parameters_trainable", "parameters_all", "train_time_seconds")
