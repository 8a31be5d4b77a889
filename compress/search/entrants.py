"""What a search has on disk: the networks that race, what was measured of them, and front.csv."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from compress.search.serving import Serving
from compress.search.sizes import Form
from compress.search.space import Choice
from compress.search.timings import Backend
from metadata.files import read_json, write_json
from metadata.formats import write_csv
from metadata.schemas import Strict

STATE, FRONT = "race.json", "front.csv"
Status = Literal["racing", "out", "replaced", "failed", "won", "trained", "answer"]


class Entrant(Strict):
    """A network of the race, or another one that was measured beside it.

    Args:
        id: its number; 0 is the student as it came.
        criterion: that ranked the channels.
        solver: "milp": the best widths by the models of cost and value; "uniform": one share of all channels.
        depth: whether blocks were allowed to go.
        backend, form: how it is served.
        widths, dropped: the sub-network.
        size_bytes: of the weights file; 0 before it was made.
        predicted_ms: of the cost model, where time is a limit or a goal.
        loss: predicted by the value model, on a scale of its own.
        gap: by which the solution may be worse than the best, as the solver proved.
        factor: by which the predicted latency was corrected before this network was solved for.
        latency_ms, noise: as measured, with one standard error as a share; None before.
        pace: seconds of a training step.
        round: number of rounds that it has trained in.
        steps: of training over all rounds.
        correct, images: right answers on the validation split, in float32 while it races, and as served in the end.
        quantized: what was chosen when it became int8, in words.
        status: "won" is the winner of the race; "trained" and "answer" are its forms as served, the last the best.
        message: why it failed or was replaced.
    """

    id: int
    criterion: str
    solver: Literal["milp", "uniform", "none"]
    depth: bool
    backend: Backend
    form: Form
    widths: dict[str, int]
    dropped: list[str]
    macs: int
    parameters: int
    size_bytes: int
    model: str
    predicted_ms: float | None = None
    loss: float | None = None
    gap: float | None = None
    factor: float = 1.0
    latency_ms: float | None = None
    noise: float = 0.0
    pace: float | None = None
    round: int = 0
    steps: int = 0
    correct: int | None = None
    images: int = 0
    status: Status = "racing"
    quantized: str = ""
    message: str = ""

    @property
    def serving(self) -> Serving:
        """How it is served."""
        return Serving(self.backend, self.form)

    @property
    def choice(self) -> Choice:
        """The sub-network."""
        return Choice(widths=self.widths, dropped=frozenset(self.dropped))

    @property
    def accuracy(self) -> float | None:
        """Share of the validation images that are right, or None before it was measured."""
        return None if self.correct is None else self.correct / self.images

    @property
    def name(self) -> str:
        """Its number and what makes it different, in words."""
        if self.solver == "none":
            return "the student"
        how = "uniform" if self.solver == "uniform" else self.criterion + (", depth" if self.depth else "")
        return f"{self.id} ({how}, {self.serving.name})"

    def row(self) -> dict[str, Any]:
        """Return the row of front.csv."""
        settings = {"criterion": self.criterion, "solver": self.solver, "depth": self.depth, "backend": self.backend,
                    "widths": self.widths, "dropped": self.dropped, "steps": self.steps, "quantized": self.quantized,
                    "predicted_ms": self.predicted_ms, "gap": self.gap, "message": self.message}
        return {"candidate": self.id, "model": self.model, "form": self.form, "latency_ms": _rounded(self.latency_ms),
                "size_bytes": self.size_bytes, "macs": self.macs, "parameters": self.parameters,
                "validation_accuracy": self.accuracy, "validation_images": self.images, "round": self.round,
                "status": self.status, "settings": json.dumps(settings), "latency_noise": _rounded(self.noise)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


class RaceState(Strict):
    """How far a search has come.

    Args:
        entrants: all networks, in order of their numbers.
        calm_ms: see `compress.search.serving.Stopwatch`; None before the first measurement.
        steps: of each round that has begun, for each of its trainings.
        halved: number of rounds that are over.
        race_ends: seconds of the clock when the race should be over.
        factors: measured over predicted latency, by serving.
        making: seconds that it takes to make a network ready to be served.
        student_ms: latency of the student at the calmest moment so far, by serving.
        servings: the ways to serve that were chosen among, by name.
    """

    entrants: list[Entrant] = []
    calm_ms: float | None = None
    steps: list[int] = []
    halved: int = 0
    race_ends: float | None = None
    factors: dict[str, float] = {}
    making: float = 0.0
    student_ms: dict[str, float] = {}
    servings: list[str] = []

    def racing(self) -> list[Entrant]:
        """Return those that are not out."""
        return [entrant for entrant in self.entrants if entrant.status == "racing"]

    def next_id(self) -> int:
        """Return the number of the next network."""
        return len(self.entrants)

    def calmest(self) -> float:
        """Return the reference's latency at the calmest moment, or infinity."""
        return math.inf if self.calm_ms is None else self.calm_ms

    def save(self, folder: Path) -> None:
        """Write the state and front.csv, which holds what was measured."""
        write_json(folder / STATE, self.model_dump(mode="json"))
        rows = [entrant.row() for entrant in self.entrants if entrant.latency_ms is not None or entrant.images]
        if rows:
            write_csv(folder / FRONT, rows)

    @classmethod
    def load(cls, folder: Path) -> RaceState:
        """Return the state that a folder holds, or that of a search that has not begun."""
        return read_json(folder / STATE, cls) if (folder / STATE).is_file() else cls()
