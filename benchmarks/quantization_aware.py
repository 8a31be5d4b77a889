"""The accuracy that quantization-aware finetuning recovers from post-training quantization, with a control in float.

    python -m benchmarks.quantization_aware runs/NAME/02-distill --dataset cifar10 --data_root DIR [--seeds 3]

Quantize the float student of a run without training ("post-training"), after further training in float ("finetuned in
float", the control), and after the same amount of training with fake quantization, once for each form of weights. Export
each to ONNX files with every method to choose ranges and every form of weights. Measure on the test split the file that is
best on the validation split. Write benchmarks/results/quantization_aware.json and .md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.evaluation.measure import measure_accuracy
from compress.evaluation.runtimes import answering, open_file
from compress.packaging.export import export
from compress.pipeline.stage import Context, TorchModel
from compress.pipeline.stages.finetune import Finetune
from compress.quantization.calibration import RANGES
from compress.quantization.static import Calibration, StaticSettings, quantize_static
from compress.quantization.weights import WEIGHT_FORMS
from compress.training.assessment import accuracy_of
from compress.training.settings import TrainingSettings
from compress.training.trackers import Tracker
from loaders.catalog import load
from loaders.request import Request
from loaders.splits import Split, Splits
from metadata.errors import UserError
from metadata.files import write_atomically, write_json
from metadata.machine import machine, versions
from metadata.schemas import Preprocessing

CALIBRATION, BATCH = 512, 64  # images

def int8_accuracies(model: TorchModel, splits: Splits, folder: Path, threads: int) -> dict[str, dict[str, Any]]:
    """Return, by the form of the weights, the method to choose ranges, and validation and test accuracy on ONNX Runtime."""
    context = _context(splits, folder, 0)
    network, _ = export(model.module, model.architecture)
    calibration = Calibration(network, context.examples(CALIBRATION).numpy(), threads)
    found: dict[str, dict[str, Any]] = {}
    for form in WEIGHT_FORMS:
        tried = {}
        for method in RANGES:
            path = folder / f"{method}.onnx"
            int8 = quantize_static(calibration, StaticSettings(method=method, weights=form))
            write_atomically(path, int8.model.SerializeToString())
            tried[method] = _accuracy(path, splits, splits.validation)
        best = max(tried, key=tried.__getitem__)
        found[form] = {"ranges": best, "validation": tried[best],
                       "test": _accuracy(folder / f"{best}.onnx", splits, splits.open_test())}
    return found


def _accuracy(path: Path, splits: Splits, split: Split) -> float:
    preprocessing: Preprocessing = splits.card.preprocessing
    answer = answering(open_file(path, splits.card.input_shape, preprocessing, "onnxruntime"))
    result = measure_accuracy(answer, split.batches(BATCH), preprocessing, len(split))
    return result.correct / result.total


def _context(splits: Splits, folder: Path, seed: int) -> Context:
    return Context(splits=splits, device=torch.device("cpu"), seed=seed, folder=folder, run_folder=folder,
                   tracker=Tracker(Console()), outputs=[], measurements={})


def float_accuracies(model: TorchModel, splits: Splits) -> dict[str, float]:
    """Return the accuracies in float, before quantization."""
    preprocessing = splits.card.preprocessing
    return {"validation": accuracy_of(model.module, splits.validation, preprocessing),
            "test": accuracy_of(model.module, splits.open_test(), preprocessing)}


def compare(student: TorchModel, splits: Splits, train: TrainingSettings, seeds: int, threads: int) -> dict[str, Any]:
    """Return a row for each method and seed."""
    rows: dict[str, list[dict[str, Any]]] = {}

    def measured(name: str, model: TorchModel) -> None:
        with tempfile.TemporaryDirectory() as folder:
            row = {"float": float_accuracies(model, splits), **int8_accuracies(model, splits, Path(folder), threads)}
        rows.setdefault(name, []).append(row)
        print(name, row, flush=True)

    measured("post-training", student)
    stages = {"finetuned in float": Finetune(train=train)} | {
        f"quantization-aware, {form}": Finetune(quantization_aware=True, weights=form, train=train)
        for form in WEIGHT_FORMS}
    for seed in range(seeds):
        for name, stage in stages.items():
            with tempfile.TemporaryDirectory() as folder:
                measured(name, stage.run(student, _context(splits, Path(folder), seed)))
    before = rows["post-training"][0]
    recovered = {}
    for form in WEIGHT_FORMS:
        lost = before["float"]["test"] - before[form]["test"]
        recovered[form] = {"lost_points": 100 * lost, "recovered": {
            name: [(row[form]["test"] - before[form]["test"]) / lost if lost > 0 else None for row in rows[name]]
            for name in stages}}
    return {"rows": rows, "on_test": recovered}


def markdown(result: dict[str, Any]) -> str:
    """Return the table: test accuracies in percent, mean and standard deviation over the seeds."""
    def cell(values: list[float]) -> str:
        text = f"{100 * statistics.mean(values):.2f}"
        return text + (f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else "")

    lines = [f"# {result['student']['name']}: training for int8\n",
             f"Test accuracy in percent, {result['student']['parameters']:,} parameters, {result['train']['epochs']} "
             f"epochs of finetuning, {result['seeds']} seeds; int8 on ONNX Runtime, ranges by the validation split.\n",
             "| | float | " + " | ".join(f"{form} weights" for form in WEIGHT_FORMS) + " |",
             "|---|---|" + "---|" * len(WEIGHT_FORMS)]
    for name, rows in result["rows"].items():
        cells = [cell([row["float"]["test"] for row in rows]),
                 *(cell([row[form]["test"] for row in rows]) for form in WEIGHT_FORMS)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for form, said in result["on_test"].items():
        for name, shares in said["recovered"].items():
            known = [share for share in shares if share is not None]
            if known:
                lines.append(f"\n{form} weights: {name} recovers {statistics.mean(known):.2f} of the "
                             f"{said['lost_points']:.2f} points lost ({', '.join(f'{share:.2f}' for share in known)}).")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=Path, help="folder of a stage with a float student")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data_root", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "quantization_aware")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        student = TorchModel.load(arguments.stage)
        splits = load(Request(name=arguments.dataset, root=arguments.data_root))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    train = TrainingSettings(epochs=arguments.epochs, lr=arguments.lr)
    result = {"schema": 1, "machine": machine(), "versions": versions(), "threads": arguments.threads,
              "seeds": arguments.seeds, "train": train.model_dump(mode="json"), "dataset": splits.card.name,
              "student": {"name": student.architecture.model_type,
                          "parameters": sum(parameter.numel() for parameter in student.module.parameters())},
              **compare(student, splits, train, arguments.seeds, arguments.threads)}
    write_json(arguments.output.with_suffix(".json"), result)
    write_atomically(arguments.output.with_suffix(".md"), markdown(result).encode())
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
