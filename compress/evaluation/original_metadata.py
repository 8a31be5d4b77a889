"""Metadata of the original style of submission, in the many variants that people write.

A preprocessing may state, beside the toolkit's own keys: `value_range`, the numbers that black and white become before
mean and standard deviation ([0, 255] for a network that takes plain pixels), and `layout`, "NHWC" or "NCHW".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, RootModel, ValidationError

from compress.evaluation.file_formats import FILE_FORMATS
from metadata.errors import VerificationError, describe_validation_error
from metadata.files import JSON_TEXT, MAX_JSON_BYTES, parse_json, read_json
from metadata.schemas import Size, StatedPreprocessing

TORCH_WORDS = ("torch", "pt", "script", "jit", "statedict")
OTHER_WORDS = ("tensorflow", "keras", "savedmodel", "h5", "pb", "tf")
MAX_LEVEL = 1e30  # of a pixel as the network takes it
RESIZE, CROP = 256, 224  # pixels, where the metadata state none, as for the panel
WEIGHTS_KEYS = ("weights_file", "model_file", "model_path", "weights", "checkpoint")
AnyFileName = Annotated[str, Field(pattern=r"\A[^\x00-\x1f\x7f]+\z", max_length=200)]
COMMA_BEFORE_END = re.compile(rf"({JSON_TEXT.pattern})|,(?=\s*[}}\]])", re.DOTALL)


def read_loose_json(path: Path) -> dict[str, Any]:
    """Read metadata in JSON, with or without commas after the last entries (the competition's own template has one).

    Raises:
        VerificationError: not JSON in other ways.
    """
    try:
        return read_json(path, RootModel[dict[str, Any]]).root  # type: ignore[no-any-return]
    except VerificationError:
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            raise
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        try:
            content = parse_json(COMMA_BEFORE_END.sub(lambda found: found[1] or "", text))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise
        return content


def _original_format(value: Any) -> Any:
    """Return "pytorch", the name of another format, or None for words that say several or none: the file's name decides."""
    text = re.sub(r"[^a-z0-9]", "", str(value).lower())
    named = [each.name for each in FILE_FORMATS.values() if any(word in text for word in each.words)]
    torch_named = "torch" in text.replace("executorch", "") or "timm" in text
    if named:
        return None if torch_named or len(named) > 1 else named[0]
    if torch_named:
        return "pytorch"
    if any(word in text for word in OTHER_WORDS):
        suffixes = ", ".join(each.suffix for each in FILE_FORMATS.values())
        raise ValueError(f"this evaluator runs PyTorch models and files of {suffixes}")
    return "pytorch" if any(word in text for word in TORCH_WORDS) else None


def _original_names(value: Any) -> Any:
    """Return class names from a list, or from a dict by index."""
    if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
        return [value[key] for key in sorted(value, key=int)]
    return value


def _original_shape(value: Any) -> Any:
    if isinstance(value, int):
        value = [value, value]
    if isinstance(value, list):
        value = value[-3:]
        if len(value) == 3 and value[2] in (1, 3) and value[0] not in (1, 3):  # (H, W, C), as Keras and TensorFlow write it
            value = [value[2], *value[:2]]
        return [3, *value] if len(value) == 2 else value
    return value


def _original_layout(value: Any) -> Any:
    """Return "NHWC" or "NCHW" for the ways in which people write them."""
    words = {"channelslast": "NHWC", "hwc": "NHWC", "channelsfirst": "NCHW", "chw": "NCHW"}
    text = re.sub(r"[^a-z]", "", str(value).lower())
    return words.get(text, text.upper())


def _is_number(value: Any) -> bool:
    """Return whether a value of JSON is a number that pixels can have: finite, and far from where a float ends."""
    return isinstance(value, int | float) and abs(value) <= MAX_LEVEL


def _apply_range(value: dict[str, Any]) -> str | None:
    """Replace `value_range` by the mean and the deviation of pixels in [0, 1] that give the same numbers.

    Return what is wrong with it, if it is not two finite numbers, the lower one first.
    """
    key = next((key for key in ("value_range", "range", "input_range") if key in value), None)
    if key is None:
        return None
    limits = value.pop(key)
    numbers = isinstance(limits, list) and len(limits) == 2 and all(map(_is_number, limits))
    if not numbers or not limits[0] < limits[1]:
        return f"the {key} {str(limits)[:80]!r}, not two numbers, the lower one first, such as [0, 255]"
    low, span = limits[0], limits[1] - limits[0]
    channels = 1 if value.get("mode") == "L" else 3
    for name, plain in (("mean", 0.0), ("std", 1.0)):
        stated = value.get(name, [plain] * channels)
        if isinstance(stated, list) and all(map(_is_number, stated)):
            value[name] = [(number - (low if name == "mean" else 0)) / span for number in stated]
    return None


def _original_preprocessing(value: Any) -> tuple[Any, list[str]]:
    """Return a preprocessing with the toolkit's keys in the place of those that people use, and remarks on its sizes.

    Where one of the two sizes is stated, the other is filled in so that the crop fits into the resized picture.
    """
    if not isinstance(value, dict):
        return value, []
    value, remarks, squeezed = dict(value), [], False
    if odd := _apply_range(value):
        return None, [f"preprocessing states {odd}"]
    normalization: Any = next((value.pop(key) for key in ("normalize", "normalization") if key in value), {})
    value |= normalization if isinstance(normalization, dict) else {}
    for ours, theirs in (("resize", ("resize_size",)), ("crop", ("center_crop", "crop_size", "input_size", "image_size"))):
        for key in theirs:
            if key in value:
                value.setdefault(ours, value.pop(key))
        sizes = value.get(ours)
        if isinstance(sizes, list) and sizes and all(size == sizes[0] for size in sizes):
            value[ours] = sizes[0]
            squeezed |= ours == "resize" and len(sizes) == 2
        elif isinstance(sizes, list):
            return None, [f"preprocessing states {ours} {sizes}, which is not square"]
    resize, crop = (size if isinstance(size, int) and size > 0 else None for size in map(value.get, ("resize", "crop")))
    if resize and "crop" not in value:
        value["crop"] = crop = resize if squeezed else min(CROP, resize)
        remarks.append(f"preprocessing states resize {resize} and no crop: the crop was taken to be {crop}")
    elif crop and "resize" not in value:
        value["resize"] = resize = max(RESIZE, crop)
        remarks.append(f"preprocessing states crop {crop} and no resize: the resize was taken to be {resize}")
    elif resize and crop and crop > resize:
        return None, [f"preprocessing states a crop of {str(crop)[:80]} beyond the resize of {str(resize)[:80]}"]
    if squeezed:
        remarks.append(f"preprocessing states resize [{resize}, {resize}], which squeezes a picture to a square in "
                       f"torchvision; here the shorter side is resized to {resize} and the centre of {crop} is cropped")
    return value, remarks


class OriginalMetadata(BaseModel):
    """`model_metadata.json` or `metadata.json` of a submission in the original style, in the variants that people use."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model_format: Annotated[str | None, BeforeValidator(_original_format)] = Field(
        None, validation_alias=AliasChoices("model_format", "format", "framework"))
    architecture: Any = Field(None, validation_alias=AliasChoices(
        "model_class", "architecture", "model_type", "model_name"))
    weights_named: dict[str, Any] = {}  # the values of WEIGHTS_KEYS, of any kind
    architecture_file: AnyFileName | None = None
    num_classes: Size | None = None
    class_names: Annotated[list[str], BeforeValidator(_original_names)] | None = None
    input_shape: Annotated[tuple[Size, Size, Size], BeforeValidator(_original_shape)] | None = Field(
        None, validation_alias=AliasChoices("input_shape", "input_size"))
    preprocessing: StatedPreprocessing | None = None
    layout: Annotated[Literal["NCHW", "NHWC"] | None, BeforeValidator(_original_layout)] = Field(
        None, validation_alias=AliasChoices("layout", "input_layout", "data_format"))


def read_original_metadata(path: Path) -> tuple[OriginalMetadata, list[str], dict[str, str]]:
    """Return metadata in the original style, remarks, and what was not understood by the entry's name.

    Keys may be spelled in any case, with or without underscores. The panel reads `model_format` alone; so any other entry
    that is malformed is left out, and the panel's default takes its place.

    Raises:
        VerificationError: not JSON, or a format that the evaluator does not run.
    """
    content = read_loose_json(path)
    known = {re.sub("[^a-z0-9]", "", name): name for field, info in OriginalMetadata.model_fields.items()
             for name in (field, *(str(choice) for choice in getattr(info.validation_alias, "choices", ())), *WEIGHTS_KEYS)}
    for key in list(content):
        name = known.get(re.sub("[^a-z0-9]", "", key.lower()))
        if name and name not in content:
            content[name] = content.pop(key)
    content["weights_named"] = {key: content.pop(key) for key in WEIGHTS_KEYS if key in content}
    ignored: dict[str, str] = {}
    stated = content.get("preprocessing")
    if isinstance(stated, dict) and "layout" in stated:
        stated = dict(stated)
        content["layout"] = stated.pop("layout")
    content["preprocessing"], said_of_sizes = _original_preprocessing(stated)
    if content["preprocessing"] is None and stated is not None:
        ignored["preprocessing"], said_of_sizes = f"{path.name}: {said_of_sizes[0]}", []
    while True:
        try:
            metadata = OriginalMetadata.model_validate(content)
            remarks = [f"{path.name}: {said}" for said in said_of_sizes] if "preprocessing" in content else []
            return metadata, remarks, ignored
        except ValidationError as error:
            said = describe_validation_error(error)
            odd = next((str(fault["loc"][0]) for fault in error.errors() if fault["loc"] and fault["loc"][0] in content
                        and fault["loc"][0] != "model_format"), None)
            if odd is None:
                raise VerificationError(f"{path}: {said}") from error
            del content[odd]
            ignored[odd] = f"{path.name}: {said}"
