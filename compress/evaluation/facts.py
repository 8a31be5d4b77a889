"""What a reader tells the evaluator of a submission: plain data, so that the evaluator itself parses no submission."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from compress.evaluation.submission_files import combined_hash, SubmissionFiles
from metadata.schemas import Preprocessing


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubmissionFacts:
    """A submission whose names, sizes, JSON and hashes were checked. Its weights have not been opened.

    Args:
        folder: the submission.
        kind: see `SubmissionFiles`.
        packaged: whether the submission is of the toolkit's own format.
        metadata_name: the name of the metadata file.
        weights: the weights file, relative to the folder.
        what: of code, what the folder is, in words.
        backend: the backend that the submission asks for, or the first of its kind.
        input_shape: (C, H, W) after preprocessing.
        preprocessing: how an image becomes the model's input.
        preprocessing_from: the file that states the preprocessing, or that it is the original's default.
        num_classes, class_names: None where the submission does not state them.
        model_class, ways: of code, see `SubmissionFiles`.
        notes: remarks on the metadata and the choice of files.
        size_bytes: the bytes that model_size counts.
        needed_bytes: the bytes of all that inference needs.
        counted: the parts of these bytes.
        sizes, hashes: bytes and SHA-256 of every file, by its name relative to the folder.
        stamp: see `Survey`.
    """

    folder: Path
    kind: str
    packaged: bool
    metadata_name: str
    weights: str
    what: str
    backend: str
    input_shape: tuple[int, int, int]
    preprocessing: Preprocessing
    preprocessing_from: str
    num_classes: int | None
    class_names: list[str] | None
    model_class: str | None
    ways: tuple[str, ...]
    notes: tuple[str, ...]
    size_bytes: int
    needed_bytes: int
    counted: dict[str, int]
    sizes: dict[str, int]
    hashes: dict[str, str]
    kept_back: tuple[str, ...]
    stamp: str

    @property
    def combined_hash(self) -> str:
        """One SHA-256 over the names and hashes of all files."""
        return combined_hash(self.hashes)

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON takes them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"folder": str(self.folder), "preprocessing": self.preprocessing.model_dump(mode="json")}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> SubmissionFacts:
        """Return the facts that a reader sent."""
        tuples = {key: tuple(content[key]) for key in ("input_shape", "ways", "notes", "kept_back")}
        return cls(**(content | tuples | {
            "folder": Path(content["folder"]), "preprocessing": Preprocessing.model_validate(content["preprocessing"])}))


def facts_of(files: SubmissionFiles, backend: str) -> SubmissionFacts:
    """Return the facts of a submission that was read, with the hashes of all its files."""
    hashes = files.survey.hashes()
    return SubmissionFacts(
        folder=files.folder, kind=files.kind, packaged=files.metadata is not None,
        metadata_name=files.metadata_path.name if files.metadata_path else "metadata",
        weights=str(files.weights.relative_to(files.folder)), what=files.what, backend=backend,
        input_shape=files.input_shape, preprocessing=files.preprocessing, preprocessing_from=files.preprocessing_from,
        num_classes=files.num_classes, class_names=files.class_names, model_class=files.model_class, ways=files.ways,
        notes=files.notes, size_bytes=files.size_bytes(), needed_bytes=files.needed_bytes(), counted=files.counted,
        kept_back=files.kept_back, sizes={name: file.size for name, file in files.survey.files.items()}, hashes=hashes,
        stamp=files.survey.stamp)
