"""Whether a network keeps the limits, by how much it misses them, and what relaxing one would buy."""

from __future__ import annotations

from collections.abc import Sequence

from compress.search.entrants import Entrant
from compress.search.solve import KB, Limits

TOLERANCE = 0.03  # by which a measured latency may exceed its limit: two measurements differ by as much


def latency_excess(entrant: Entrant, limits: Limits) -> float:
    """Return by which share the measured latency exceeds its limit beyond what cannot be told; at most 0 if it is kept."""
    if limits.latency_ms is None or entrant.latency_ms is None:
        return 0.0
    return entrant.latency_ms / limits.latency_ms - 1 - max(TOLERANCE, entrant.noise)


def size_excess(entrant: Entrant, limits: Limits) -> float:
    """Return by which share the file exceeds its limit; at most 0 where it is kept. Bytes are exact."""
    return 0.0 if limits.size_kb is None else entrant.size_bytes / (KB * limits.size_kb) - 1


def accuracy_lack(entrant: Entrant, limits: Limits) -> float:
    """Return how much validation accuracy is missing, a fraction; at most 0 where it is enough."""
    return 0.0 if limits.min_accuracy is None else limits.min_accuracy - (entrant.accuracy or 0.0)


MISSES = {"latency_ms": latency_excess, "size_kb": size_excess, "min_accuracy": accuracy_lack}


def missed(entrant: Entrant, limits: Limits) -> dict[str, float]:
    """Return the limits that a network misses, with how much it misses each by."""
    return {name: by for name, miss in MISSES.items() if (by := miss(entrant, limits)) > 1e-9}


def violation(entrant: Entrant, limits: Limits) -> int:
    """Return 0 where a network keeps the limits of time and bytes, 1 where it may, as far as can be told, else 2.

    Of many networks that are measured, some seem faster than they are: those that keep a limit as measured are preferred,
    so that the answer keeps it when it is measured again.
    """
    if {"latency_ms", "size_kb"} & set(missed(entrant, limits)):
        return 2
    return int(limits.latency_ms is not None and entrant.latency_ms is not None and entrant.latency_ms > limits.latency_ms)


def described(entrant: Entrant) -> str:
    """Return what was measured of a network, in words."""
    parts = [f"{entrant.size_bytes / KB:,.1f} kB"]
    if entrant.latency_ms is not None:
        parts.insert(0, f"{entrant.latency_ms:.3f} ms (± {entrant.noise:.1%})")
    if entrant.accuracy is not None:
        parts.append(f"{entrant.accuracy:.2%} of {entrant.images} validation images")
    return f"candidate {entrant.name}: {', '.join(parts)}"


def nearest_by_each(entrants: Sequence[Entrant], limits: Limits) -> list[str]:
    """Return a text for each limit that no network keeps together with the others: which is nearest, what it would take.

    Args:
        entrants: that were measured, the student among them.
        limits: of which each network misses one at least.
    """
    texts = []
    measured = [entrant for entrant in entrants if entrant.accuracy is not None]
    for name, miss in MISSES.items():
        if getattr(limits, name) is None:
            continue
        others = [entrant for entrant in measured if not set(missed(entrant, limits)) - {name}]
        if others:
            best = min(others, key=lambda entrant: (miss(entrant, limits), -(entrant.accuracy or 0.0)))
            texts.append(f"with {name} {_needed(best, name)} instead of {getattr(limits, name):g}, {described(best)} would "
                         "do")
        elif measured:
            best = min(measured, key=lambda entrant: miss(entrant, limits))
            texts.append(f"nearest by {name}: {described(best)}, which misses other limits too")
    return texts


def _needed(entrant: Entrant, name: str) -> str:
    """Return the limit that a network would keep, with three digits."""
    if name == "latency_ms":
        return f"{entrant.latency_ms:.3g}"
    return f"{entrant.size_bytes / KB:.4g}" if name == "size_kb" else f"{entrant.accuracy:.3f}"
