"""What a run leaves behind: its ledger, its metrics and its weights."""

from __future__ import annotations

import csv
from pathlib import Path

STAGES = ["teacher", "distill", "prune", "finetune", "quantize_dynamic", "package", "evaluate"]


def ledger(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's ledger."""
    with (folder / "ledger.csv").open() as file:
        return list(csv.DictReader(file))


def metrics(folder: Path) -> list[dict[str, str]]:
    """Return every epoch's row of every training, without what the clock says."""
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_second")}
            for path in sorted(folder.glob("*/metrics.csv")) for row in csv.DictReader(path.read_text().splitlines())]


def weights(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each stage's weights."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/weights.pth"))}
