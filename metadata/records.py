"""Records that a run writes: cards of data sets, ledger rows, stages, baselines."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from metadata.formats import packaged_json
from metadata.schemas import Baselines, StatedPreprocessing, Strict


class DatasetCard(Strict):
    """A data set's classes and images, and how an image becomes the model's input."""

    name: str
    class_names: list[str]
    input_shape: tuple[int, int, int] = Field(description="(C, H, W) after preprocessing")
    preprocessing: StatedPreprocessing
    flip: bool = Field(True, description="whether a mirrored image still shows its class")
    counts: dict[str, int] = Field({}, description="number of images of each split")
    fingerprint: str = Field("", description="a hash of the content")
    content: dict[str, dict[str, str]] = Field({}, description="for each split and class, the number of images and a hash "
                                               "of their bytes in order; see loaders/content.py")

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
    """A model by name, for teachers, which need not be traceable."""

    name: str
    num_classes: int
    options: dict[str, Any] = {}


class LedgerRow(Strict):
    """The pipeline's measurement of the model after a stage. Accuracy is a fraction of the split."""

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
    """`stage.json`. It is written last, so a stage folder that holds it is complete."""

    schema_version: Literal[1] = 1
    stage: str
    key: str = Field(description="hash of what the stage was made from")
    made_from: dict[str, dict[str, Any]] = Field({}, description="settings, data, files and code that decide the result; "
                                                 "earlier versions did not record them")
    config: dict[str, Any]
    notes: dict[str, Any] = {}
    warnings: list[str] = []
    rows: list[LedgerRow] = []


def dataset_cards() -> dict[str, dict[str, Any]]:
    """Return the built-in data sets of `datasets.json`, by name."""
    return packaged_json("datasets.json")


def baselines() -> dict[str, Baselines]:
    """Return the named baselines of `baselines.json`."""
    return {name: Baselines.model_validate(values) for name, values in packaged_json("baselines.json").items()}
