"""A submission folder that was read: its files, what its metadata say, and the bytes that count."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import zlib
from pathlib import Path
from typing import Literal

from architectures.architecture import Architecture
from architectures.counting import description_bytes
from compress.evaluation.survey import Survey
from metadata.errors import VerificationError
from metadata.schemas import METADATA_FILE, ModelMetadata, Preprocessing

PROSE = {".json", ".md", ".py", ".txt"}
MOST_TEXT_BYTES = 2**24  # of a text that is compressed to be counted
DESCRIPTION_SHARE = 64  # what describes the layers counts as far as it is more than this part of the weights
TEXT_SHARE = 16  # the same for the source, JSON and prose of code


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubmissionFiles:
    """A submission folder that was read, and whose files have the hashes that its metadata states.

    Args:
        folder: the submission.
        survey: all names and sizes in the folder, as they were when it was read.
        kind: "graph" (architecture JSON and `.pth`), the name of a format of `file_formats.py` such as "onnx", or "code"
            (the original style: only its own code, or torch's unpickling, opens it).
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
        data_files: the files with a model file's other data, such as an ONNX file's external data.
        layout: of the model's input, "NCHW" or "NHWC", where the metadata state it.
        kept_back: files of a code submission that its code does not get, by their relative paths.
    """

    folder: Path
    survey: Survey
    kind: str
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
    layout: Literal["NCHW", "NHWC"] | None = None
    kept_back: tuple[str, ...] = ()

    @functools.cached_property
    def counted(self) -> dict[str, int]:
        """The bytes of all parts that can hold what the model knows, by what they are.

        `model_size` counts the weights and the files with a model file's other data; of a graph the numbers in the
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


def check_int8_layers(files: SubmissionFiles, layers: dict[str, bool]) -> None:
    """Check which layers the metadata state to be int8 against the model's, where it is static int8.

    Args:
        files: the submission.
        layers: the model's convolutions and matrix products by name: whether they are int8.

    Raises:
        VerificationError: they differ.
    """
    if files.metadata is None or files.metadata.quantization.scheme != "static_int8":
        return
    stated = {name: text.startswith("int8") for name, text in files.metadata.quantization.layers.items()}
    odd = min((name for name in stated.keys() | layers.keys() if stated.get(name) != layers.get(name)), default=None)
    if odd is not None:
        raise VerificationError(f"{files.folder}: quantization in {METADATA_FILE} is not what the layers are ({odd})")
