"""The summary of repeated measurements that all benchmarks use."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the range, to one decimal, and the number of measurements."""
    return {"median": round(statistics.median(values), 1), "lowest": round(min(values), 1),
            "highest": round(max(values), 1), "n": len(values)}
