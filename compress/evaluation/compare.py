"""Compare two submissions whose calls were interleaved: a verdict each for size, latency and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from compress.evaluation.serve import Answers

RESAMPLES = 2000
BLOCK = 8  # the smallest block: neighbouring calls are correlated, so they are drawn together
FEWEST_PAIRS = 20  # with fewer, the bootstrap's interval is too narrow to be believed
MARGIN = 0.02  # a latency ratio this close to 1 depends on memory placement, not on the model
ALPHA = 0.05
SAME = "cannot be told apart"


def latency_ratio_interval(first_ms: np.ndarray, second_ms: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Return the ratio of the medians of paired calls, and its 95 % interval by a moving block bootstrap over the pairs.

    Args:
        first_ms: (N,) milliseconds in the order of the calls.
        second_ms: (N,) milliseconds of the calls that they were interleaved with.

    Source: Kuensch 1989, "The Jackknife and the Bootstrap for General Stationary Observations".
    """
    count = len(first_ms)
    block = min(max(BLOCK, round(count ** 0.5)), max(1, count // 4))
    starts = np.random.default_rng(seed).integers(0, count - block + 1, (RESAMPLES, -(-count // block)))
    rows = (starts[:, :, None] + np.arange(block)).reshape(RESAMPLES, -1)[:, :count]
    ratios = np.median(first_ms[rows], 1) / np.median(second_ms[rows], 1)
    low, high = np.percentile(ratios, [100 * ALPHA / 2, 100 * (1 - ALPHA / 2)])
    return float(np.median(first_ms) / np.median(second_ms)), float(low), float(high)


def mcnemar(first_right: np.ndarray, second_right: np.ndarray) -> tuple[int, int, float]:
    """Return how many images only the first, and only the second, has right, and the exact two-sided p-value.

    Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions"; exact form.
    """
    only_first = int((first_right & ~second_right).sum())
    only_second = int((~first_right & second_right).sum())
    odd = only_first + only_second
    return only_first, only_second, float(binomtest(only_first, odd).pvalue) if odd else 1.0


def verdicts(results: Sequence[dict[str, Any]], served: Sequence[Answers], labels: np.ndarray) -> dict[str, Any]:
    """Return for size, latency and accuracy whether the first submission is better, worse, or cannot be told apart.

    Args:
        results: of the first and the second submission, as in `results.json`.
        served: their answers to the same images in the same order.
        labels: (N,) class indices of the images.
    """
    first, second = results
    sizes = first["model_size"], second["model_size"]
    size = {"first_mb": sizes[0], "second_mb": sizes[1], "ratio": sizes[0] / sizes[1],
            "verdict": SAME if sizes[0] == sizes[1] else "better" if sizes[0] < sizes[1] else "worse"}

    order = served[0].order
    ratio, low, high = latency_ratio_interval(served[0].first_ms[order], served[1].first_ms[order])
    latency = {"first_ms": float(np.median(served[0].first_ms)), "second_ms": float(np.median(served[1].first_ms)),
               "ratio": ratio, "ratio_95": [low, high], "pairs": len(order), "margin": MARGIN,
               "verdict": SAME if len(order) < FEWEST_PAIRS else "better" if high < 1 - MARGIN
               else "worse" if low > 1 + MARGIN else SAME}

    predictions = [answers.logits.argmax(1) for answers in served]
    right = [predicted == labels for predicted in predictions]
    only_first, only_second, p_value = mcnemar(right[0], right[1])
    accuracy = {"first": float(right[0].mean()), "second": float(right[1].mean()),
                "difference": float(right[0].mean() - right[1].mean()), "only_first_right": only_first,
                "only_second_right": only_second, "mcnemar_p": p_value,
                "flip_rate": float((predictions[0] != predictions[1]).mean()),
                "verdict": SAME if p_value >= ALPHA else "better" if only_first > only_second else "worse"}
    return {"size": size, "latency": latency, "accuracy": accuracy, "second": _summary(second),
            "lines": _table(size, latency, accuracy)}


def confirmed(judged: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """Return the verdicts of a comparison whose latency was told apart, after a second one with new processes.

    Two processes of one network differ by where their memory lies, by more than calls within one process do. So a verdict
    on latency stands only if both comparisons give it.

    Args:
        judged: what `verdicts` returned for the first comparison.
        again: the same for the second.
    """
    latency = judged["latency"] | {"again_ratio": again["latency"]["ratio"], "again_ratio_95": again["latency"]["ratio_95"]}
    if again["latency"]["verdict"] != latency["verdict"]:
        latency["verdict"] = SAME
    return judged | {"latency": latency, "lines": _table(judged["size"], latency, judged["accuracy"])}


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return the second submission's result without the details that both share."""
    shared = ("machine", "versions", "settings")
    return result | {"details": {key: value for key, value in result["details"].items() if key not in shared}}


def _table(size: dict[str, Any], latency: dict[str, Any], accuracy: dict[str, Any]) -> list[str]:
    return [
        "",
        f"{'':10}{'this':>12}{'other':>12}  this one is",
        f"{'size':10}{size['first_mb']:>9.3f} MB{size['second_mb']:>9.3f} MB  {size['verdict']}: {size['ratio']:.3f} times "
        "the bytes",
        f"{'latency':10}{latency['first_ms']:>9.3f} ms{latency['second_ms']:>9.3f} ms  {latency['verdict']}: "
        f"{latency['ratio']:.3f} times the time (95 %: {latency['ratio_95'][0]:.3f} to {latency['ratio_95'][1]:.3f})",
        f"{'accuracy':10}{100 * accuracy['first']:>10.2f} %{100 * accuracy['second']:>10.2f} %  {accuracy['verdict']}: "
        f"{100 * accuracy['difference']:+.2f} points (McNemar p {accuracy['mcnemar_p']:.3g}), "
        f"{100 * accuracy['flip_rate']:.2f} % of answers differ",
        "",
    ]
