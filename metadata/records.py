"""Records of what a run writes down: cards of data sets, ledger rows, stages, baselines."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from metadata.formats import packaged_json
from metadata.schemas import Baselines, Preprocessing, Strict


class DatasetCard(Strict):
    """What a data set is: its classes, its images, and how an image becomes the model's input."""

    name: str
    class_names: list[str]
    input_shape: tuple[int, int, int] = Field(description="(C, H, W) after preprocessing")
    preprocessing: Preprocessing
    flip: bool = Field(True, description="whether a mirrored image still shows its class")
    counts: dict[str, int] = Field({}, description="images a split")
    fingerprint: str = Field("", description="changes when the images on disk change")

    @model_validator(mode="before")
    @classmethod
    def _know_flip(cls, content: Any) -> Any:
        """Take `flip` from `datasets.json` where the card does not say, as in files of earlier versions."""
        if isinstance(content, dict) and "flip" not in content:
            known = dataset_cards().get(str(content.get("name")), {})
            return {**content, "flip": known.get("flip", True)}
        return content

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


class ModelReference(Strict):
    """A model by name, for teachers: they may be anything that can be built, traceable or not."""

    name: str
    num_classes: int
    options: dict[str, Any] = {}


class LedgerRow(Strict):
    """What the pipeline measured after a stage. Accuracy is a fraction of the split."""

    stage: str
    split: Literal["validation", "test"] = "validation"
    parameters: int
    macs: int
    size_bytes: int
    latency_ms: float = Field(description="median at batch 1, one thread")
    latency_p5_ms: float
    latency_p95_ms: float
    accuracy: float
    correct: int
    images: int
    seconds: float = Field(description="wall clock of the stage itself, all sittings of an interrupted one")


class StageRecord(Strict):
    """`stage.json`: written last, so a stage folder that holds it is complete."""

    schema_version: Literal[1] = 1
    stage: str
    key: str = Field(description="hash of the stage's settings, its parent's key and its source")
    config: dict[str, Any]
    notes: dict[str, Any] = {}
    warnings: list[str] = []
    rows: list[LedgerRow] = []


def dataset_cards() -> dict[str, dict[str, Any]]:
    """What `datasets.json` knows of the built-in data sets."""
    return packaged_json("datasets.json")


def baselines() -> dict[str, Baselines]:
    """The named baselines of `baselines.json`."""
    return {name: Baselines.model_validate(values) for name, values in packaged_json("baselines.json").items()}
