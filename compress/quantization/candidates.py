"""The records of a search for static int8 (compress/quantization/search.py): its request, its candidates, its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from compress.quantization.saturation import Backend
from compress.quantization.static import Int8Network, StaticSettings
from compress.quantization.weights import WeightForm

SENSITIVE, SLOWER = "returned to float for its effect on the logits", "faster in float"


@dataclass(kw_only=True)
class Candidate:
    """An int8 file with its measurements.

    Args:
        settings: how it was quantized.
        kept_float: layers that stay float in addition to those that the settings or the user named.
        reason: why they stay float.
        quantized: the network.
        content: the ONNX file.
        correct: number of right answers on the validation images.
        images: number of validation images.
        int8_ms: int8 latency of the layers that stay float because int8 makes them slower.
        latency_ms: at batch 1 on one thread, interleaved with the other candidates; None until it is measured.
        portability: see compress/quantization/portability.py; None where it was not verified.
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
        """The latency, which must have been measured."""
        assert self.latency_ms is not None
        return self.latency_ms

    def row(self) -> dict[str, Any]:
        """Return the row for stage.json."""
        return {"name": self.name, "settings": asdict(self.settings), "kept_float": list(self.kept_float),
                "kept_float_reason": self.reason if self.kept_float else None,
                "size_bytes": len(self.content), "correct": self.correct, "images": self.images,
                "accuracy": self.correct / self.images, "latency_ms": self.latency_ms,
                "portable": None if self.portability is None else self.portability["holds"]}


def name_of(settings: StaticSettings, kept_float: Sequence[str], reason: str) -> str:
    """Return a candidate's settings in words."""
    count, how = len(kept_float), "for speed" if reason == SLOWER else "again"
    return str(settings) + (f", {count} layer{'s' * (count > 1)} float {how}" if count else "")


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What the user asked for.

    Args:
        max_drop: tolerated drop of validation accuracy against the float network, a fraction.
        portable: the accuracy must also hold on CPUs without VNNI.
        budget_seconds: for the search. A step that has begun is finished, and the portability of the candidates that would
            be chosen is verified in any case.
        exclude: layers that stay float.
        weights: the form of every candidate's weights; None: begin with pair-limited ones and try the others too.
    """

    max_drop: float
    portable: bool
    budget_seconds: float
    exclude: tuple[str, ...] = ()
    weights: WeightForm | None = None


@dataclass(kw_only=True)
class SearchResult:
    """The outcome of a search.

    Args:
        best: the candidate to take.
        reached: whether it has the requested accuracy and portability.
        candidates: all candidates, in the order in which they were tried.
        not_tried: names of the candidates for which there was no time.
        failed: the reasons of the candidates that could not be built or run, by name.
        float_correct: number of right answers of the float network on the validation images.
        images: number of validation images.
        float_ms: latency of the float network on the chosen runtime.
        backend: the chosen runtime.
        latencies: of every choice of operators and runtime, one row each.
        sensitivity: of each layer, where it was measured: mean squared error of the logits, relative to the variance of the
            float logits, when that layer alone is int8.
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
    latencies: list[dict[str, Any]]
    sensitivity: dict[str, float] = field(default_factory=dict)
