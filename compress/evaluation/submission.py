"""Read and verify a submission folder: its metadata, its files and their claims."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Literal, TYPE_CHECKING

from pydantic import RootModel

from architectures.architecture import Architecture
from architectures.counting import architecture_macs, count_parameters
from architectures.weights import open_model
from compress.evaluation.extras import STANDALONE, toolkit
from compress.evaluation.onnx_data import data_files
from metadata.errors import UserError, VerificationError
from metadata.files import inside, read_json, sha256
from metadata.schemas import METADATA_FILE, ModelMetadata, Preprocessing

if TYPE_CHECKING:
    from torch import nn

ORIGINAL_METADATA_FILES = (METADATA_FILE, "metadata.json")
PROSE = {".json", ".md", ".py", ".txt"}
MAX_FILE_BYTES = 2**32


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubmissionFiles:
    """A submission folder that was read, and whose files have the hashes that its metadata states.

    Args:
        folder: the submission.
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
    """

    folder: Path
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

    def needed(self) -> list[Path]:
        """Return the files that inference needs. Code can read all files beside it."""
        if self.kind == "code":
            return submission_files(self.folder)
        return [path for path in (self.weights, *self.data_files, self.architecture_path, self.metadata_path)
                if path and path.is_file()]

    def size_bytes(self) -> int:
        """Return the bytes that model_size counts: the weights, and for code all files but source, JSON and prose."""
        files = [self.weights, *self.data_files]
        if self.kind == "code":
            files = [path for path in self.needed() if path == self.weights or path.suffix not in PROSE]
        return sum(path.stat().st_size for path in files)


def submission_files(folder: Path) -> list[Path]:
    """Return every file of a submission, sorted.

    Raises:
        VerificationError: a link leaves the folder, or an entry is neither a file nor a folder.
    """
    files = []
    for path in sorted(folder.rglob("*")):
        inside(folder, str(path.relative_to(folder)))
        if path.is_file():
            files.append(path)
        elif not path.is_dir():
            raise VerificationError(f"{path}: neither a file nor a folder")
    return files


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder, by its relative path."""
    return {str(path.relative_to(folder)): sha256(path) for path in submission_files(folder)}


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
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--submission_dir {folder}: there is no such folder")
    path = next((folder / name for name in ORIGINAL_METADATA_FILES if (folder / name).exists()), None)
    if path is None:
        below = next((file.parent for name in ORIGINAL_METADATA_FILES for above in ("*", "*/*")
                      for file in sorted(folder.glob(f"{above}/{name}"))), None)
        raise VerificationError(f"{folder}: expected {' or '.join(ORIGINAL_METADATA_FILES)} in it, there is neither"
                                + (f"; {below} has one: pass that folder" if below else ""))
    try:
        content: dict[str, Any] = read_json(inside(folder, path.name), RootModel[dict[str, Any]]).root
    except VerificationError:
        if STANDALONE:
            raise
        content = toolkit(str(path), "original").read_loose_json(path)
    if "schema" in content:
        files = _read_packaged(folder, path)
    else:
        original = toolkit(f"{path} has no schema, so this is the original style, which", "original")
        files = original.read_original(folder, path)
    if files.kind == "onnx":
        files = dataclasses.replace(files, data_files=data_files(files.weights))
        _check_data_listed(files)
    return files


def _check_data_listed(files: SubmissionFiles) -> None:
    """Raise VerificationError where packaged metadata do not state the hash of a file with external data."""
    if files.metadata is None:
        return
    for path in files.data_files:
        if str(path.relative_to(files.folder)) not in files.metadata.files:
            raise VerificationError(f"{path}: {files.weights.name} takes data from this file, and {METADATA_FILE} does not "
                                    "list it under files")


def _read_packaged(folder: Path, path: Path) -> SubmissionFiles:
    """Read a folder of the toolkit's format, whose metadata file is `path`."""
    metadata: ModelMetadata = read_json(path, ModelMetadata)
    where = inside(folder, metadata.architecture_file) if metadata.architecture_file else None
    architecture: Architecture | None = read_json(where, Architecture) if where else None
    _check_files(folder, path.name, metadata)
    if architecture and where:
        for key, stated, built in (("num_classes", metadata.num_classes, architecture.num_classes),
                                   ("input_shape", metadata.input_shape, architecture.input_shape),
                                   ("the architecture", metadata.architecture, architecture.model_type)):
            if stated != built:
                raise VerificationError(f"{folder}: {key} is {stated} in {path.name} and {built} in {where.name}")
    is_onnx = metadata.model_format == "onnx"
    return SubmissionFiles(
        folder=folder, kind="onnx" if is_onnx else "graph", weights=inside(folder, metadata.weights_file),
        input_shape=metadata.input_shape, preprocessing=metadata.preprocessing, preprocessing_from=path.name,
        num_classes=metadata.num_classes, class_names=metadata.class_names, metadata=metadata,
        architecture=None if is_onnx else architecture, architecture_path=where, metadata_path=path)


def _check_files(folder: Path, stated_by: str, metadata: ModelMetadata) -> None:
    """Raise VerificationError unless every listed file is there, with the stated size and hash."""
    for name, record in metadata.files.items():
        listed = inside(folder, name)
        if not listed.is_file():
            raise VerificationError(f"{listed}: {stated_by} lists this file, but it is not there")
        if record.bytes > MAX_FILE_BYTES:
            raise VerificationError(f"{listed}: {record.bytes:,} bytes are over the limit of {MAX_FILE_BYTES:,}")
        if listed.stat().st_size != record.bytes or sha256(listed) != record.sha256:
            raise VerificationError(f"{listed}: its bytes are not those that {stated_by} states (sha256)")


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
