"""`python -m compress import`: an ONNX classifier becomes a folder with an architecture and weights, proven equal to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from architectures.architecture import Architecture
from architectures.counting import architecture_macs, count_parameters
from architectures.describe import lower
from architectures.layers.base import AS_TEACHER
from architectures.onnx_network.graph import NotExpressibleError
from architectures.onnx_network.reading import OnnxClassifier, open_classifier, read_network, stated_sizes
from architectures.onnx_network.runtime import COUNTS, RunOnnxFile, TOLERANCE, difference_from_file
from compress.evaluation.measure import measure_accuracy
from compress.pipeline.stage import ARCHITECTURE, WEIGHTS
from loaders.catalog import load
from loaders.images import normalize
from loaders.request import Request
from loaders.splits import Splits
from metadata.errors import UserError
from metadata.files import sha256, write_json
from metadata.formats import write_weights
from metadata.locks import appearing

CARD, RECORD = "card.json", "import.json"
COMPARED = 32  # images of a data set that are compared


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What `import_onnx` has written.

    Args:
        folder: with the architecture, the weights and the record; `folder:DIR` names it as a model.
        architecture: of the network.
        parameters: stored numbers.
        macs: multiply-adds for one image.
        difference: the largest between the logits and ONNX Runtime's, relative to the largest logit.
        compared: what images that was seen on.
        accuracy: fractions of the test images that are right, of the network and of the file; without data none.
        notes: one line about each change.
    """

    folder: Path
    architecture: Architecture
    parameters: int
    macs: int
    difference: float
    compared: str
    accuracy: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def import_onnx(path: Path, out: Path, *, data: Request | None = None,
                input_shape: Sequence[int] | None = None) -> Imported:
    """Read an ONNX classifier, compare it with ONNX Runtime, and write it as a folder of the toolkit.

    Args:
        path: the file.
        out: folder to write; it must not exist.
        data: a data set: its images are compared, the accuracy is measured, and its preprocessing goes into the folder.
        input_shape: (C, H, W), for a file that leaves the size of its images open; the data's unless given.

    Raises:
        UserError: the file is not one that can be read, an operator has no layer (named), the network's logits are not the
            file's, the classes are not the data's, or `out` exists.
    """
    if out.exists():
        raise UserError(f"--out {out}: already there; nothing was written")
    sizes = tuple(input_shape) if input_shape else stated_sizes(path)
    splits = load(_of_size(data, sizes)) if data else None
    if splits is not None and sizes is not None and 0 in sizes:
        input_shape = splits.card.input_shape
    opened = open_classifier(path, input_shape)
    architecture, network = _expressed(opened)
    if splits is not None and splits.card.input_shape != opened.input_shape:
        raise UserError(f"{path}: the file takes images of shape {list(opened.input_shape)}, the data gives "
                        f"{list(splits.card.input_shape)}; set image_size and channels of the data")
    if splits is not None and splits.card.num_classes != architecture.num_classes:
        raise UserError(f"{path}: the file has {architecture.num_classes:,} classes, the data has "
                        f"{splits.card.num_classes:,}")
    images = None if splits is None else _images(splits)
    counts = COUNTS if images is None else (*(count for count in COUNTS if count < len(images)), len(images))
    difference = difference_from_file(network, opened, images, counts)
    if difference > TOLERANCE:
        raise UserError(f"{path}: the network's logits are not the file's: they differ by {difference:.1e} of the largest, "
                        f"more than {TOLERANCE:.0e}; as a teacher it works: teacher.model=onnx:{path}")
    accuracy = {} if splits is None else _accuracy(splits, {"network": network, "file": RunOnnxFile(opened)})
    compared = (f"{', '.join(map(str, counts[:-1]))} and {counts[-1]} "
                + ("random images" if splits is None else f"images of {splits.card.name}"))
    found = Imported(folder=out, architecture=architecture, parameters=count_parameters(network),
                     macs=architecture_macs(architecture), difference=difference, compared=compared, accuracy=accuracy,
                     notes=opened.notes)
    with appearing(out) as folder:
        _write(folder, found, opened, network, splits)
    return found


def _of_size(data: Request, sizes: Sequence[int] | None) -> Request:
    """Return the request with images of the file's (C, H, W), where it does not say another; 0 is a size left open."""
    channels, height, width = sizes or (0, 0, 0)
    sized = data.image_size or any(key in data.preprocessing for key in ("resize", "crop")) or not (height and width)
    return replace(data, channels=data.channels or channels or None,
                   image_size=data.image_size if sized else (height, width))


def _expressed(opened: OnnxClassifier) -> tuple[Architecture, nn.Module]:
    """Return a file's network as an architecture, and rebuilt from it with the file's weights."""
    try:
        network = read_network(opened)
        found = lower(network, opened.input_shape, model_type=_type_name(opened.path))
    except UserError as error:
        text = str(error) if isinstance(error, NotExpressibleError) else f"{opened.path}: {error}"
        text = text.removesuffix(f"; {AS_TEACHER}")
        raise UserError(f"{text}; as a teacher it works: teacher.model=onnx:{opened.path}") from error
    return found.architecture, found.build()


def _type_name(path: Path) -> str:
    """Return the file's stem as a name for the architecture."""
    name = "".join(character if character.isascii() and character.isalnum() else "_" for character in path.stem).strip("_")
    return name if name and not name[0].isdigit() else f"Onnx_{name}"


def _images(splits: Splits) -> Tensor:
    """Return some images of the data as the network's input."""
    split = splits.validation if len(splits.validation) else splits.train
    ids = split.sample(COMPARED, 0)
    return normalize(split.images.batch(ids), splits.card.preprocessing)


def _accuracy(splits: Splits, models: dict[str, nn.Module]) -> dict[str, float]:
    test, found = splits.open_test(), {}
    for name, model in models.items():
        with torch.no_grad():
            measured = measure_accuracy(model, test.batches(128), splits.card.preprocessing, len(test))
        found[name] = measured.correct / max(measured.total, 1)
    return found


def _write(folder: Path, found: Imported, opened: OnnxClassifier, network: nn.Module, splits: Splits | None) -> None:
    write_json(folder / ARCHITECTURE, found.architecture.to_json())
    write_weights(folder / WEIGHTS, network.state_dict())
    if splits is not None:
        write_json(folder / CARD, splits.card.model_dump(mode="json"))
    record: dict[str, Any] = {
        "schema": 1, "source": opened.path.name, "sha256": sha256(opened.path), "producer": opened.model.producer_name,
        "opset": max((entry.version for entry in opened.model.opset_import), default=0), "notes": found.notes,
        "input_shape": list(opened.input_shape), "num_classes": found.architecture.num_classes,
        "difference": found.difference, "compared": found.compared, "accuracy": found.accuracy}
    write_json(folder / RECORD, record)
