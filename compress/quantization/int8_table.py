"""The table that a quantize stage prints: for each layer its type with the reason, its error, and its latency."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from metadata.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Int8Row:
    """One layer after quantization.

    Args:
        layer: its name.
        kind: "Conv2d" or "Linear", or a subclass's name.
        dtype: "int8" or "float32".
        reason: why it has this type.
        weights: number of weights, without the bias.
        macs_share: share of the model's multiply-adds.
        sqnr_db: of its output against the float model's output, on real or random inputs; None where it was not measured.
        before_ms, after_ms: latency of the layer alone at batch 1, as float and as int8; None where it was not measured.
    """

    layer: str
    kind: str
    dtype: str
    reason: str
    weights: int
    macs_share: float
    sqnr_db: float | None = None
    before_ms: float | None = None
    after_ms: float | None = None


def sqnr_db(expected: Tensor, got: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio, 10 log10(|expected|^2 / |got - expected|^2) dB, at most 200."""
    expected, got = expected.detach().double(), got.detach().double()
    return decibels(float(expected.square().sum()), float((got - expected).square().sum()))


def decibels(signal: float, noise: float) -> float:
    """Return the ratio of two sums of squares in decibels, at most 200."""
    if noise <= signal * 1e-20:
        return 200.0
    return 10 * math.log10(max(signal, 1e-300) / noise)


def check_excluded(stage: str, exclude: Collection[str], layers: Collection[str]) -> None:
    """Raise UserError if a name in `exclude` is no layer of the network."""
    unknown = next((name for name in exclude if name not in layers), None)
    if unknown is not None:
        raise UserError(f"{stage}.exclude: {unknown!r} is no Conv2d or Linear layer of the model ({', '.join(layers)})")


def print_int8_table(rows: Sequence[Int8Row], console: Console) -> None:
    """Print the rows as a table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("kind")
    for name in ("MACs", "SQNR dB", "float ms", "int8 ms"):
        table.add_column(name, justify="right")
    table.add_column("type and reason", overflow="fold")
    for row in rows:
        numbers = ("" if value is None else text.format(value) for value, text in (
            (row.sqnr_db, "{:.1f}"), (row.before_ms, "{:.3f}"), (row.after_ms, "{:.3f}")))
        table.add_row(row.layer, row.kind, f"{row.macs_share:.1%}", *numbers, f"{row.dtype}: {row.reason}",
                      style="" if row.dtype == "int8" else "yellow")
    console.print(table)
