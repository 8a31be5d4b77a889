"""Read and verify a submission folder: its metadata, its files and their claims."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import zlib
from pathlib import Path
from typing import Any, Literal, TYPE_CHECKING

from pydantic import RootModel

from architectures.architecture import Architecture
from architectures.counting import architecture_macs, count_parameters, description_bytes
from architectures.weights import open_model
from compress.evaluation.extras import STANDALONE, toolkit
from architectures.onnx_data import data_files
from compress.evaluation.survey import MAX_FILE_BYTES, Survey, survey_folder
from metadata.errors import UserError, VerificationError
from metadata.files import read_json
from metadata.schemas import METADATA_FILE, ModelMetadata, Preprocessing

if TYPE_CHECKING:
    from torch import nn

ORIGINAL_METADATA_FILES = (METADATA_FILE, "metadata.json")
PROSE = {".json", ".md", ".py", ".txt"}
MOST_TEXT_BYTES = 2**24  # of a text that is compressed to be counted
# Pixels of the shorter side after the resize. Networks for photos take 224 to 1,024, and crop 7/8 or all of the resize.
MAX_RESIZE = 4096
MAX_RESIZE_TO_CROP = 8
DESCRIPTION_SHARE = 64  # what describes the layers counts as far as it is more than this part of the weights
TEXT_SHARE = 16  # the same for the source, JSON and prose of code


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubmissionFiles:
    """A submission folder that was read, and whose files have the hashes that its metadata states.

    Args:
        folder: the submission.
        survey: all names and sizes in the folder, as they were when it was read.
        kind: "graph" (architecture JSON and `.pth`), "onnx", or "code" (the original style: only its own code, or torch's
            unpickling, opens it).
        weights: the weights file.
        input_shape: (C, H, W) after preprocessing.
        preprocessing: how an image becomes the model's input.
        preprocessing_from: the file that states the preprocessing, or that it is the original's default.
        num_classes, class_names: None where the submission does not state them.
        metadata: None for the original style.
        architecture: of a graph.
        architecture_path, metadata_path: the JSON files.
        model_class: the class in model.py, where the metadata names one.
        ways: of code, the ways to load it, in order: "loader", "class", "standard".
        what: of code, what the folder is, in words.
        notes: remarks on the metadata and the choice of files, for the result's warnings.
        data_files: the files with an ONNX file's external data.
        kept_back: files of a code submission that its code does not get, by their relative paths.
    """

    folder: Path
    survey: Survey
    kind: Literal["graph", "onnx", "code"]
    weights: Path
    input_shape: tuple[int, int, int]
    preprocessing: Preprocessing
    preprocessing_from: str
    num_classes: int | None = None
    class_names: list[str] | None = None
    metadata: ModelMetadata | None = None
    architecture: Architecture | None = None
    architecture_path: Path | None = None
    metadata_path: Path | None = None
    model_class: str | None = None
    ways: tuple[str, ...] = ()
    what: str = ""
    notes: tuple[str, ...] = ()
    data_files: tuple[Path, ...] = ()
    kept_back: tuple[str, ...] = ()

    @functools.cached_property
    def counted(self) -> dict[str, int]:
        """The bytes of all parts that can hold what the model knows, by what they are.

        `model_size` counts the weights and the files with an ONNX file's other data; of a graph the numbers in the
        description of its layers; of code all other files and all names, and source, JSON and prose as zlib compresses
        them: layout and words that repeat cost next to nothing. Of descriptions and texts counts what is over a share of
        the weights, so that an honest model's size is its weights, and whoever writes weights as a structure or into a
        source pays for what they hold. The guarded score counts every byte. A submission of the toolkit's kinds is read
        through a few files. Code can read all files that it gets, and the names of those that are empty.
        """
        sizes = {file.path: file.size for name, file in self.survey.files.items() if name not in self.kept_back}
        data = set(self.data_files) - {self.weights}
        beside = {path for path in (self.architecture_path, self.metadata_path) if path in sizes} - data - {self.weights}
        names = sum(len(os.fsencode(path.relative_to(self.folder))) for path in (self.weights, *data, *beside))
        if self.kind == "code":
            beside = {path for path in sizes if path.suffix in PROSE} - {self.weights}
            data = sizes.keys() - beside - {self.weights}
            names = self.survey.name_bytes
        described = description_bytes(self.architecture) if self.architecture else 0
        text = sum(compressed_size(path) for path in beside) if self.kind == "code" else 0
        return {"weights": sizes[self.weights], "data_beside_the_weights": sum(sizes[path] for path in data),
                "numbers_in_the_architecture": max(0, described - sizes[self.weights] // DESCRIPTION_SHARE),
                "text_compressed": max(0, text - sizes[self.weights] // TEXT_SHARE),
                "source_json_and_prose": sum(sizes[path] for path in beside), "file_names": names}

    def size_bytes(self) -> int:
        """Return the bytes that model_size counts."""
        counted = self.counted
        named = counted["file_names"] if self.kind == "code" else 0
        parts = ("weights", "data_beside_the_weights", "numbers_in_the_architecture", "text_compressed")
        return sum(counted[part] for part in parts) + named

    def needed_bytes(self) -> int:
        """Return the bytes that the guarded score counts: of everything that the model can be read from."""
        counted = self.counted
        return sum(counted.values()) - counted["text_compressed"] - counted["numbers_in_the_architecture"]


def compressed_size(path: Path) -> int:
    """Return the bytes of a text as zlib compresses it, or all its bytes where it has more than `MOST_TEXT_BYTES`."""
    size = path.stat().st_size
    if size > MOST_TEXT_BYTES:
        return size
    return min(size, len(zlib.compress(path.read_bytes(), 9)))


def combined_hash(hashes: dict[str, str]) -> str:
    """Return one SHA-256 over the names and hashes of a folder's files."""
    digest = hashlib.sha256()
    for name, value in hashes.items():
        digest.update(f"{name}\0{value}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_submission(folder: str | Path) -> SubmissionFiles:
    """Read a submission folder's JSON files, and check the other files against their claims.

    Metadata with a `schema` key are of the toolkit's format; metadata without are of the original style.

    Raises:
        UserError: the folder does not exist.
        VerificationError: a file is missing, malformed, outside the folder, or not the one that was packaged.
    """
    found = survey_folder(folder)
    folder = found.folder
    named = next((name for name in ORIGINAL_METADATA_FILES if name in found.files), None)
    if named is None:
        below = next((file.path.parent for levels in (1, 2) for other in ORIGINAL_METADATA_FILES
                      for name, file in found.files.items()
                      if file.path.name == other and name.count("/") == levels), None)
        raise VerificationError(f"{folder}: expected {' or '.join(ORIGINAL_METADATA_FILES)} in it, there is neither"
                                + (f"; {below} has one: pass that folder" if below else ""))
    path = found.files[named].path
    try:
        content: dict[str, Any] = read_json(path, RootModel[dict[str, Any]]).root
    except VerificationError:
        if STANDALONE:
            raise
        content = toolkit(str(path), "original").read_loose_json(path)
    if "schema" in content:
        files = _read_packaged(found, path)
    else:
        original = toolkit(f"{path} has no schema, so this is the original style, which", "original")
        files = original.read_original(found, path)
        check_served(f"{folder}: {files.preprocessing_from}", files.input_shape, files.preprocessing)
    if files.kind == "onnx":
        files = dataclasses.replace(files, data_files=data_files(files.weights))
        _check_data_listed(files)
    return files


def _check_data_listed(files: SubmissionFiles) -> None:
    """Raise VerificationError where packaged metadata do not state the hash of a file with external data."""
    for path in files.data_files:
        name = str(path.relative_to(files.folder))
        files.survey.find(name, files.weights.name)
        if files.metadata is not None and name not in files.metadata.files:
            raise VerificationError(f"{path}: {files.weights.name} takes data from this file, and {METADATA_FILE} does not "
                                    "list it under files")


def _read_packaged(found: Survey, path: Path) -> SubmissionFiles:
    """Read a folder of the toolkit's format, whose metadata file is `path`: sizes first, then JSON, then hashes."""
    metadata: ModelMetadata = read_json(path, ModelMetadata)
    check_served(str(path), metadata.input_shape, metadata.preprocessing)
    _check_listed(found, path.name, metadata)
    where = found.find(metadata.architecture_file, path.name).path if metadata.architecture_file else None
    architecture: Architecture | None = read_json(where, Architecture) if where else None
    if architecture and where:
        for key, stated, built in (("num_classes", metadata.num_classes, architecture.num_classes),
                                   ("input_shape", metadata.input_shape, architecture.input_shape),
                                   ("the architecture", metadata.architecture, architecture.model_type)):
            if stated != built:
                raise VerificationError(f"{found.folder}: {key} is {stated} in {path.name} and {built} in {where.name}")
    for name, record in metadata.files.items():
        if found.hash_of(name) != record.sha256:
            raise VerificationError(f"{found.files[name].path}: its bytes are not those that {path.name} states (sha256)")
    is_onnx = metadata.model_format == "onnx"
    return SubmissionFiles(
        folder=found.folder, survey=found, kind="onnx" if is_onnx else "graph",
        weights=found.find(metadata.weights_file, path.name).path,
        input_shape=metadata.input_shape, preprocessing=metadata.preprocessing, preprocessing_from=path.name,
        num_classes=metadata.num_classes, class_names=metadata.class_names, metadata=metadata,
        architecture=None if is_onnx else architecture, architecture_path=where, metadata_path=path)


def _check_listed(found: Survey, stated_by: str, metadata: ModelMetadata) -> None:
    """Raise VerificationError unless every listed file is there once, with the stated size."""
    known: dict[tuple[int, int], str] = {}
    for name, record in metadata.files.items():
        listed = found.find(name, stated_by)
        if record.bytes > MAX_FILE_BYTES:
            raise VerificationError(f"{listed.path}: {record.bytes:,} bytes are over the limit of {MAX_FILE_BYTES:,}")
        if listed.size != record.bytes:
            raise VerificationError(f"{listed.path}: its bytes are not those that {stated_by} states: {listed.size:,}, "
                                    f"expected {record.bytes:,}")
        if (other := known.setdefault(listed.identity, name)) != name:
            raise VerificationError(f"{listed.path}: {stated_by} lists {other} and {name}, which are one file")


def check_served(where: str, shape: tuple[int, int, int], stated: Preprocessing) -> None:
    """Check that the declared input is what the preprocessing gives, so that costs are counted for the true size.

    Where the preprocessing crops nothing, the images themselves must have the declared size: `read_pixels` checks each.

    Args:
        where: who states it, for the message.
        shape: (C, H, W).
        stated: the preprocessing.

    Raises:
        VerificationError: the shape is another, the crop is larger than the resize, or the resize is out of proportion.
    """
    resize, crop, channels = stated.resize, stated.crop, len(stated.mean)
    if resize and crop and crop > resize:
        raise VerificationError(f"{where}: a crop of {crop} does not fit into a resize of {resize}")
    if resize and resize > min(MAX_RESIZE, MAX_RESIZE_TO_CROP * (crop or resize)):
        raise VerificationError(f"{where}: a resize to {resize:,} pixels is over the limit, {MAX_RESIZE:,} pixels and "
                                f"{MAX_RESIZE_TO_CROP} times the crop ({crop})")
    height, width = (crop, crop) if crop else shape[1:]
    if shape != (channels, height, width) or (resize and not crop and min(height, width) != resize):
        raise VerificationError(f"{where}: input_shape is {list(shape)}, the preprocessing gives {channels} channels of "
                                + (f"{crop}x{crop} pixels" if crop else f"images whose shorter side is {resize}"))


def open_submission(files: SubmissionFiles) -> nn.Module:
    """Return the model of a graph submission, after checking the metadata's claims about it.

    Raises:
        UserError: the submission is of another kind.
        VerificationError: weights, counts or the table of int8 layers are not as stated.
    """
    metadata, architecture = files.metadata, files.architecture
    if metadata is None or architecture is None:
        raise UserError(f"{files.folder}: a submission of the kind {files.kind} has no graph of the layer table")
    model = open_model(architecture, files.weights)
    check_claims(files, count_parameters(model), architecture_macs(architecture))
    weighted = {layer.name: layer.int8 for layer in architecture.layers if layer.width}
    stated_int8 = {name: text.startswith("int8") for name, text in metadata.quantization.layers.items()}
    scheme = "dynamic_int8" if architecture.is_int8 else "none"
    if stated_int8 != weighted or metadata.quantization.scheme != scheme:
        odd = min((name for name in weighted.keys() | stated_int8.keys() if weighted.get(name) != stated_int8.get(name)),
                  default="scheme")
        raise VerificationError(f"{files.folder}: quantization in {METADATA_FILE} is not what the layers are ({odd})")
    return model


def check_claims(files: SubmissionFiles, parameters: int, macs: int | None) -> None:
    """Check the counts that the metadata state against the model's.

    Raises:
        VerificationError: the counts differ.
    """
    if files.metadata is None:
        return
    for claim, stated, counted in (("parameters", files.metadata.parameters, parameters),
                                   ("macs", files.metadata.macs, macs)):
        if counted is not None and stated != counted:
            raise VerificationError(f"{files.folder}: {METADATA_FILE} states {stated:,} {claim}, the model has {counted:,}")
