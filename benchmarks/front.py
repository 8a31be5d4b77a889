"""The front on CIFAR-10: accuracy against bytes and milliseconds, beside MLPerf Tiny's networks.

    python -m benchmarks.front package --data_root DIR --trained OUT --runs DIR [--only NAME ...]
    python -m benchmarks.front time --runs DIR --networks DIR
    python -m benchmarks.front draw

`package` takes the students of `benchmarks.front_training` in OUT through the rest of their recipes, on this machine:
quantization, package, evaluation on the 10,000 test images. `time` measures the packages interleaved with MLPerf
Tiny's networks on one thread, each on the runtimes that take its file; give it a quiet machine. Both write into
benchmarks/results/front.json, and `draw` makes front.png and front.md of it. The recipes and their settings were chosen on
validation images; the test images are opened once for each package.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from scipy.stats import binom

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.front_training import TRAINING_STAGES
from benchmarks.mlperf_tiny import METADATA, NETWORKS
from compress.evaluation.litert_runtime import LitertRuntime, to_grid
from compress.evaluation.runtime import FileRuntime
from compress.evaluation.runtimes import BACKENDS, open_here
from compress.evaluation.score import wilson
from compress.evaluation.submission import read_submission
from compress.pipeline.config import read_recipe, resolve
from compress.pipeline.run import run_pipeline
from metadata.errors import UserError, VerificationError
from metadata.files import write_atomically, write_json
from metadata.formats import write_figure
from metadata.machine import machine, versions

RESULTS = Path(__file__).parent / "results"
RECORD = RESULTS / "front.json"
REFERENCE = "pretrainedResnet_quant.tflite"
ROUNDS, RUNS, WARMUP = 60, 20, 20


def read_record() -> dict[str, Any]:
    """Return the record, empty where there is none."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"schema": 1, "packages": {}, "times": {}}


def rest_of(recipe: str, trained: Path, folder: Path) -> Path:
    """Write a recipe of the stages after training, which begins with the student that was trained last; return its path."""
    stages = read_recipe(recipe)["stages"]
    names = [next(iter(entry)) for entry in stages]
    last = max(index for index, name in enumerate(names) if name in TRAINING_STAGES)
    content = {"data": {"name": "cifar10"},
               "stages": [{"student": {"model": f"folder:{(trained / names[last]).resolve()}"}}, *stages[last + 1:]]}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{recipe}.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False))
    return path


def package(arguments: argparse.Namespace) -> None:
    """Package and score what the record lacks."""
    record = read_record()
    for trained in sorted(path.parent for path in arguments.trained.glob("*/distill")):
        name = trained.name
        recipe, _, seed = name.rpartition("-")
        if name in record["packages"] or (arguments.only and name not in arguments.only):
            continue
        path = rest_of(recipe, trained, arguments.runs / "recipes")
        config = resolve(str(path), [("data.root", arguments.data_root), ("run_dir", arguments.runs), ("name", name),
                                     ("device", "cpu"), ("threads", 1)])
        try:
            outcome = run_pipeline(config, Console())
        except (UserError, VerificationError) as error:  # the others go on
            print(f"{name}: {error}", file=sys.stderr)
            continue
        assert outcome.results is not None
        details = outcome.results["details"]
        accuracy = details["accuracy"]
        training = trained / "trained.json"
        record["packages"][name] = {
            "recipe": recipe, "seed": int(seed), "bytes": details["bytes"]["weights"],
            "parameters": details["parameters"]["all"], "macs": details["macs"], "backend": details["backend"],
            "correct": accuracy["correct"], "images": accuracy["total"], "wilson_95": accuracy["wilson_95"],
            "float_validation": next(row.accuracy for row in outcome.rows if row.stage == "student"),
            "training": json.loads(training.read_text()) if training.exists() else None,
            "machine": machine(), "versions": versions()}
        write_json(RECORD, record)


# ------------------------------------------------------------------------------------------------------------- times


def classifier(folder: Path, backend: str) -> Callable[[], Any]:
    """Return a call that classifies one image with the file in a folder, on one thread.

    The image lies as the file takes it, and in the file's type: what a caller must convert is not on LiteRT's clock.
    """
    files = read_submission(folder)
    runtime = open_here(files, backend, 1)
    channels, height, width = files.input_shape
    image = np.random.default_rng(0).random((1, channels, height, width), np.float32)
    if not isinstance(runtime, FileRuntime):
        return lambda: runtime(image)
    if runtime.channels_last:
        image = np.ascontiguousarray(image.transpose(0, 2, 3, 1))
    if not isinstance(runtime, LitertRuntime):
        return lambda: runtime.run(image)
    ready, interpreter, output = to_grid(image, runtime.file.input), runtime.interpreter, runtime.output

    def invoke() -> None:
        interpreter.set_tensor(runtime.input, ready)
        interpreter.invoke()
        interpreter.get_tensor(output)
    return invoke


def measure_times(arguments: argparse.Namespace) -> None:
    """Time every package on each of its runtimes, interleaved with MLPerf Tiny's networks."""
    record = read_record()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        calls = {}
        for file in NETWORKS:
            own = Path(folder) / file.partition(".")[0]
            own.mkdir()
            shutil.copy(arguments.networks / file, own / "model.tflite")
            write_json(own / "metadata.json", METADATA)
            calls[file] = classifier(own, "litert")
        first = {name for name in record["packages"] if name.endswith("-0")}  # other seeds are networks of the same shape
        for name in sorted(first):
            submission = arguments.runs / name / "submission"
            for backend in BACKENDS[read_submission(submission).kind]:
                calls[f"{name} {backend}"] = classifier(submission, backend)
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(-2, ROUNDS):
            for name, call in calls.items():
                started = time.perf_counter_ns()
                for _ in range(RUNS):
                    call()
                if turn >= 0:
                    taken[name].append((time.perf_counter_ns() - started) / 1e6 / RUNS)
    record["times"] = {"rounds": ROUNDS, "runs": RUNS, "threads": 1, "machine": machine(), "versions": versions(), "rows": {
        name: {"median_ms": statistics.median(times), "p5_ms": float(np.percentile(times, 5)),
               "p95_ms": float(np.percentile(times, 95)), **ratio_to(times, taken[REFERENCE])}
        for name, times in taken.items()}}
    write_json(RECORD, record)


def ratio_to(times: list[float], reference: list[float]) -> dict[str, Any]:
    """Return the median of the rounds' ratios, with the interval of that median by order statistics (95 %)."""
    ratios = sorted(ours / theirs for ours, theirs in zip(times, reference, strict=True))
    low, high = binom.ppf((0.025, 0.975), len(ratios), 0.5).astype(int)
    return {"ratio": statistics.median(ratios), "ratio_95": [ratios[low], ratios[min(high, len(ratios) - 1)]]}


# ------------------------------------------------------------------------------------------------------ what one sees


def points(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each recipe, over its seeds, and for each of MLPerf Tiny's networks, the smallest first."""
    rows = []
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for package in record["packages"].values():
        by_recipe.setdefault(package["recipe"], []).append(package)
    times = record["times"].get("rows", {})
    for recipe, packages in by_recipe.items():
        correct, images = (sum(package[key] for package in packages) for key in ("correct", "images"))
        own = {name.partition(" ")[2]: row for name, row in times.items() if name.startswith(f"{recipe}-0 ")}
        best = min(own, key=lambda name: own[name]["median_ms"], default="")
        each = [package["correct"] / package["images"] for package in packages]
        rows.append({"name": recipe, "ours": True, "bytes": max(package["bytes"] for package in packages),
                     "parameters": packages[0]["parameters"], "macs": packages[0]["macs"], "seeds": len(packages),
                     "accuracy": correct / images, "deviation": statistics.stdev(each) if len(each) > 1 else None,
                     "interval": wilson(round(correct / len(packages)), packages[0]["images"]), "runtime": best,
                     **own.get(best, {})})
    for file, network in json.loads((RESULTS / "mlperf_tiny.json").read_text()).items():
        rows.append({"name": f"MLPerf Tiny {NETWORKS[file]}", "ours": False, "bytes": network["bytes"],
                     "parameters": network["parameters"], "macs": network["macs"], "seeds": 1, "deviation": None,
                     "accuracy": network["accuracy"], "interval": network["wilson_95"], "runtime": "litert",
                     **times.get(file, {})})
    return sorted(rows, key=lambda row: row["bytes"])


def draw() -> None:
    """Write front.md and front.png."""
    record = read_record()
    rows, timed = points(record), record["times"]
    lines = ["# The front on CIFAR-10", "",
             "Test accuracy on 10,000 images: the mean over the seeds, with their standard deviation; the interval is "
             "Wilson's, 95 %, of one package's images. Bytes are those of the weights file, as the evaluator counts them. "
             f"Times are medians of {timed.get('rounds', 0)} interleaved rounds at batch 1 on one thread; the ratio is to "
             "MLPerf Tiny's ResNet-8 int8 on LiteRT in the same rounds.", "",
             "| network | bytes | parameters | MACs | seeds | accuracy | interval | runtime | ms | ratio |",
             "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- | ---: | ---: |"]
    for row in rows:
        spread = f" ± {100 * row['deviation']:.2f}" if row["deviation"] is not None else ""
        took = f"{row['median_ms']:.2f} | {row['ratio']:.2f}" if "median_ms" in row else " | "
        low, high = row["interval"]
        lines.append(f"| {row['name']} | {row['bytes']:,} | {row['parameters']:,} | {row['macs'] / 1e6:.1f} M | "
                     f"{row['seeds']} | {row['accuracy']:.2%}{spread} | {low:.2%} to {high:.2%} | "
                     f"{row['runtime']} | {took} |")
    if timed:
        lines += ["", f"Timed on {timed['machine']['cpu']} ({' '.join(timed['machine']['flags'])})."]
    write_atomically(RECORD.with_suffix(".md"), ("\n".join(lines) + "\n").encode())

    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained", sharey=True)
    for axis, key, title in zip(axes, ("bytes", "median_ms"), ("bytes of the weights file (log)", "milliseconds (log)"),
                                strict=True):
        for row in rows:
            if key not in row:
                continue
            middle = 100 * row["accuracy"]
            error = np.array([[middle - 100 * row["interval"][0]], [100 * row["interval"][1] - middle]])
            colour = "C0" if row["ours"] else "0.5"
            axis.errorbar([row[key]], [middle], yerr=error, fmt="o" if row["ours"] else "s", color=colour, capsize=3)
            axis.annotate(row["name"].removeprefix("MLPerf Tiny "), (row[key], middle), xytext=(7, -3),
                          textcoords="offset points", fontsize=8, color=colour)
        axis.set(xscale="log", xlabel=title)
        axis.margins(x=0.3)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy (%)")
    figure.suptitle("CIFAR-10: ours (blue) beside MLPerf Tiny's networks (grey)")
    write_figure(RECORD.with_suffix(".png"), figure, dpi=110)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    packaging = verbs.add_parser("package")
    packaging.add_argument("--data_root", type=Path, required=True, help="folder of CIFAR-10")
    packaging.add_argument("--trained", type=Path, required=True, help="OUT of benchmarks.front_training")
    packaging.add_argument("--only", nargs="+", help="trainings by name, such as cifar10_96kb-0")
    timing = verbs.add_parser("time")
    timing.add_argument("--networks", type=Path, required=True, help="folder of MLPerf Tiny's .tflite files")
    for verb in (packaging, timing):
        verb.add_argument("--runs", type=Path, required=True, help="folder of the runs that package")
    verbs.add_parser("draw")
    arguments = parser.parse_args()
    if arguments.verb == "draw":
        draw()
    else:
        (package if arguments.verb == "package" else measure_times)(arguments)


if __name__ == "__main__":
    main()
