"""The comparison of all models of the MNIST challenge in a folder: a table, a JSON file and a plot."""

from __future__ import annotations

import statistics
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from compress.studies.mnist_result import ACCURACY, ChallengeResult, finished_results
from metadata.files import write_atomically, write_json
from metadata.formats import read_csv, write_figure
from metadata.machine import machine, versions

HEADER = ("model", "parameters", "published", "seeds", "mean of last 5", "deviation", "minimum", "seconds", "rules")


def write_comparison(folder: Path, published: dict[str, float | None], console: Console) -> None:
    """Compare all models that were trained in a folder: print a table, and write comparison.md, .json and .png.

    Args:
        folder: holds a folder for each model and seed.
        published: the accuracy in percent that the authors of a model state, by the name of the model.
        console: the table is printed here.
    """
    by_model: dict[str, list[ChallengeResult]] = {}
    for result in finished_results(folder):
        by_model.setdefault(result.model, []).append(result)
    rows, records = [], []
    for name, results in sorted(by_model.items(), key=lambda entry: entry[1][0].parameters, reverse=True):
        means = [statistics.mean(result.test_accuracies) for result in results]
        lowest = min(min(result.test_accuracies) for result in results)
        deviation = statistics.stdev(means) if len(means) > 1 else None
        passed = sum(all(result.rules.values()) for result in results)
        stated = published.get(name)
        record = {"model": name, "parameters": results[0].parameters, "macs": results[0].macs,
                  "published_percent": stated, "seeds": [result.seed for result in results],
                  "mean": statistics.mean(means), "deviation_over_seeds": deviation, "minimum": lowest,
                  "passed": passed, "seconds": statistics.median(result.seconds for result in results),
                  "runs": [result.to_json() for result in results]}
        records.append(record)
        rows.append((name, f"{results[0].parameters:,}", f"{stated:.2f}" if stated else "", str(len(results)),
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
    """Draw the test accuracy over the epochs: the mean over seeds and their range."""
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
