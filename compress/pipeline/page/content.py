"""What the page tells of: a finished run, the models that it measured, and the epochs of its trainings."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from compress.evaluation.score import wilson
from compress.pipeline.config import RunConfig
from compress.settings import flattened
from loaders.splits import Split
from metadata.errors import UserError
from metadata.formats import read_csv
from metadata.records import DatasetCard, LedgerRow, StageRecord

FRONT, METRICS = "front.csv", "metrics.csv"  # of a stage: the candidates of a search, the epochs of its trainings
CANDIDATES, COVERAGE = "candidates", "coverage"  # notes of a stage: the files that it chose from, and its layers
Kind = Literal["float", "int8", "control", "float candidate", "int8 candidate", "test"]


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run whose stages have all finished.

    Args:
        folder: of the run.
        config: its settings.
        card: of its data.
        validation: the images that its models were measured on.
        records: one for each stage, in order.
        warnings: of the data and of all stages.
        results: the content of results.json, where the package was scored.
    """

    folder: Path
    config: RunConfig
    card: DatasetCard
    validation: Split
    records: list[StageRecord]
    warnings: list[str]
    results: dict[str, Any] | None

    @property
    def quantized(self) -> int:
        """The number of stages before the first one that left int8 layers; of all stages where none did."""
        return next((index for index, record in enumerate(self.records)
                     if any(layer["dtype"] == "int8" for layer in record.notes.get(COVERAGE, []))), len(self.records))

    def chosen_settings(self, stage: int) -> dict[str, Any]:
        """Return the settings that the recipe or an override gives a stage, by keys such as `train.lr`."""
        (options,) = self.config.stages[stage].values()
        return {key: value for key, value in flattened(options).items() if key}


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """A model as a point of the front.

    Args:
        name: of the stage or the candidate.
        kind: what it is; a control is a model that a stage made beside its result.
        number: of the stage, which stands in its point.
        target: the id of the element of the page that tells more.
        correct, images: right answers on the validation split, or on the test split for the kind "test".
        size_bytes: of the weights.
        latency_ms: at batch 1.
        spread_ms: its 5th and 95th percentile, where they are known.
        settings: by name.
    """

    name: str
    kind: Kind
    number: str
    target: str
    correct: int
    images: int
    size_bytes: int
    latency_ms: float | None
    spread_ms: tuple[float, float] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return self.correct / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy."""
        return wilson(self.correct, self.images)


def stage_id(index: int) -> str:
    """Return the id of the page's element that tells of a stage."""
    return f"stage-{index + 1}"


def measured_models(run: FinishedRun) -> list[MeasuredModel]:
    """Return what the plots of the front show: stages, controls, the package on the test split, and candidates.

    The package on the validation split is left out: it is the model of the stage before it again.
    """
    found: list[MeasuredModel] = []
    for index, record in enumerate(run.records):
        if record.stage.endswith("-package"):
            continue
        found += [_of_row(row, run, index, is_result=place == 0) for place, row in enumerate(record.rows)]
        found += _candidates(run, index)
    return found


def _of_row(row: LedgerRow, run: FinishedRun, index: int, is_result: bool) -> MeasuredModel:
    kind: Kind = ("test" if row.split == "test" else "control" if not is_result
                  else "int8" if index >= run.quantized else "float")
    return MeasuredModel(name=row.stage, kind=kind, number=str(index + 1), target=stage_id(index), correct=row.correct,
                         images=row.images, size_bytes=row.size_bytes, latency_ms=row.latency_ms,
                         spread_ms=(row.latency_p5_ms, row.latency_p95_ms), settings=run.chosen_settings(index))


def candidate_tables(run: FinishedRun, index: int) -> list[dict[str, Any]]:
    """Return the rows of the models that a stage measured to choose from: of a search, or of static int8."""
    searched: list[dict[str, Any]] = [{key: _content(value) for key, value in row.items()}
                                      for row in read_csv(run.folder / run.records[index].stage / FRONT)]
    return searched or [{"candidate": row["name"], "form": "int8", **{key: row[key] for key in row if key != "name"}}
                        for row in run.records[index].notes.get(CANDIDATES, [])]


def _content(cell: str) -> Any:
    """Return what a cell of a CSV file holds: JSON, or its text."""
    with contextlib.suppress(ValueError):
        return json.loads(cell)
    return cell or None


def _candidates(run: FinishedRun, index: int) -> list[MeasuredModel]:
    """Return the candidates of a stage that were measured; a search also lists those that were given up before."""
    found = []
    for place, row in enumerate(candidate_tables(run, index)):
        with contextlib.suppress(ValueError, TypeError, LookupError):  # an empty cell
            images = int(row.get("validation_images") or row["images"])
            accuracy = float(row.get("validation_accuracy") or row["accuracy"])
            told = {key: row[key] for key in ("model", "form", "round", "status", "settings") if row.get(key)}
            latency = row.get("latency_ms") or None
            found.append(MeasuredModel(
                name=str(row["candidate"]), number="", target=candidate_id(index, place),
                kind="int8 candidate" if "int8" in str(row.get("form")) else "float candidate",
                correct=round(accuracy * images), images=images, size_bytes=int(row["size_bytes"]),
                latency_ms=None if latency is None else float(latency), settings=flattened(told)))
    return [model for model in found if model.images > 0 and model.size_bytes > 0]


def candidate_id(index: int, place: int) -> str:
    """Return the id of the row that tells of a stage's candidate."""
    return f"{stage_id(index)}-candidate-{place + 1}"


def trainings(run: FinishedRun) -> dict[str, list[dict[str, float]]]:
    """Return the epochs of each training of each stage, by a name; what was not measured in an epoch is left out.

    Raises:
        UserError: a file of metrics is damaged.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for index, record in enumerate(run.records):
        path = run.folder / record.stage / METRICS
        try:
            for epoch in read_csv(path):
                stage = record.stage.partition("-")[2]
                name = f"{index + 1} {stage}" + ("" if epoch["training"] == stage else f": {epoch['training']}")
                found.setdefault(name, []).append({key: float(value) for key, value in epoch.items()
                                                   if key != "training" and value})
        except (LookupError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not the metrics of a training; move it away") from error
    return found
