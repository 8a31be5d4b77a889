"""The reliability of the evaluator's verdicts, and the price of its walls.

    python benchmarks/evaluator_trust.py --submission SUBMISSION --data TEST_IMAGES --output results/evaluator_trust.json

- A against A: a submission is compared with itself many times; every verdict but "cannot be told apart" is a false alarm.
- Reader against none: the same package is asked in a reader and in this process, call by call in turns. The ratio of the
  times that would count is paired; where its interval does not hold 1, the offset in milliseconds is stated.
- Sandbox against none: the same network as foreign code in bubblewrap, and in the weak sandbox, compared with the package.
- Starts: the seconds until a submission of each kind has answered its first image.
- Before: whole evaluations by another version of the project (`--before FOLDER`, a checkout), in turns with this one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from compress.evaluation.channel import Clock
from compress.evaluation.compare import MARGIN, SAME, latency_ratio_interval
from compress.evaluation.contestant import Contestant
from compress.evaluation.evaluate import evaluate_submission
from compress.evaluation.pictures import decode_pictures, list_test_data
from compress.evaluation.reader_runtime import ReaderRuntime, SubmissionReader
from compress.evaluation.runtimes import EvaluationSettings, open_here
from compress.evaluation.serve import ask
from compress.evaluation.submission import read_submission
from compress.evaluation.walls import bubblewrap_fault
from metadata.files import write_json
from metadata.machine import machine, torch_threads, versions
from tests.helpers.walls import without_bubblewrap

PROJECT = Path(__file__).parents[1]
WARMUP = 20


def as_code(submission: Path, folder: Path) -> Path:
    """Write the same network in the original style: its model.py, its weights, loose metadata."""
    folder.mkdir()
    card = json.loads((submission / "model_metadata.json").read_text())
    shutil.copy(submission / "model.py", folder)
    shutil.copy(submission / card["weights_file"], folder / "weights.pth")
    (folder / "metadata.json").write_text(json.dumps({
        "model_format": "pytorch", "model_class": card["architecture"], "preprocessing": card["preprocessing"]}))
    return folder


def compared(one: Path, two: Path, data: Path, weak: bool = False) -> dict[str, Any]:
    """Return the verdicts of one comparison."""
    settings = EvaluationSettings(allow_code=True, weak_sandbox=weak)
    with without_bubblewrap() if weak else contextlib.nullcontext():
        return evaluate_submission(one, data, settings=settings, compare=two)["details"]["compare"]  # type: ignore[no-any-return]


def spread(values: list[float]) -> dict[str, float]:
    """Return median, extremes and n."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def reader_round(submission: Path, data: Path) -> dict[str, float]:
    """Ask a package in a reader and in this process for every test image, in turns. Return the paired ratio."""
    settings, clock = EvaluationSettings(), Clock(3600)
    files, images = read_submission(submission), list_test_data(data)
    pictures = decode_pictures(images.paths, files.preprocessing, files.input_shape, True, clock)
    reader = SubmissionReader(submission, settings, clock)
    try:
        remote = ReaderRuntime(reader, reader.read().backend)
        local = open_here(files, remote.backend, settings.threads)
        times: list[list[float]] = [[], []]
        with torch_threads(settings.threads):
            for number, image in enumerate(np.random.default_rng().permutation(len(pictures))):
                pixels = pictures.inputs([image])
                turns = (0, 1) if number % 2 else (1, 0)
                took = {turn: ask((remote, local)[turn], pixels, len(images.listing.classes))[1]
                        for turn in turns}
                if number >= WARMUP:
                    times[0].append(took[0])
                    times[1].append(took[1])
        local.close()
        remote.close()
    finally:
        reader.close()
    remote_ms, local_ms = np.array(times[0]), np.array(times[1])
    ratio, low, high = latency_ratio_interval(remote_ms, local_ms)
    return {"ratio": ratio, "low": low, "high": high, "in_process_ms": float(np.median(local_ms)),
            "offset_ms": float(np.median(remote_ms - local_ms))}


def start_seconds(folder: Path, data: Path, weak: bool = False) -> float:
    """Return the seconds from nothing to the first answer; the nursery runs already."""
    images = list_test_data(data)
    few = type(images)(listing=images.listing, paths=images.paths[:1], labels=images.labels[:1])
    settings = EvaluationSettings(allow_code=True, weak_sandbox=weak)
    with without_bubblewrap() if weak else contextlib.nullcontext():
        start = time.perf_counter()
        with Contestant(folder, settings) as entry:
            entry.prepare(few)
            entry.open(few)
            ask(entry.runtime, entry.pictures.inputs([0]), len(entry.order.names))
            return time.perf_counter() - start


def whole_seconds(project: Path, submission: Path, data: Path, folder: Path) -> float:
    """Return the seconds of one evaluation by the command line of a checkout."""
    command = [sys.executable, str(project / "model_loader.py"), "--submission_dir", str(submission), "--data_dir",
               str(data), "--output_file", str(folder / "results.json")]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.perf_counter() - start


def repeated(rounds: int, what: str, measure: dict[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """Measure several things in turns, each round in the other order."""
    found: dict[str, list[Any]] = {name: [] for name in measure}
    for number in range(rounds):
        for name in measure if number % 2 else reversed(measure):
            found[name].append(measure[name]())
        print(f"{what}, round {number + 1}/{rounds}", flush=True)
    return found


def of_latency(judged: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the spread of a comparison's latencies and answers."""
    return {"latency_ratio": spread([each["latency"]["ratio"] for each in judged]),
            "in_reader_ms": spread([each["latency"]["second_ms"] for each in judged]),
            "flip_rate": spread([each["accuracy"]["flip_rate"] for each in judged])}


def main() -> None:
    """Measure and write; see the top of the file."""
    parser = argparse.ArgumentParser(description="The evaluator's verdicts, and the price of its walls.")
    parser.add_argument("--submission", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--onnx", type=Path, help="an ONNX submission, whose start is measured too")
    parser.add_argument("--before", type=Path, help="a checkout of an earlier version, whose evaluations are timed too")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    package, data, rounds = options.submission, options.data, options.rounds
    walled = not bubblewrap_fault()
    with tempfile.TemporaryDirectory() as name:
        folder, code = Path(name), as_code(package, Path(name) / "code")
        kinds = {"package": package, "code": code} | ({"onnx": options.onnx} if options.onnx else {})
        judged = repeated(rounds, "comparisons", {
            "same": lambda: compared(package, package, data), "weak": lambda: compared(code, package, data, weak=True),
            **({"bubblewrap": lambda: compared(code, package, data)} if walled else {})})
        readers = repeated(rounds, "reader against none", {"reader": lambda: reader_round(package, data)})["reader"]
        starts = repeated(rounds, "starts", {
            **{kind: partial(start_seconds, where, data, weak=not walled) for kind, where in kinds.items()},
            "code, weak": lambda: start_seconds(code, data, weak=True)})
        whole = repeated(rounds, "whole evaluations", {
            side: partial(whole_seconds, project, package, data, folder)
            for side, project in {"now": PROJECT, "before": options.before}.items() if project})
    content: dict[str, Any] = {
        "images": judged["same"][0]["latency"]["pairs"], "margin": MARGIN,
        "a_against_a": {"latency_ratio": spread([each["latency"]["ratio"] for each in judged["same"]]),
                        "false_alarms": {key: sum(each[key]["verdict"] != SAME for each in judged["same"])
                                         for key in ("size", "latency", "accuracy")}},
        "reader_against_none": {
            "latency_ratio": spread([each["ratio"] for each in readers]),
            "told_apart": sum(not each["low"] <= 1 <= each["high"] for each in readers),
            "offset_ms": spread([each["offset_ms"] for each in readers]),
            "in_process_ms": spread([each["in_process_ms"] for each in readers])},
        "code_against_package": {side: of_latency(judged[side]) for side in ("bubblewrap", "weak") if side in judged},
        "start_seconds": {kind: spread(seconds) for kind, seconds in starts.items()},
        "whole_evaluation_seconds": {side: spread(seconds) for side, seconds in whole.items()},
        "machine": machine(), "versions": versions(),
    }
    write_json(options.output, content)
    print(json.dumps({key: content[key] for key in content if key not in ("machine", "versions")}, indent=2))


if __name__ == "__main__":
    main()
