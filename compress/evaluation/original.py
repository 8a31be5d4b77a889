"""Read the original style of submission: a folder with its own model.py or .onnx, and metadata in many variants."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from compress.evaluation.submission import MAX_FILE_BYTES, SubmissionFiles, submission_files
from metadata.errors import VerificationError
from metadata.files import inside, read_json
from metadata.schemas import FileName, Preprocessing, Size, StatedPreprocessing


def _original_format(value: Any) -> Any:
    text = str(value).lower().lstrip(".")
    return {"pt": "pytorch", "pth": "pytorch", "torch": "pytorch"}.get(text, text)


def _original_shape(value: Any) -> Any:
    if isinstance(value, int):
        value = [value, value]
    if isinstance(value, list):
        value = value[-3:]
        return [3, *value] if len(value) == 2 else value
    return value


def _original_preprocessing(value: Any) -> Any:
    """Rename the keys that people use to the toolkit's."""
    if not isinstance(value, dict):
        return value
    value = dict(value)
    normalization: Any = next((value.pop(key) for key in ("normalize", "normalization") if key in value), {})
    value |= normalization if isinstance(normalization, dict) else {}
    for ours, theirs in (("resize", ("resize_size",)), ("crop", ("center_crop", "crop_size", "input_size", "image_size"))):
        for key in theirs:
            if key in value:
                value.setdefault(ours, value.pop(key))
        if isinstance(value.get(ours), list) and value[ours] and all(size == value[ours][0] for size in value[ours]):
            value[ours] = value[ours][0]
    return value


class OriginalMetadata(BaseModel):
    """`model_metadata.json` or `metadata.json` of a submission in the original style, in the variants that people use."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model_format: Annotated[Literal["pytorch", "onnx"], BeforeValidator(_original_format)] | None = None
    architecture: Any = Field(None, validation_alias=AliasChoices(
        "model_class", "architecture", "model_type", "model_name"))
    weights_file: FileName | None = Field(None, validation_alias=AliasChoices(
        "weights_file", "model_file", "model_path", "weights", "checkpoint"))
    architecture_file: FileName | None = None
    num_classes: Size | None = None
    class_names: list[str] | None = None
    input_shape: Annotated[tuple[Size, Size, Size], BeforeValidator(_original_shape)] | None = Field(
        None, validation_alias=AliasChoices("input_shape", "input_size"))
    preprocessing: Annotated[StatedPreprocessing, BeforeValidator(_original_preprocessing)] | None = None


def read_original(folder: Path, path: Path) -> SubmissionFiles:
    """Read a folder whose metadata file `path` has no `schema` key.

    Raises:
        VerificationError: a file is missing, malformed, over the limit or outside the folder, or the folder has no model.
    """
    metadata: OriginalMetadata = read_json(path, OriginalMetadata)
    suffixes = {"onnx": {".onnx"}, "pytorch": {".pth", ".pt"}, None: {".onnx", ".pth", ".pt"}}[metadata.model_format]
    if metadata.weights_file:
        weights = inside(folder, metadata.weights_file)
    else:
        found = [file for file in submission_files(folder) if file.suffix.lower() in suffixes]
        if len(found) != 1:
            raise VerificationError(f"{folder}: {path.name} names no weights_file, and {len(found)} files end in "
                                    f"{' or '.join(sorted(suffixes))}")
        weights = found[0]
    if not weights.is_file():
        raise VerificationError(f"{weights}: {path.name} names this file, but it is not there")
    if weights.stat().st_size > MAX_FILE_BYTES:
        raise VerificationError(f"{weights}: {weights.stat().st_size:,} bytes are over the limit of {MAX_FILE_BYTES:,}")
    kind: Literal["onnx", "code"] = "onnx" if weights.suffix.lower() == ".onnx" else "code"
    if metadata.model_format and (metadata.model_format == "onnx") != (kind == "onnx"):
        raise VerificationError(f"{weights}: model_format in {path.name} is {metadata.model_format}")
    if kind == "code" and not (folder / "model.py").is_file():
        raise VerificationError(f"{folder}: neither the toolkit's format ({path.name} has no schema) nor a model.py")
    preprocessing = metadata.preprocessing or Preprocessing(exif_orientation=False)  # as torchvision reads pictures
    size = preprocessing.crop or 224
    named = metadata.architecture
    return SubmissionFiles(
        folder=folder, kind=kind, weights=weights, preprocessing=preprocessing, metadata_path=path,
        input_shape=metadata.input_shape or (len(preprocessing.mean), size, size),
        preprocessing_from=path.name if metadata.preprocessing else
        f"the original's default, as {path.name} states none",
        num_classes=metadata.num_classes, class_names=metadata.class_names,
        architecture_path=inside(folder, metadata.architecture_file) if metadata.architecture_file else None,
        model_class=named if isinstance(named, str) and named.isidentifier() else None)
