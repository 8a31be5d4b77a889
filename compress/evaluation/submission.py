"""Read and verify a submission folder: its metadata, its files and their claims."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TYPE_CHECKING

from pydantic import RootModel

from architectures.architecture import Architecture
from architectures.counting import architecture_macs, count_parameters
from architectures.weights import open_model
from compress.evaluation.extras import STANDALONE, toolkit
from compress.evaluation.file_formats import FILE_FORMATS
from compress.evaluation.submission_files import SubmissionFiles, check_claims
from compress.evaluation.survey import MAX_FILE_BYTES, Survey, survey_folder
from loaders.images import oversized, sides_text, size_covering
from metadata.errors import UserError, VerificationError
from metadata.files import read_json
from metadata.schemas import METADATA_FILE, ModelMetadata, Preprocessing

if TYPE_CHECKING:
    from torch import nn

ORIGINAL_METADATA_FILES = (METADATA_FILE, "metadata.json")


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
        content = toolkit(str(path), "original_metadata").read_loose_json(path)
    if "schema" in content:
        files = _read_packaged(found, path)
    else:
        original = toolkit(f"{path} has no schema, so this is the original style, which", "original")
        files = original.read_original(found, path)
        check_served(f"{folder}: {files.preprocessing_from}", files.input_shape, files.preprocessing)
    if files.kind in FILE_FORMATS:
        files = dataclasses.replace(files, data_files=FILE_FORMATS[files.kind].data_files(files.weights))
        _check_data_listed(files)
    return files


def _check_data_listed(files: SubmissionFiles) -> None:
    """Raise VerificationError where packaged metadata do not state the hash of a file with other data of the model."""
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
    kind = "graph" if metadata.model_format == "pytorch" else metadata.model_format
    return SubmissionFiles(
        folder=found.folder, survey=found, kind=kind,
        weights=found.find(metadata.weights_file, path.name).path,
        input_shape=metadata.input_shape, preprocessing=metadata.preprocessing, preprocessing_from=path.name,
        num_classes=metadata.num_classes, class_names=metadata.class_names, metadata=metadata,
        architecture=architecture if kind == "graph" else None, architecture_path=where, metadata_path=path)


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
    resize, crop, channels = stated.covered, stated.window, len(stated.mean)
    if resize and crop and (crop[0] > resize[0] or crop[1] > resize[1]):
        raise VerificationError(f"{where}: a crop of {sides_text(crop)} does not fit into a resize of {sides_text(resize)}")
    if over := oversized(resize, crop):
        raise VerificationError(f"{where}: {over}")
    size = crop or shape[1:]
    covers = not resize or size_covering((size[1], size[0]), resize) == (size[1], size[0])
    if shape != (channels, *size) or not (crop or covers):
        gives = (f"{crop[0]}x{crop[1]} pixels" if crop else f"images whose shorter side is {stated.resize}"
                 if isinstance(stated.resize, int) else f"images that just cover {sides_text(resize or size)} pixels")
        raise VerificationError(f"{where}: input_shape is {list(shape)}, the preprocessing gives {channels} channels of "
                                f"{gives}")


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
