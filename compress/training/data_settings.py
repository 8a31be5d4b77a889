"""The settings of the data that a pipeline and `train` share, and the request to the loaders that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from compress.settings import Config
from loaders.request import Request
from metadata.schemas import Interpolation, Preprocessing, Sides


class DataSettings(Config):
    """Which images are read, and what becomes of them. The settings' owner adds the name of the set and its root."""

    download: bool = Field(False, description="let torchvision fetch a missing set")
    num_classes: int | None = Field(None, ge=1, description="refuse data with another number of classes")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="share of the images held out for testing, by the hash of "
                                 "their content, where data have no test split")
    image_root: Path | None = Field(None, description="folder that the paths of a CSV are relative to; that of the CSV "
                                    "unless given")
    columns: list[str] = Field([], description="a table's columns of images and labels, and perhaps of splits, by name or "
                               "by number from 1, such as file,species; found by themselves unless given")
    image_size: Sides | None = Field(None, description="pixels of both sides of the input, or [height, width]; the set's "
                                     "own unless given")
    channels: Literal[1, 3] | None = Field(None, description="3: gray as RGB, 1: RGB as gray; the set's own unless given")
    resize: Sides | None = Field(None, description="pixels of the shorter side, or [height, width] to cover; the set's own "
                                 "unless given")
    crop: Sides | None = Field(None, description="pixels of the central square, or [height, width]; the set's own unless "
                               "given")
    interpolation: Interpolation | None = Field(None, description="of the resize; the set's own unless given")
    exif_orientation: bool | None = Field(None, description="turn pictures as their EXIF data say; true unless given")
    mean: list[float] | None = Field(None, description="per channel; the set's own unless given")
    std: list[float] | None = Field(None, description="per channel; the set's own unless given")
    memory_limit_gb: float = Field(4.0, gt=0, description="splits that decode to more are streamed from disk")
    skip_unreadable: bool = Field(False, description="leave damaged images out and report their number")

    WHERE: ClassVar = frozenset({"image_root", "download", "num_classes", "skip_unreadable", "memory_limit_gb"})

    def request(self, **others: Any) -> Request:
        """Return the settings as the loaders take them; `others` are the fields of a request that no setting here says."""
        replaced = {key: value for key in Preprocessing.model_fields if (value := getattr(self, key, None)) is not None}
        shared = {key: getattr(self, key) for key in DataSettings.model_fields if key not in Preprocessing.model_fields}
        return Request(preprocessing=replaced, **shared, **others)
