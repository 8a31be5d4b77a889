"""Tables that the verbs print: the ledger of a run, the results of a training, what an import found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from compress.pipeline.importing import Imported
from compress.pipeline.report import HEADER, cells
from metadata.records import LedgerRow


def print_ledger(console: Console, rows: list[LedgerRow]) -> None:
    """Print the ledger as a table."""
    table = Table(title="what each stage left (validation accuracy; latency: batch 1, one thread)", box=box.SIMPLE_HEAD,
                  pad_edge=False, collapse_padding=True)  # fits 80 columns
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)


def print_training(console: Console, folder: Path, summary: dict[str, Any]) -> None:
    """Print the results of a training, and the files that hold it."""
    table = Table(title=f"{summary['model']['name']}: {summary['parameters']:,} parameters, {summary['macs'] / 1e6:,.2f} M "
                        "MACs", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("split", "images", "right", "accuracy", "loss"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for name in ("validation", "test"):
        if name in summary:
            found = summary[name]
            table.add_row(name, f"{found['images']:,}", f"{found['correct']:,}", f"{found['accuracy']:.2%}",
                          f"{found['loss']:.4f}")
    console.print(table)
    console.print(f"weights of epoch {summary['kept_epoch']} of {summary['epochs']}, {summary['seconds']:,.1f} s of "
                  f"training, {summary['images_per_second']:,.0f} images/s", highlight=False)
    for what, name in (("weights", "weights.pth"), ("metrics", "metrics.csv"), ("curves", "curves.png"),
                       ("summary", "summary.json")):
        console.print(f"{what + ':':12}{folder / name}", highlight=False, soft_wrap=True)


def print_imported(console: Console, source: Path, found: Imported) -> None:
    """Print what became of an ONNX file, and how it was compared."""
    table = Table(title=f"{source.name} as {found.architecture.model_type}", box=box.SIMPLE_HEAD, pad_edge=False,
                  show_header=False)
    shape, classes = found.architecture.input_shape, found.architecture.num_classes
    rows = [("images", str(list(shape))), ("classes", f"{classes:,}"), ("layers", f"{len(found.architecture.layers):,}"),
            ("parameters", f"{found.parameters:,}"), ("MACs", f"{found.macs:,}"),
            ("largest difference from ONNX Runtime", f"{found.difference:.1e} of the largest logit, {found.compared}")]
    rows += [(f"test accuracy of the {name}", f"{value:.2%}") for name, value in found.accuracy.items()]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for text in found.notes:
        console.print(text, highlight=False, soft_wrap=True)
    console.print(f"model:      folder:{found.folder}", highlight=False, soft_wrap=True)
