"""Schemas of a submission's metadata, and field types that the layer table shares with them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel, BeforeValidator, ConfigDict, FailFast, Field, PlainSerializer, PlainValidator, model_validator)


ARCHITECTURE_FILE = "trained_pruned_architecture.json"
METADATA_FILE = "model_metadata.json"


class Strict(BaseModel):
    """Base of the files that the toolkit writes: an unknown or missing key is an error."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


Size = Annotated[int, Field(ge=1, le=2**20)]
Pair = Annotated[tuple[Size, Size], BeforeValidator(_pair)]
Padding = Annotated[tuple[Annotated[int, Field(ge=0, le=2**16)], Annotated[int, Field(ge=0, le=2**16)]],
                    BeforeValidator(_pair)]
MAX_FLOAT32 = 3.4028234663852886e38
Number = Annotated[float, Field(ge=-MAX_FLOAT32, le=MAX_FLOAT32)]
Epsilon = Annotated[float, Field(ge=0, le=MAX_FLOAT32)]
# A dimension of a tensor, counted from the start or from the end.
Dimension = Annotated[int, Field(ge=-8, le=7)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
MAX_LAYERS = 10_000
# A list of texts, such as class names: the first wrong entry ends the check of what may be a list of a hundred thousand.
Texts = Annotated[list[str], FailFast()]
# A path inside the submission. Opening the file checks that no ".." or link leaves the folder.
FileName = Annotated[str, Field(pattern=r"\A[A-Za-z0-9_][A-Za-z0-9_./ -]*\z", max_length=200)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Identifier = Annotated[str, Field(pattern=r"\A[A-Za-z_][A-Za-z0-9_]*\z", max_length=200)]
# Layer names become attribute paths of generated code (torch.fx), so the alphabet is narrow.
LayerName = Annotated[str, Field(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9][A-Za-z0-9_-]*)*\z",
                                  max_length=200)]


# Pillow's resampling filters, by the names that Pillow, torchvision and timm share.
Interpolation = Annotated[Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"],
                          BeforeValidator(lambda value: value.lower().removeprefix("interpolationmode.")
                                          if isinstance(value, str) else value)]


def read_sides(value: Any) -> int | tuple[int, int]:
    """Return [height, width] as one number where both are equal, so that a size has one spelling."""
    sides = [value, value] if isinstance(value, int | float) else list(value) if isinstance(value, list | tuple) else []
    if len(sides) != 2 or not all(type(side) is int or (type(side) is float and side.is_integer()) for side in sides):
        raise ValueError("expected a number of pixels, or two: [height, width]")
    if not all(1 <= side <= 2**20 for side in sides):
        raise ValueError(f"expected pixels from 1 to {2**20:,}")
    return int(sides[0]) if sides[0] == sides[-1] else (int(sides[0]), int(sides[1]))


# Pixels of both sides of an image, or [height, width].
Sides = Annotated[int | tuple[int, int], PlainValidator(read_sides),
                  PlainSerializer(lambda sides: list(sides) if isinstance(sides, tuple) else sides)]


def height_and_width(sides: int | tuple[int, int]) -> tuple[int, int]:
    """Return the pixels of both sides."""
    return (sides, sides) if isinstance(sides, int) else sides


# Bounds within which a normalized pixel is a plain float32: people write 0.485, or 123.7 where pixels go up to 255.
PixelMean = Annotated[float, Field(ge=-1e6, le=1e6)]
PixelDeviation = Annotated[float, Field(ge=1e-6, le=1e6)]


class Preprocessing(Strict):
    """How an image file becomes the model's input: resize, crop the centre, scale to [0, 1], normalize.

    The resize keeps the picture's proportions: the picture becomes the smallest that covers [height, width]. One number
    stands for both, and so for the length of the shorter side.
    """

    mode: Literal["RGB", "L"] = "RGB"
    resize: Sides | None = Field(256, description="pixels of the shorter side, or [height, width] to cover; null: "
                                 "unchanged")
    interpolation: Interpolation = Field("bilinear", description="of the resize, with antialiasing, as Pillow computes it")
    exif_orientation: bool = Field(True, description="turn a picture as the orientation in its EXIF data says")
    crop: Sides | None = Field(224, description="pixels of the central square, or [height, width]; null: unchanged")
    mean: list[PixelMean] = Field([0.485, 0.456, 0.406], max_length=3, description="per channel, after scaling to [0, 1]")
    std: list[PixelDeviation] = Field([0.229, 0.224, 0.225], max_length=3, description="per channel")

    @model_validator(mode="after")
    def _channels(self) -> Preprocessing:
        channels = 3 if self.mode == "RGB" else 1
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(f"mode {self.mode} needs {channels} values in mean and in std")
        return self

    @property
    def covered(self) -> tuple[int, int] | None:
        """(height, width) that a resized picture covers, or None where pictures keep their size."""
        return height_and_width(self.resize) if self.resize else None

    @property
    def window(self) -> tuple[int, int] | None:
        """(height, width) of the crop, or None where nothing is cropped."""
        return height_and_width(self.crop) if self.crop else None


def _as_stated(value: Any) -> Any:
    return {"exif_orientation": False, **value} if isinstance(value, dict) else value


# The preprocessing that a file states. A file that does not mention the orientation takes pictures as they are stored.
StatedPreprocessing = Annotated[Preprocessing, BeforeValidator(_as_stated)]


class Baselines(Strict):
    """The model that a submission is compared with; the scores are ratios to these values."""

    size_mb: float = Field(50.0, gt=0, description="MB (2^20 bytes)")
    latency_ms: float = Field(10.0, gt=0, description="milliseconds at batch 1")
    accuracy: float = Field(80.0, gt=0, description="percent")


class PruningInfo(Strict):
    """The channels that structured pruning removed. `remaining_channels` must equal the weights' first dimension."""

    type: Literal["structured"] = "structured"
    num_channels_pruned: Count
    remaining_channels: Size


class FileRecord(Strict):
    """A file of the submission."""

    sha256: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
    bytes: Count


class Quantization(Strict):
    """The scheme, and for every layer whether it is int8, or why it stayed float."""

    scheme: Literal["none", "dynamic_int8", "static_int8"]
    layers: Annotated[dict[str, str], Field(max_length=MAX_LAYERS)] = {}


class ModelMetadata(BaseModel):
    """`model_metadata.json`. Unknown keys are kept: submissions carry notes of their own.

    `parameters` counts every stored number, in an ONNX file those of its initializers. `runtime` is the fastest runtime
    of a model file. `portability` says whether the accuracy also holds on CPUs whose int8 products saturate.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    schema_version: Literal[1] = Field(1, alias="schema")
    model_format: Literal["pytorch", "onnx", "litert", "executorch", "openvino", "torch_export"]
    architecture: str
    num_classes: Size
    class_names: Texts
    architecture_file: FileName | None = Field(ARCHITECTURE_FILE, description="null for a file that is a graph of its own")
    weights_file: FileName
    input_shape: tuple[Size, Size, Size]
    preprocessing: StatedPreprocessing
    quantization: Quantization
    parameters: Count
    macs: Count
    files: Annotated[dict[FileName, FileRecord], Field(max_length=10_000)]
    accuracy: dict[str, Any] = {}
    latency: dict[str, Any] = {}
    runtime: Literal["onnxruntime", "openvino", "litert", "executorch", "torch_export"] | None = None
    portability: dict[str, Any] | None = None
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _names_match(self) -> ModelMetadata:
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} names, num_classes is {self.num_classes}")
        if self.model_format == "pytorch" and not self.architecture_file:
            raise ValueError("model_format pytorch needs an architecture_file")
        for name in (self.architecture_file, self.weights_file):
            if name and name not in self.files:
                raise ValueError(f"files does not state the hash of {name}")
        return self
