"""A submission folder: its metadata, its files and what they claim, read and verified."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import Any, Literal, TYPE_CHECKING

from pydantic import RootModel

from architectures.counting import count_macs, count_parameters
from architectures.kernels import int8_arithmetic, no_int8_kernels
from architectures.architecture import Architecture
from architectures.weights import open_model
from compress.evaluation.extras import toolkit
from metadata.errors import UserError, VerificationError
from metadata.files import inside, read_json, sha256
from metadata.schemas import ARCHITECTURE_FILE, METADATA_FILE, ModelMetadata, Preprocessing

if TYPE_CHECKING:
    from torch import nn

ORIGINAL_METADATA_FILES = (METADATA_FILE, "metadata.json")
PROSE = {".json", ".md", ".py", ".txt"}
MAX_FILE_BYTES = 2**32


@dataclasses.dataclass(frozen=True)
class SubmissionFiles:
    """A submission whose JSON files were read and whose files are what its metadata states.

    Args:
        kind: "graph" (architecture JSON and `.pth`), "onnx", or "code" (the original style: its own model.py).
        metadata: None for the original style.
        class_names: None where the submission does not say.
        preprocessing_from: which file states the preprocessing, or that it is the original's default.
        model_class: the class in model.py, where the metadata names one.
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

    def needed(self) -> list[Path]:
        """The files that inference needs; code can read whatever lies beside it."""
        if self.kind == "code":
            return submission_files(self.folder)
        return [path for path in (self.weights, self.architecture_path, self.metadata_path) if path and path.is_file()]

    def size_bytes(self) -> int:
        """What model_size counts: the weights; with code, which can read them, all files but source, JSON and prose."""
        files = self.needed() if self.kind == "code" else [self.weights]
        return sum(path.stat().st_size for path in files if path == self.weights or path.suffix not in PROSE)


def submission_files(folder: Path) -> list[Path]:
    """Every file of a submission, sorted.

    Raises:
        VerificationError: a link leaves the folder, or something is neither a file nor a folder.
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
    """SHA-256 of every file in a folder, by its name within."""
    return {str(path.relative_to(folder)): sha256(path) for path in submission_files(folder)}


def combined_hash(hashes: dict[str, str]) -> str:
    """One hash over the names and hashes of a folder's files."""
    digest = hashlib.sha256()
    for name, value in hashes.items():
        digest.update(f"{name}\0{value}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_submission(folder: str | Path) -> SubmissionFiles:
    """Reads a submission folder's JSON files, and checks the other files against what they claim.

    A metadata file with a `schema` is ours; one without is the original style's, which the toolkit reads.

    Raises:
        UserError: the folder does not exist.
        VerificationError: a file is missing, malformed, outside the folder or not the one that was packaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--submission_dir {folder}: there is no such folder")
    path = next((folder / name for name in ORIGINAL_METADATA_FILES if (folder / name).exists()), folder / METADATA_FILE)
    content: dict[str, Any] = read_json(inside(folder, path.name), RootModel[dict[str, Any]]).root
    if "schema" in content:
        return _read_packaged(folder, path)
    original = toolkit(f"{path} has no schema, so this is the original style, which", "original")
    return original.read_original(folder, path)  # type: ignore[no-any-return]


def _read_packaged(folder: Path, path: Path) -> SubmissionFiles:
    metadata: ModelMetadata = read_json(path, ModelMetadata)
    where = inside(folder, metadata.architecture_file) if metadata.architecture_file else None
    architecture: Architecture | None = read_json(where, Architecture) if where else None
    for name, record in metadata.files.items():
        listed = inside(folder, name)
        if not listed.is_file():
            raise VerificationError(f"{listed}: {path.name} lists this file, but it is not there")
        if record.bytes > MAX_FILE_BYTES:
            raise VerificationError(f"{listed}: {record.bytes:,} bytes are over the limit of {MAX_FILE_BYTES:,}")
        if listed.stat().st_size != record.bytes or sha256(listed) != record.sha256:
            raise VerificationError(f"{listed}: its bytes are not those that {path.name} states (sha256)")
    kind: Literal["graph", "onnx"] = "onnx" if metadata.model_format == "onnx" else "graph"
    if architecture and where:
        for key, stated in (("num_classes", metadata.num_classes), ("input_shape", metadata.input_shape)):
            if stated != getattr(architecture, key):
                raise VerificationError(f"{folder}: {key} is {stated} in {path.name} and {getattr(architecture, key)} in "
                                        f"{where.name}")
        if metadata.architecture != architecture.model_type:
            raise VerificationError(f"{folder}: the architecture is {metadata.architecture} in {path.name} and "
                                    f"{architecture.model_type} in {where.name}")
    return SubmissionFiles(folder, kind, inside(folder, metadata.weights_file), metadata.input_shape,
                           metadata.preprocessing, path.name, metadata.num_classes, metadata.class_names, metadata,
                           architecture if kind == "graph" else None, where, path)


def open_submission(files: SubmissionFiles) -> nn.Module:
    """The model of a graph submission, after checking that it bears out what the metadata claims of it.

    Raises:
        UserError: the submission is of another kind.
        VerificationError: weights, counts or the table of int8 layers are not as stated.
    """
    metadata, architecture = files.metadata, files.architecture
    if metadata is None or architecture is None:
        raise UserError(f"{files.folder}: no PyTorch graph of ours but {files.kind}; it can be evaluated, not loaded")
    model = open_model(architecture, files.weights)
    check_claims(files, count_parameters(model), count_macs(model, metadata.input_shape))
    weighted = {layer.name: layer.type.startswith("Int8") for layer in architecture.layers if layer.width}
    stated_int8 = {name: text.startswith("int8") for name, text in metadata.quantization.layers.items()}
    scheme = "dynamic_int8" if architecture.is_int8 else "none"
    if stated_int8 != weighted or metadata.quantization.scheme != scheme:
        odd = min((name for name in weighted.keys() | stated_int8.keys() if weighted.get(name) != stated_int8.get(name)),
                  default="scheme")
        raise VerificationError(f"{files.folder}: quantization in {METADATA_FILE} is not what the layers are ({odd})")
    return model


def check_claims(files: SubmissionFiles, parameters: int, macs: int | None) -> None:
    """Holds the metadata's counts to those of the model.

    Raises:
        VerificationError: they differ.
    """
    if files.metadata is None:
        return
    for claim, stated, counted in (("parameters", files.metadata.parameters, parameters),
                                   ("macs", files.metadata.macs, macs)):
        if counted is not None and stated != counted:
            raise VerificationError(f"{files.folder}: {METADATA_FILE} states {stated:,} {claim}, the model has {counted:,}")


def load_model(model_path: str | Path) -> nn.Module:
    """Loads a packaged model, verified, in eval mode, on the CPU. Evaluation panels call this.

    Takes the weights file or the submission folder; the architecture JSON lies beside the weights. The module maps
    `(N, C, H, W)` float32, preprocessed as the metadata says, to `(N, num_classes)` logits.

    Raises:
        UserError: the path does not exist, or is a submission of another kind.
        VerificationError: the weights do not bear out the architecture.
    """
    path = Path(model_path)
    if path.is_dir():
        model = open_submission(read_submission(path))
    elif path.exists():
        model = open_model(read_json(path.parent / ARCHITECTURE_FILE, Architecture), path)
    else:
        raise UserError(f"{path}: there is no such file")
    if (computed := int8_arithmetic(model)) and no_int8_kernels():
        logging.getLogger(__name__).warning("%s: the int8 layers compute %s", path, computed)
    return model
