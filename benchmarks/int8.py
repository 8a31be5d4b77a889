"""Our int8 against float and against the int8 of other libraries: latency, size and accuracy in one interleaved run.

    python -m benchmarks.int8 [--models resnet18 mobilenet_v2 efficientnet_b0] [--threads 1]
    python -m benchmarks.int8 --models all --sides "PyTorch eager" "PyTorch channels last" torch.compile "ours, dynamic"
    python -m benchmarks.int8 --trained runs/NAME/04-finetune --dataset cifar10 --data_root DIR

Write benchmarks/results/int8.json, .md and, if accuracies were measured, .png. Rows of other networks in the file are kept;
a file of another machine or number of threads is refused. torchvision's networks have random weights, and batch norms of
random images: latency and size do not depend on the weights, and their accuracy is not reported. A trained network is the
folder of a stage of a run. If the run has a quantize_static stage, our static side is the file that its search chose. The
test split is opened once.

Other libraries: pip install -r benchmarks/requirements-peers.txt; a missing one is skipped, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from architectures.architecture import Architecture
from architectures.counting import count_macs
from architectures.weights import open_model
from benchmarks.int8_sides import CALIBRATION, SIDES, Call, Subject
from benchmarks.limits import limits
from compress.evaluation.measure import measure_accuracy
from loaders.augment import examples
from loaders.catalog import load
from loaders.request import Request
from metadata.errors import UserError, first_line
from metadata.files import read_json, write_atomically, write_json
from metadata.formats import write_figure
from metadata.machine import machine, versions

MODELS = ("resnet18", "mobilenet_v2", "efficientnet_b0")
FAMILIES = ("resnet", "resnext", "wide_resnet", "regnet")  # with MODELS, the networks that dynamic int8 should make faster
ROUNDS, CALLS = 15, 6  # every side is timed in ROUNDS rounds of CALLS calls, or fewer if the calls are slow
TURN_SECONDS = 0.5
SCHEMA = 2  # version of the record


# ------------------------------------------------------------------------------------------------------- measuring


def _interleaved(calls: dict[str, Call], image: Tensor) -> dict[str, list[float]]:
    """Return the milliseconds of every call of each side; the rounds of the sides are interleaved."""
    taken: dict[str, list[float]] = {side: [] for side in calls}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for side, call in calls.items():
                call(image)  # fills the caches, which hold the data of another side
                began = time.perf_counter()
                for _ in range(CALLS):
                    start = time.perf_counter_ns()
                    call(image)
                    taken[side].append((time.perf_counter_ns() - start) / 1e6)
                    if time.perf_counter() - began > TURN_SECONDS:
                        break
    return taken


def measure(subject: Subject, sides: Sequence[str], test_images: int | None) -> dict[str, dict[str, Any]]:
    """Return a row for each side: kind, bytes, milliseconds, and accuracy if there are labels, or why it is skipped."""
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    image = subject.images[:1].contiguous()
    for side in sides:
        kind, make = SIDES[side]
        rows[side] = {"kind": kind}
        try:
            calls[side], rows[side]["bytes"] = make(subject)
            with torch.no_grad():
                for _ in range(3):
                    calls[side](image)
        except ImportError as error:
            rows[side]["left_out"] = f"not installed ({error.name})"
        except (RuntimeError, ValueError, UserError, NotImplementedError) as error:
            rows[side]["left_out"] = f"fails: {first_line(error)[:120]}"
        if "left_out" in rows[side]:
            calls.pop(side, None)
        print(f"  {side}: {rows[side].get('left_out', 'ready')}", flush=True)
    taken = _interleaved(calls, image)
    floats = {kind: min((statistics.median(taken[side]) for side in calls if kind in SIDES[side][0]), default=float("nan"))
              for kind in ("torch float", "float")}
    for side, values in taken.items():
        p5, median, p95 = np.percentile(values, [5, 50, 95])
        rows[side] |= {"latency_ms": {"median": round(median, 3), "p5": round(p5, 3), "p95": round(p95, 3),
                                      "n": len(values)},
                       "over_best_torch_float": round(median / floats["torch float"], 3),
                       "over_best_float": round(median / floats["float"], 3)}
    if subject.splits is not None:
        split, preprocessing = subject.splits.open_test(), subject.splits.card.preprocessing
        for side, call in calls.items():
            ids = split.sample(test_images or len(split))
            result = measure_accuracy(call, split.batches(1, ids), preprocessing, len(ids))
            rows[side]["accuracy"] = {"correct": result.correct, "images": result.total}
            print(f"  {side}: {result.correct}/{result.total}", flush=True)
    return rows


def random_subject(name: str, folder: Path, threads: int) -> Subject:
    """Return a torchvision network with random weights and batch norms set by random images."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, 224, 224))
    return Subject(name=name, model=model.eval(), images=torch.randn(CALIBRATION, 3, 224, 224), folder=folder,
                   threads=threads)


def trained_subject(stage: Path, dataset: str, data_root: Path, folder: Path, threads: int) -> Subject:
    """Return the model of a stage of a run, with training images for calibration."""
    architecture = read_json(stage / "architecture.json", Architecture)
    model = open_model(architecture, stage / "weights.pth")
    splits = load(Request(name=dataset, root=data_root))
    images = examples(splits, CALIBRATION * 4)
    chosen = next(iter(sorted(stage.resolve().parent.glob("*-quantize_static/model.onnx"))), None)
    return Subject(name=f"{architecture.model_type}, {splits.card.name}", model=model, images=images,
                   splits=splits, chosen=chosen, folder=folder, threads=threads)


# ---------------------------------------------------------------------------------------------------------- output


def markdown(result: dict[str, Any]) -> str:
    """Return the tables: one for each fully measured network, and one of dynamic int8 for the others."""
    where, rates = result["machine"], result["limits"]
    parts = [f"# Int8 side by side\n\n{where['cpu']} ({', '.join(where['flags'])}), {result['threads']} thread(s), batch "
             "1. Medians of interleaved calls; the ratios are to the best float time of PyTorch and of any runtime in the "
             "same run.\n\nThe limit: " + " and ".join(f"{rate:.0f} G multiply-adds a second in {dtype}"
                                                  for dtype, rate in rates.items())
             + f" (oneDNN's convolutions, benchmarks/limits.py), so where int8 takes less than "
             f"{rates['float32'] / rates.get('int8', rates['float32']):.2f} of a float time, float was not at its limit. "
             "\"Of limit\" is what a network's multiply-adds take at that rate, over what they took."]
    whole = {name: model for name, model in result["models"].items()
             if any(row["kind"] == "float" for row in model["sides"].values())}
    for name, model in whole.items():
        parts += [f"\n## {name}, {model['macs'] / 1e6:,.0f} M multiply-adds\n", *_table(model, rates)]
    others = {name: model for name, model in result["models"].items() if name not in whole}
    if others:
        parts += ["\n## Dynamic int8 of more networks\n",
                  "| | M multiply-adds | PyTorch's best float, ms | ours, ms | p5 to p95 | ratio | size ratio | n |",
                  "|---|---|---|---|---|---|---|---|", *(_line(name, model) for name, model in others.items())]
    return "\n".join(parts) + "\n"


def _table(model: dict[str, Any], rates: dict[str, float]) -> list[str]:
    rows = model["sides"]
    trained = any("accuracy" in row for row in rows.values())
    lines = ["| | ms | p5 to p95 | to PyTorch | to any float | of limit | MB |" + (" accuracy |" if trained else ""),
             "|---|---|---|---|---|---|---|" + ("---|" if trained else "")]
    for side, row in rows.items():
        if "left_out" in row:
            lines.append(f"| {side} | {row['left_out']} | | | | | |" + (" |" if trained else ""))
            continue
        times, accuracy = row["latency_ms"], row.get("accuracy")
        rate = rates["float32"] if "float" in row["kind"] else rates.get("int8", rates["float32"])
        lines.append(f"| {side} | {times['median']:.2f} | {times['p5']:.2f} to {times['p95']:.2f} | "
                     f"{row['over_best_torch_float']:.2f} | {row['over_best_float']:.2f} | "
                     f"{model['macs'] / rate / 1e6 / times['median']:.0%} | {row['bytes'] / 2**20:.2f} |"
                     + (f" {accuracy['correct'] / accuracy['images']:.2%} |" if accuracy else ""))
    return lines


def _line(name: str, model: dict[str, Any]) -> str:
    rows = {side: row for side, row in model["sides"].items() if "latency_ms" in row}
    floats = [(side, row) for side, row in rows.items() if row["kind"] == "torch float"]
    ours = rows.get("ours, dynamic")
    if not floats or ours is None:
        return f"| {name} | {model['macs'] / 1e6:,.0f} | measured in part, see the JSON file | | | | | |"
    side, best = min(floats, key=lambda item: float(item[1]["latency_ms"]["median"]))
    times = ours["latency_ms"]
    return (f"| {name} | {model['macs'] / 1e6:,.0f} | "
            f"{best['latency_ms']['median']:.2f} ({side}) | {times['median']:.2f} | "
            f"{times['p5']:.2f} to {times['p95']:.2f} | {ours['over_best_torch_float']:.2f} | "
            f"{ours['bytes'] / best['bytes']:.3f} | {times['n']} |")


def draw(path: Path, result: dict[str, Any]) -> None:
    """Draw accuracy against latency, one panel for each trained network."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker
    trained = {name: model["sides"] for name, model in result["models"].items()
               if any("accuracy" in row for row in model["sides"].values())}
    if not trained:
        return
    colours, markers = {"torch float": "C7", "float": "C0", "peer": "C1", "ours": "C2"}, "osD^vP"
    figure, axes = plt.subplots(1, len(trained), figsize=(5 * len(trained) + 3, 5), layout="constrained", squeeze=False)
    for axis, (name, rows) in zip(axes[0], trained.items(), strict=True):
        drawn: dict[str, int] = {}
        for side, row in rows.items():
            if "accuracy" not in row:
                continue
            number = drawn[row["kind"]] = drawn.get(row["kind"], -1) + 1
            axis.plot(row["latency_ms"]["median"], 100 * row["accuracy"]["correct"] / row["accuracy"]["images"],
                      markers[number], color=colours[row["kind"]], markersize=8, alpha=0.8, linestyle="none", label=side)
        low, high = axis.get_ylim()
        middle, half = (low + high) / 2, max(1.0, high - low) / 2  # at least 1 % wide
        axis.set(xlabel="milliseconds an image, batch 1", ylabel="test accuracy (%)", title=name, xscale="log",
                 ylim=(middle - half, middle + half))
        for formatted in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            formatted(ticker.FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else ""))
        axis.grid(alpha=0.3, which="both")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    write_figure(path, figure)


def main() -> int:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=None, help=f"of torchvision; {' '.join(MODELS)} unless --trained; "
                        "all: these, and every ResNet and RegNet")
    parser.add_argument("--trained", type=Path, nargs="*", default=[], help="stages' folders of runs")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data_root", type=Path, help="of --trained")
    parser.add_argument("--test_images", type=int, help="number of test images for --trained; default: all")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), metavar="SIDE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "int8")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = arguments.output.with_suffix(".json")
    before = json.loads(path.read_text()) if path.is_file() else {}
    told = {"schema": SCHEMA, "threads": arguments.threads, "machine": machine()}
    if before and any(before.get(key) != value for key, value in told.items()):
        print(f"error: {path} holds another machine's results, or of other threads or an older form; name another --output",
              file=sys.stderr)
        return 2
    result: dict[str, Any] = {**told, "versions": versions(), "limits": limits(arguments.threads),
                              "models": before.get("models", {})}
    names = arguments.models if arguments.models is not None else [] if arguments.trained else list(MODELS)
    if names == ["all"]:
        names = [*MODELS, *(name for name in torchvision.models.list_models(module=torchvision.models)
                            if name.startswith(FAMILIES) and name not in MODELS)]
    for source in (*names, *arguments.trained):
        with tempfile.TemporaryDirectory() as folder:
            subject = random_subject(source, Path(folder), arguments.threads) if isinstance(source, str) else (
                trained_subject(source, arguments.dataset, arguments.data_root, Path(folder), arguments.threads))
            print(subject.name, flush=True)
            result["models"][subject.name] = {"macs": count_macs(subject.model, subject.images.shape[1:]),
                                              "sides": measure(subject, arguments.sides, arguments.test_images)}
        write_json(path, result)
        write_atomically(path.with_suffix(".md"), markdown(result).encode())
        draw(path.with_suffix(".png"), result)
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
