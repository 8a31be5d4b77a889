"""What a search for static int8 is asked for, tries and finds: the records of compress/quantization/search.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from compress.quantization.portability import Backend
from compress.quantization.static import Int8Network, StaticSettings

SENSITIVE, SLOWER = "returned to float for its effect on the logits", "faster in float"


@dataclass
class Candidate:
    """An int8 file, and what was measured of it.

    Args:
        settings: how it was made.
        kept_float: layers that stay float, beside those that the settings or the user named.
        reason: why they do.
        quantized: the network.
        content: its file.
        correct: right answers on the validation images.
        images: so many.
        int8_ms: of layers that stay float because they are slower in int8, what they took there.
        latency_ms: at batch 1 on one thread, in turns with the others; None until it was measured.
        portability: see compress/quantization/portability.py; None where it was not looked at.
    """

    settings: StaticSettings
    kept_float: tuple[str, ...]
    reason: str
    quantized: Int8Network
    content: bytes
    correct: int
    images: int
    int8_ms: dict[str, float] = field(default_factory=dict)
    latency_ms: float | None = None
    portability: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The settings in words."""
        return name_of(self.settings, self.kept_float, self.reason)

    @property
    def milliseconds(self) -> float:
        """Its latency, which must have been measured."""
        assert self.latency_ms is not None
        return self.latency_ms

    def row(self) -> dict[str, Any]:
        """For the record."""
        return {"name": self.name, "settings": asdict(self.settings), "kept_float": list(self.kept_float),
                "kept_float_reason": self.reason if self.kept_float else None,
                "size_bytes": len(self.content), "correct": self.correct, "images": self.images,
                "accuracy": self.correct / self.images, "latency_ms": self.latency_ms,
                "portable": None if self.portability is None else self.portability["holds"]}


def name_of(settings: StaticSettings, kept_float: Sequence[str], reason: str) -> str:
    """A candidate in words."""
    count, how = len(kept_float), "for speed" if reason == SLOWER else "again"
    return str(settings) + (f", {count} layer{'s' * (count > 1)} float {how}" if count else "")


@dataclass(frozen=True)
class Wanted:
    """What the user asked for.

    Args:
        max_drop: of validation accuracy against the float network, a fraction.
        portable: the accuracy must also hold on CPUs without VNNI.
        budget_seconds: for the search; what was begun is ended, and the portability of those that would be chosen is looked
            at in any case.
        exclude: layers that stay float.
    """

    max_drop: float
    portable: bool
    budget_seconds: float
    exclude: tuple[str, ...] = ()


@dataclass
class Found:
    """The outcome of a search.

    Args:
        best: the candidate to take.
        reached: whether it has the accuracy, and the portability, that was asked for.
        candidates: all, in the order in which they were tried.
        not_tried: names of settings for which there was no time.
        failed: of candidates that could not be built or run, the reasons by their names.
        float_correct, images: the float network's right answers on the validation images.
        float_ms: its latency on the chosen runtime.
        times: of operators and runtimes, from which the search chose first.
        sensitivity: of each layer, where it was measured: mean squared error of the logits, relative to the float ones',
            when that layer alone is int8.
    """

    best: Candidate
    reached: bool
    candidates: list[Candidate]
    not_tried: list[str]
    failed: dict[str, str]
    float_correct: int
    images: int
    float_ms: float
    backend: Backend
    times: list[dict[str, Any]]
    sensitivity: dict[str, float] = field(default_factory=dict)
