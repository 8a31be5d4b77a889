"""What benchmarks say of repeated measurements, in the same words everywhere."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, how far the measurements reach, to one decimal, and how many there are."""
    return {"median": round(statistics.median(values), 1), "lowest": round(min(values), 1),
            "highest": round(max(values), 1), "n": len(values)}
