"""The MNIST challenge: 99.4 % held over the last five of at most 15 epochs, by fewer than 8,000 parameters.

Trains the published models the published way and ours our way, checks the three rules itself, and compares. The test split
is looked at after each epoch for the log, as the challenge asks; nothing is chosen by it: no stopping, no best epoch, no
rate. Settings were chosen on 10,000 images held out of train.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from architectures.counting import count_macs
from architectures.architecture import Architecture
from architectures.weights import open_model
from compress.evaluation.measure import measure_accuracy
from compress.training.assessment import learned_parameters
from compress.training.data import training_data
from compress.training.distillation import cross_entropy
from compress.training.flags import TrainingRun, validated
from compress.training.loggers import draw_curves
from compress.training.loop import train
from compress.training.malloc import keep_freed_memory
from compress.training.run import CHECKPOINT, SUMMARY, claimed, flags_named, prepare, read_summary, write_settings
from compress.training.trackers import Tracker
from metadata.closest import closest
from metadata.errors import UserError, VerificationError
from metadata.files import read_json, write_atomically, write_json
from metadata.formats import read_csv, write_csv, write_figure, write_tensors
from metadata.machine import machine, usable_cores, versions

EPOCHS, PARAMETERS, ACCURACY, LAST = 15, 8000, 0.994, 5  # the rules
WEIGHTS = Path(__file__).parent / "mnist_weights"


@dataclass(frozen=True)
class ChallengeModel:
    """A model of the challenge with its way of training.

    Args:
        settings: keys of the training configuration.
        published: test accuracy that its authors state, in percent.
        seeds: how many seeds the recorded study has.
    """

    settings: dict[str, Any]
    published: float | None = None
    seeds: int = 5
    note: str = ""


# Batch 32, Adam, ReduceLROnPlateau and rotations, as their authors have it. Theirs watches the test loss, which would be
# choosing by the test split; here it watches the training loss.
PUBLISHED_WAY: dict[str, Any] = {
    "batch_size": 32, "optimizer": "adam", "lr": 0.001, "weight_decay": 0.0001, "schedule": "plateau", "warmup": 0.0,
    "patience": 3, "factor": 0.5, "augment": ["affine"], "affine_degrees": 7.0, "affine_scale": 0.0, "affine_shear": 0.0,
    "affine_shift": 0.0}

# Chosen on 10,000 images held out of train.
OUR_WAY: dict[str, Any] = {
    "batch_size": 64, "optimizer": "muon", "lr": 0.02, "adamw_lr": 0.01, "momentum": 0.9, "weight_decay": 0.0,
    "schedule": "linear", "warmup": 0.05, "anneal": 0.7, "lr_floor": 0.02, "ema": 0.998, "augment": ["affine"]}

MILD_AFFINE = {"affine_degrees": 8.0, "affine_scale": 0.08, "affine_shear": 0.08, "affine_shift": 1.5}

ENTRIES: dict[str, ChallengeModel] = {
    "mnist_model_ll": ChallengeModel(PUBLISHED_WAY, 99.36, 3),
    "mnist_model_gap": ChallengeModel(PUBLISHED_WAY, 99.36, 3, "its logits pass a ReLU, as published"),
    "mnist_model_final": ChallengeModel(PUBLISHED_WAY, 99.40, 3),
    "mnist_under_8k": ChallengeModel({**OUR_WAY, **MILD_AFFINE}),
    "mnist_under_4k": ChallengeModel({**OUR_WAY, **MILD_AFFINE, "lr": 0.012}),
}


@dataclass
class Result:
    """One model with one seed: what it came to, and the rules."""

    model: str
    seed: int
    parameters: int
    macs: int
    epochs: int
    seconds: float
    test_accuracies: list[float] = field(default_factory=list)  # of the last five epochs, in [0, 1]

    @property
    def rules(self) -> dict[str, bool]:
        """The three rules of the challenge, and whether each is kept."""
        return {f"at least {100 * ACCURACY:.1f} % in each of the last {LAST} epochs":
                    len(self.test_accuracies) == LAST and min(self.test_accuracies) >= ACCURACY,
                f"at most {EPOCHS} epochs": self.epochs <= EPOCHS,
                f"fewer than {PARAMETERS:,} parameters": self.parameters < PARAMETERS}

    def to_json(self) -> dict[str, Any]:
        """What summary.json holds."""
        return {"model": self.model, "seed": self.seed, "parameters": self.parameters, "macs": self.macs,
                "epochs": self.epochs, "seconds": round(self.seconds, 1),
                "last_epochs_test_accuracy": self.test_accuracies, "mean": statistics.mean(self.test_accuracies),
                "minimum": min(self.test_accuracies), "rules": self.rules, "passed": all(self.rules.values())}


def run_challenge(models: Sequence[str], seeds: Sequence[int] | None, data_root: Path | None, download: bool, folder: Path,
        threads: int, epochs: int, console: Console) -> list[Result]:
    """Trains each model with each seed, or what is left of it, and writes the comparison.

    Args:
        models: of ENTRIES.
        seeds: None for those of the recorded study.
        data_root: where MNIST is.
        download: let torchvision fetch it.
        folder: gets a folder a model and seed, and the comparison.
        threads: CPU threads; 0 for all.
        epochs: passes over the training split, for trials; the challenge has 15.
        console: where progress goes.

    Raises:
        UserError: an unknown model (with the closest match), or data that is not there.
    """
    for name in models:
        if name not in ENTRIES:
            raise UserError(f"--model {name!r}: unknown{closest(name, [*ENTRIES, 'all'])} (known: all, "
                            f"{', '.join(ENTRIES)})")
    keep_freed_memory()
    _finished(folder)  # a damaged one is found before anything trains
    results = []
    for name in models:
        for seed in seeds if seeds is not None else range(ENTRIES[name].seeds):
            config = validated({
                **ENTRIES[name].settings, "dataset": "mnist", "data_root": data_root, "download": download,
                "model_name": name, "epochs": epochs, "validation_fraction": 0, "seed": seed, "threads": threads,
                "monitor": "train", "keep": "last", "precision": "float32",
                "log_dir": folder / name / f"seed{seed}"}, f"model {name}")
            results.append(_train(config, console))
    _compare(folder, console)
    return results


def _train(config: TrainingRun, console: Console) -> Result:
    folder = config.log_dir
    with claimed(config):
        if done := _read_result(folder):
            console.print(f"{folder}: finished before", highlight=False)
            return done
        torch.set_num_threads(config.threads or usable_cores())
        device = torch.device("cpu")
        tracker = Tracker(console, folder)
        with flags_named():
            splits, model, options = prepare(config, tracker)
        write_settings(config)
        # The test split is measured and decides nothing.
        data = training_data(splits.train, splits.open_test(), splits.card, config.training, seed=config.seed,
                             device=device)
        label = f"{config.model_name} seed {config.seed}"
        parameters = learned_parameters(model)
        console.print(f"{label}: {parameters:,} parameters", highlight=False)
        trained = train(model, data, cross_entropy(config.label_smoothing), config.training,
                        label=label, seed=config.seed, device=device, checkpoint=folder / CHECKPOINT, tracker=tracker)
        rows = [{key.replace("validation", "test"): value for key, value in row.items() if key != "training"}
                for row in read_csv(folder / "metrics.csv")]
        write_csv(folder / "epochs.csv", rows)
        draw_curves(folder / "curves.png", f"{label}, {parameters:,} parameters", rows, ("train", "test"))
        write_tensors(folder / "weights.pth", model.state_dict())
        result = Result(config.model_name, config.seed, parameters, count_macs(model, splits.card.input_shape),
                        trained.epochs, trained.seconds, [float(row["test_accuracy"]) for row in rows[-LAST:]])
        write_json(folder / SUMMARY, {"schema": 1, **result.to_json(), "options": options, "machine": machine(),
                                      "versions": versions()})
        (folder / CHECKPOINT).unlink(missing_ok=True)
        (folder / "metrics.csv").unlink(missing_ok=True)
        return result


def _read_result(folder: Path) -> Result | None:
    """What a run came to, from its summary.json; None if it is not over."""
    summary = read_summary(folder)
    if summary is None:
        return None
    keys = ("model", "seed", "parameters", "macs", "epochs", "seconds", "last_epochs_test_accuracy")
    if missing := [key for key in keys if key not in summary]:
        raise UserError(f"{folder / SUMMARY}: no run of the challenge, {missing[0]} is missing; choose --log_dir OTHER")
    return Result(*(summary[key] for key in keys))


def _finished(folder: Path) -> list[Result]:
    """All runs in the folder that are over."""
    found = [_read_result(path.parent) for path in sorted(folder.glob(f"*/seed*/{SUMMARY}"))]
    return [result for result in found if result]


# ----------------------------------------------------------------------------------------------------- comparison

HEADER = ("model", "parameters", "published", "seeds", "mean of last 5", "deviation", "minimum", "seconds", "rules")


def _compare(folder: Path, console: Console) -> None:
    """One table over all models that have been trained in the folder: on screen, comparison.md and comparison.json."""
    by_model: dict[str, list[Result]] = {}
    for result in _finished(folder):
        by_model.setdefault(result.model, []).append(result)
    rows, records = [], []
    for name, results in sorted(by_model.items(), key=lambda entry: entry[1][0].parameters, reverse=True):
        means = [statistics.mean(result.test_accuracies) for result in results]
        lowest = min(min(result.test_accuracies) for result in results)
        deviation = statistics.stdev(means) if len(means) > 1 else None
        passed = sum(all(result.rules.values()) for result in results)
        published = ENTRIES[name].published if name in ENTRIES else None
        record = {"model": name, "parameters": results[0].parameters, "macs": results[0].macs,
                  "published_percent": published, "seeds": [result.seed for result in results],
                  "mean": statistics.mean(means), "deviation_over_seeds": deviation, "minimum": lowest,
                  "passed": passed, "seconds": statistics.median(result.seconds for result in results),
                  "runs": [result.to_json() for result in results]}
        records.append(record)
        rows.append((name, f"{results[0].parameters:,}", f"{published:.2f}" if published else "", str(len(results)),
                     f"{100 * statistics.mean(means):.3f}", f"{100 * deviation:.3f}" if deviation is not None else "",
                     f"{100 * lowest:.2f}", f"{record['seconds']:.0f}", f"{passed} of {len(results)}"))
    write_json(folder / "comparison.json", {"schema": 1, "models": records, "machine": machine(), "versions": versions()})
    lines = ["| " + " | ".join(HEADER) + " |", "| --- |" + " ---: |" * (len(HEADER) - 1),
             *("| " + " | ".join(row) + " |" for row in rows)]
    write_atomically(folder / "comparison.md", ("\n".join(lines) + "\n").encode())
    _draw(folder / "comparison.png", {name: [folder / name / f"seed{seed}" / "epochs.csv" for seed in (
        result.seed for result in results)] for name, results in by_model.items()})
    table = Table(title="test accuracy (%); deviation: of the means, over seeds; rules: seeds that keep all three",
                  box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"comparison: {folder / 'comparison.md'}; each run's epochs, curves and weights below {folder}",
                  highlight=False, soft_wrap=True)


def _draw(path: Path, logs: dict[str, list[Path]]) -> None:
    """comparison.png: test accuracy over the epochs, the mean over seeds and the range."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for index, (name, paths) in enumerate(sorted(logs.items())):
        curves = [[100 * float(row["test_accuracy"]) for row in read_csv(log)] for log in paths]
        points = list(zip(*(curve[:min(map(len, curves))] for curve in curves), strict=True))  # (epochs, seeds)
        epochs = range(1, len(points) + 1)
        axis.plot(epochs, [statistics.mean(point) for point in points], color=f"C{index}", marker=".",
                  label=f"{name} ({len(curves)} seeds)")
        axis.fill_between(epochs, [min(point) for point in points], [max(point) for point in points], color=f"C{index}",
                          alpha=0.2, linewidth=0)
    axis.axhline(100 * ACCURACY, color="black", linestyle=":", label=f"the rule: {100 * ACCURACY:.1f} %")
    axis.set(title="MNIST challenge: mean over seeds, and range", xlabel="epoch", ylabel="test accuracy (%)")
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, 98.5) if high > 99 else low, high)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    write_figure(path, figure)


# -------------------------------------------------------------------------------------------------------- verify


def verify(data_root: Path | None, download: bool, console: Console) -> None:
    """Rebuilds the committed networks from their architecture and weights, and counts what they get right.

    Raises:
        VerificationError: the parameters or the right answers are not those recorded.
        UserError: MNIST is not there.
    """
    from loaders.catalog import load
    from loaders.request import Request

    with flags_named():
        splits = load(Request(name="mnist", root=data_root, download=download))
        test = splits.open_test()
    records = json.loads((WEIGHTS / "weights.json").read_text())["models"]
    for name, record in records.items():
        architecture: Architecture = read_json(WEIGHTS / f"{name}.json", Architecture)
        model = open_model(architecture, WEIGHTS / f"{name}.pth").eval()
        found = measure_accuracy(model, test.batches(250), splits.card.preprocessing, len(test))
        parameters = learned_parameters(model)
        console.print(f"{name}: {parameters:,} parameters, {found.correct:,} of {found.total:,} test images right "
                      f"({found.fraction:.2%}); recorded {record['correct']:,}", highlight=False)
        # Another CPU rounds otherwise, which can tip an image that is on the edge.
        if parameters != record["parameters"] or abs(found.correct - record["correct"]) > 3:
            raise VerificationError(f"{name}: {parameters} parameters and {found.correct} right, recorded "
                                    f"{record['parameters']} and {record['correct']}")
