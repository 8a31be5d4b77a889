"""Read the original style of submission: weights with or without code of their own, and metadata in many variants.

The competition's panel knows four kinds: a folder with its own model_loader.py, TorchScript, a pickled module, and a plain
state dict. The toolkit reads two more: a folder with a model.py, and ONNX. Nothing is executed or unpickled here.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, RootModel, ValidationError

from compress.evaluation.submission import MAX_FILE_BYTES, SubmissionFiles, submission_files
from metadata.errors import VerificationError, describe_validation_error
from metadata.files import MAX_JSON_BYTES, check_download, inside, read_json
from metadata.schemas import Preprocessing, Size, StatedPreprocessing

TORCH_WORDS, OTHER_WORDS = ("torch", "pt", "script", "jit", "statedict"), ("tensorflow", "keras", "tflite", "savedmodel",
                                                                         "h5", "pb", "tf")
OTHER_SUFFIXES = {".h5", ".keras", ".pb", ".tflite", ".saved_model"}
HINTS = ("num_classes", "class_names", "input_shape", "input_size", "preprocessing", "architecture_file")
AnyFileName = Annotated[str, Field(pattern=r"\A[^\x00-\x1f\x7f]+\z", max_length=200)]
OWN_LOADER = "The evaluator of record: load a compressed image classifier"  # how the toolkit's model_loader.py begins
PICKLED_CLASS = re.compile(rb"c([\w.]+)\n([\w.]+)\n")  # pickle's opcode GLOBAL: a module and a name
DATA_MODULES = {b"_codecs", b"argparse", b"builtins", b"collections", b"datetime", b"numpy", b"pathlib"}
COMMA_BEFORE_END = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])')


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
            content = json.loads(COMMA_BEFORE_END.sub(lambda found: found[1] or "", text))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise
        return content


def _original_format(value: Any) -> Any:
    """Return "pytorch", "onnx", or None for a word that says neither: the weights file's name then decides."""
    text = re.sub(r"[^a-z0-9]", "", str(value).lower())
    if "onnx" in text:
        return "onnx"
    if any(word in text for word in OTHER_WORDS) and "torch" not in text:
        raise ValueError("this evaluator runs PyTorch and ONNX models")
    return "pytorch" if any(word in text for word in TORCH_WORDS) else None


def _original_file(value: Any) -> Any:
    """Return the name of a file that an author names by its path on another machine."""
    if isinstance(value, str) and (value.startswith(("/", "./", "~")) or "\\" in value or ":" in value):
        return re.split(r"[/\\]", value)[-1]
    return value


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

    model_format: Annotated[Literal["pytorch", "onnx"] | None, BeforeValidator(_original_format)] = Field(
        None, validation_alias=AliasChoices("model_format", "format", "framework"))
    architecture: Any = Field(None, validation_alias=AliasChoices(
        "model_class", "architecture", "model_type", "model_name"))
    weights_file: Annotated[AnyFileName, BeforeValidator(_original_file)] | None = Field(
        None, validation_alias=AliasChoices("weights_file", "model_file", "model_path", "weights", "checkpoint"))
    architecture_file: AnyFileName | None = None
    num_classes: Size | None = None
    class_names: Annotated[list[str], BeforeValidator(_original_names)] | None = None
    input_shape: Annotated[tuple[Size, Size, Size], BeforeValidator(_original_shape)] | None = Field(
        None, validation_alias=AliasChoices("input_shape", "input_size"))
    preprocessing: Annotated[StatedPreprocessing, BeforeValidator(_original_preprocessing)] | None = None


def read_original_metadata(path: Path) -> tuple[OriginalMetadata, list[str]]:
    """Return metadata in the original style, and remarks on what was not understood.

    Keys may be spelled in any case, with or without underscores. The panel reads the format alone; so a hint that is
    malformed is left out with a remark, and the panel's default takes its place.

    Raises:
        VerificationError: not JSON, or another format than PyTorch and ONNX.
    """
    content = read_loose_json(path)
    known = {re.sub("[^a-z0-9]", "", name): name for field, info in OriginalMetadata.model_fields.items()
             for name in (field, *(str(choice) for choice in getattr(info.validation_alias, "choices", ())))}
    for key in list(content):
        name = known.get(re.sub("[^a-z0-9]", "", key.lower()))
        if name and name not in content:
            content[name] = content.pop(key)
    remarks: list[str] = []
    while True:
        try:
            return OriginalMetadata.model_validate(content), remarks
        except ValidationError as error:
            said = describe_validation_error(error)
            odd = next((str(fault["loc"][0]) for fault in error.errors() if fault["loc"] and fault["loc"][0] in HINTS
                        and fault["loc"][0] in content), None)
            if odd is None:
                raise VerificationError(f"{path}: {said}") from error
            del content[odd]
            remarks.append(f"{path.name}: {said}; this entry is ignored")


def file_kind(path: Path) -> tuple[str, str]:
    """Return what a PyTorch file is, and the class that it was pickled from, by its bytes alone.

    The kinds: "TorchScript", "state dict", "pickled module", and "unknown" for torch's format before 1.6.
    """
    if not zipfile.is_zipfile(path):
        return "unknown", ""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return "TorchScript", ""
        pickled = next((name for name in names if name.endswith("data.pkl")), None)
        if pickled is None:
            return "unknown", ""
        with archive.open(pickled) as file:
            first = PICKLED_CLASS.search(file.read(2**16))
    if first is None or first[1] in (b"torch", b"torch._utils") or first[1].partition(b".")[0] in DATA_MODULES:
        return "state dict", ""
    return "pickled module", (first[1] + b"." + first[2]).decode(errors="replace")


def find_weights(folder: Path, metadata: OriginalMetadata, named_in: str) -> tuple[Path, list[str]]:
    """Return the weights file, and remarks on how it was chosen.

    Raises:
        VerificationError: no file, several candidates, or a file that is not the weights.
    """
    suffixes = {"onnx": {".onnx"}, "pytorch": {".pth", ".pt"}, None: {".onnx", ".pth", ".pt"}}[metadata.model_format]
    remarks: list[str] = []
    if metadata.weights_file:
        weights = inside(folder, metadata.weights_file)
        if not weights.is_file():
            raise VerificationError(f"{weights}: {named_in} names this file, but it is not there")
    else:
        files = submission_files(folder)
        found = [file for file in files if file.suffix.lower() in suffixes]
        models = [file for file in found if file.stem == "model" and file.parent == folder]
        chosen = found if len(found) == 1 else sorted(models, key=lambda file: file.suffix != ".pth")
        if not chosen:
            other = [file.name for file in files if file.suffix.lower() in OTHER_SUFFIXES]
            raise VerificationError(f"{folder}: {named_in} names no weights_file, and {len(found)} files end in "
                                    f"{' or '.join(sorted(suffixes))}" + (
                                        f"; {other[0]} is TensorFlow's, which is not evaluated here" if other else ""))
        weights = chosen[0]
        if len(found) > 1:
            remarks.append(f"{len(found)} files could be the weights: {weights.name} was taken")
    if weights.stat().st_size > MAX_FILE_BYTES:
        raise VerificationError(f"{weights}: {weights.stat().st_size:,} bytes are over the limit of {MAX_FILE_BYTES:,}")
    check_download(weights)
    return weights, remarks


def ways_to_load(folder: Path, weights: Path) -> tuple[tuple[str, ...], str]:
    """Return the ways to try, in order (names of `panel.WAYS`), and what the folder is, in words.

    A model_loader.py with a `load_model` comes first, as for the panel; then the class in model.py; then the standard way,
    which the panel also takes where load_model fails. The toolkit's own model_loader.py is no loader of the submission's.
    """
    kind, pickled = file_kind(weights)
    held = {"TorchScript": "a TorchScript program", "pickled module": f"a pickled {pickled}, which runs code to open",
            "state dict": "a state dict", "unknown": "in torch's format before 1.6"}[kind]
    loader = folder / "model_loader.py"
    text = loader.read_text(errors="replace") if loader.is_file() and loader.stat().st_size < MAX_JSON_BYTES else ""
    own = OWN_LOADER in text[:400]
    if re.search(r"\bload_model\b", text) and not own:
        return ("loader", "standard"), f"code: its model_loader.py loads {weights.name} ({held})"
    if kind not in ("TorchScript", "pickled module") and (folder / "model.py").is_file():
        return ("class", "standard"), f"code: the network of model.py with {weights.name} ({held})"
    of_ours = "; its model_loader.py is the toolkit's own, but no metadata with a schema lie beside it" if own else ""
    if kind in ("TorchScript", "pickled module"):
        return ("standard",), f"code: {weights.name} is {held}{of_ours}"
    return ("standard",), f"{weights.name} ({held}) without code, for torchvision's ResNet18 as the panel takes it{of_ours}"


def read_original(folder: Path, path: Path) -> SubmissionFiles:
    """Read a folder whose metadata file `path` has no `schema` key.

    Raises:
        VerificationError: a file is missing, malformed, over the limit or outside the folder.
    """
    metadata, remarks = read_original_metadata(path)
    weights, chosen = find_weights(folder, metadata, path.name)
    kind: Literal["onnx", "code"] = "onnx" if weights.suffix.lower() == ".onnx" else "code"
    if metadata.model_format and (metadata.model_format == "onnx") != (kind == "onnx"):
        raise VerificationError(f"{weights}: model_format in {path.name} is {metadata.model_format}")
    preprocessing = metadata.preprocessing or Preprocessing(exif_orientation=False)  # as torchvision reads pictures
    size = preprocessing.crop or 224
    named = metadata.architecture
    ways, what = ways_to_load(folder, weights) if kind == "code" else ((), "")
    return SubmissionFiles(
        folder=folder, kind=kind, weights=weights, preprocessing=preprocessing, metadata_path=path,
        input_shape=metadata.input_shape or (len(preprocessing.mean), size, size),
        preprocessing_from=path.name if metadata.preprocessing else
        f"the original's default, as {path.name} states none",
        num_classes=metadata.num_classes, class_names=metadata.class_names,
        architecture_path=inside(folder, metadata.architecture_file) if metadata.architecture_file else None,
        model_class=named if isinstance(named, str) and named.isidentifier() else None,
        ways=ways, what=what, notes=(*remarks, *chosen))
