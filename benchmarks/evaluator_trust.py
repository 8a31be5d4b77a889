"""The reliability of the evaluator's verdicts: A against A, and the latency that the sandbox adds.

    python benchmarks/evaluator_trust.py --submission SUBMISSION --data TEST_IMAGES --output results/evaluator_trust.json

Compare a submission with itself many times: every verdict but "cannot be told apart" is a false alarm. Then compare the
submission with the same network as foreign code in the sandbox (only its model.py and weights): the answers must be equal,
and the ratio of the latencies is the cost of separate processes. Both sides are interleaved, so that the ratios are paired.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.evaluation.compare import MARGIN, SAME
from compress.evaluation.evaluate import evaluate_submission
from compress.evaluation.runtimes import EvaluationSettings
from metadata.files import write_json
from metadata.machine import machine, versions


def as_code(submission: Path, folder: Path) -> Path:
    """Write the same network in the original style: its model.py, its weights, loose metadata."""
    folder.mkdir()
    card = json.loads((submission / "model_metadata.json").read_text())
    shutil.copy(submission / "model.py", folder)
    shutil.copy(submission / card["weights_file"], folder / "weights.pth")
    (folder / "metadata.json").write_text(json.dumps({
        "model_format": "pytorch", "model_class": card["architecture"], "preprocessing": card["preprocessing"]}))
    return folder


def compare(one: Path, two: Path, data: Path) -> dict[str, Any]:
    """Return the verdicts of one comparison."""
    result = evaluate_submission(one, data, settings=EvaluationSettings(allow_code=True), compare=two)
    return result["details"]["compare"]  # type: ignore[no-any-return]


def spread(values: list[float]) -> dict[str, float]:
    """Return median, extremes and n."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def main() -> None:
    """Measure and write; see the top of the file."""
    parser = argparse.ArgumentParser(description="A against A, and the sandbox against none.")
    parser.add_argument("--submission", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    same, boxed = [], []
    with tempfile.TemporaryDirectory() as folder:
        code = as_code(options.submission, Path(folder) / "code")
        for round_number in range(options.rounds):
            same.append(compare(options.submission, options.submission, options.data))
            boxed.append(compare(code, options.submission, options.data))
            print(f"round {round_number + 1}/{options.rounds}: A/A {same[-1]['latency']['ratio']:.3f}, "
                  f"sandbox {boxed[-1]['latency']['ratio']:.3f}", flush=True)
    content = {
        "images": same[0]["latency"]["pairs"], "margin": MARGIN,
        "a_against_a": {"latency_ratio": spread([judged["latency"]["ratio"] for judged in same]),
                        "false_alarms": {key: sum(judged[key]["verdict"] != SAME for judged in same)
                                         for key in ("size", "latency", "accuracy")}},
        "sandbox_against_none": {"latency_ratio": spread([judged["latency"]["ratio"] for judged in boxed]),
                                 "in_process_ms": spread([judged["latency"]["second_ms"] for judged in boxed]),
                                 "flip_rate": spread([judged["accuracy"]["flip_rate"] for judged in boxed])},
        "machine": machine(), "versions": versions(),
    }
    write_json(options.output, content)
    print(json.dumps({key: content[key] for key in ("a_against_a", "sandbox_against_none")}, indent=2))


if __name__ == "__main__":
    main()
