"""What a run leaves for its reader: the ledger as a table, `report.md` and `plot.png`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metadata.files import write_atomically
from metadata.formats import read_csv, write_figure
from metadata.records import LedgerRow

HEADER = ("stage", "parameters", "MACs", "size", "latency", "accuracy", "seconds")


def cells(row: LedgerRow) -> tuple[str, ...]:
    """Return a ledger row as the cells of a table."""
    stage = row.stage + (" (test)" if row.split == "test" else "")
    return (stage, f"{row.parameters:,}", f"{row.macs / 1e6:,.2f} M", f"{row.size_bytes / 2**20:,.3f} MB",
            f"{row.latency_ms:.2f} ms", f"{row.accuracy:.2%}", f"{row.seconds:,.1f}")


def write_report(folder: Path, run_name: str, rows: list[LedgerRow], warnings: list[str],
                 results: dict[str, Any] | None) -> None:
    """Write report.md and plot.png into a run's folder."""
    lines = [f"# {run_name}", "", "| " + " | ".join(HEADER) + " |", "| --- |" + " ---: |" * (len(HEADER) - 1)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    lines += ["", "Accuracy is measured on the validation split unless the row says test. Latency is the median at "
              "batch 1 on one thread. Parameters are all stored numbers."]
    if results:
        counted = results["details"]["accuracy"]
        machine = results["details"]["machine"]
        lines += ["", f"The package, scored in a clean process on {counted['total']} test images: "
                  f"{counted['correct']} right ({results['accuracy']:.2f} %), {results['model_size']:.3f} MB, "
                  f"{results['latency']:.2f} ms (mean); total score {results['total_score']:.3f}, guarded "
                  f"{results['details']['guarded_score']:.3f}. Machine: {machine['cpu']}, {machine['cores']} cores."]
    lines += [""] + [f"Warning: {text}" for text in warnings] + ["", "![accuracy against size](plot.png)", ""]
    write_atomically(folder / "report.md", "\n".join(lines).encode(errors="backslashreplace"))  # as in write_json
    draw(folder, run_name, rows)


def draw(folder: Path, title: str, rows: list[LedgerRow]) -> None:
    """Write plot.png: accuracy against size along the stages, and validation accuracy over the epochs of each training."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    models = [row for row in rows if row.split == "validation" and row.stage != "package"]  # the same model again
    sizes = [row.size_bytes / 2**20 for row in models]
    main = [index for index, row in enumerate(models) if "(control)" not in row.stage]
    left.plot([sizes[i] for i in main], [100 * models[i].accuracy for i in main], color="0.75", zorder=1)
    for index, (row, size) in enumerate(zip(models, sizes, strict=True)):
        left.scatter(size, 100 * row.accuracy, s=50, zorder=2, color=f"C{index}",
                     label=f"{row.stage}: {size:.3g} MB, {row.accuracy:.2%}")
    left.set(xscale="log", xlabel="size of the weights (MB, log)", ylabel="validation accuracy (%)",
             title="accuracy against size")
    left.legend(fontsize=8, loc="best")
    left.grid(alpha=0.3)

    for path in sorted(folder.glob("[0-9][0-9]-*/metrics.csv")):
        by_training: dict[str, list[dict[str, str]]] = {}
        for epoch in read_csv(path):
            if epoch["validation_accuracy"]:  # not measured after every epoch
                by_training.setdefault(epoch["training"], []).append(epoch)
        for name, epochs in by_training.items():
            right.plot([int(epoch["epoch"]) for epoch in epochs],
                       [100 * float(epoch["validation_accuracy"]) for epoch in epochs],
                       marker="." if len(epochs) < 40 else None, label=name)
    right.set(xlabel="epoch", ylabel="validation accuracy (%)", title="training")
    if right.lines:
        right.legend(fontsize=8)
    right.grid(alpha=0.3)
    figure.suptitle(title)
    write_figure(folder / "plot.png", figure, dpi=120)
