"""Models that a name finds in the user's own files: `file:my_net.py:MyNet`, `onnx:FILE`, `folder:DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from architectures import own_code
from architectures.architecture import Architecture
from metadata.errors import UserError
from metadata.files import read_json
from metadata.schemas import ARCHITECTURE_FILE

FILE, ONNX, FOLDER = own_code.PREFIX, "onnx:", "folder:"
PREFIXES = {FILE: "file:FILE:CLASS", ONNX: "onnx:FILE", FOLDER: "folder:DIR"}
DESCRIPTIONS = (ARCHITECTURE_FILE, "architecture.json")
LAYERS = "layers.pth"  # weights by the layers' names, beside those by the names of a zoo's network


def is_own(name: str) -> bool:
    """Return whether a name means a file or folder of the user's."""
    return name.startswith(tuple(PREFIXES))


def has_weights(name: str) -> bool:
    """Return whether a model comes with weights: an ONNX file and a folder do, a user's class may."""
    return is_own(name)


def without_place(name: str) -> str:
    """Return a name for records that leave the machine: without the folders of the file."""
    if not is_own(name):
        return name
    prefix, _, rest = name.partition(":")
    return f"{prefix}:{Path(rest).name}"


def files_of(name: str) -> tuple[Path, ...]:
    """Return the files whose bytes decide a model of this name; none for names of the project and of the zoos."""
    if name.startswith(FILE):
        return (own_code.own_file(name)[0],)
    if name.startswith(ONNX):
        from architectures.onnx_data import data_files
        path = _path(name)
        return (path, *data_files(path)) if path.is_file() else ()
    if name.startswith(FOLDER):
        return tuple(path for path in _stored(name) if path.is_file())
    return ()


def make_named(name: str, *, num_classes: int, **options: Any) -> nn.Module:
    """Build a model of a user's file or folder.

    Args:
        name: with its prefix.
        num_classes: that the model must have.
        options: of a class; of an ONNX file `input_shape`, and `runtime`: true for ONNX Runtime in place of a network.

    Raises:
        UserError: the file cannot be read or opened, does not have these classes, or takes no such option.
    """
    if name.startswith(FILE):
        return own_code.make_own(name, num_classes=num_classes, **options)
    takes = {"input_shape", "runtime"} if name.startswith(ONNX) else {"input_shape"}
    if unknown := sorted(options.keys() - takes):
        raise UserError(f"model {name}: unknown option {unknown[0]!r} (options: {', '.join(sorted(takes))})")
    if name.startswith(ONNX):
        return _from_onnx(name, num_classes, **options)
    return _from_folder(name, num_classes)


def stated_options(name: str, input_shape: Sequence[int]) -> dict[str, Any]:
    """Return the options of a user's model that follow from its images (C, H, W)."""
    known = {"input_shape": list(input_shape), "in_channels": input_shape[0]}
    if name.startswith(FILE):
        taken = own_code.own_parameters(name) or []
        return {key: value for key, value in known.items() if key in taken}
    return {"input_shape": known["input_shape"]} if name.startswith(ONNX) else {}


def _from_onnx(name: str, num_classes: int, input_shape: Sequence[int] | None = None, runtime: bool = False) -> nn.Module:
    import torch

    from architectures.onnx_network.reading import open_classifier
    from architectures.onnx_network.runtime import RunOnnxFile, proven_network

    with torch.device("cpu"):
        opened = open_classifier(_path(name), input_shape)
        module = RunOnnxFile(opened, "as asked for (runtime: true)") if runtime else proven_network(opened)
    if module.classes != num_classes:
        raise UserError(f"model {name}: the file has {module.classes:,} classes, expected {num_classes:,}")
    return module


def remarks(module: nn.Module) -> list[str]:
    """Return one line about each thing that was changed, or could not be done, when a model was made of a file."""
    return list(getattr(module, "remarks", []))


def _from_folder(name: str, num_classes: int) -> nn.Module:
    import torch

    from architectures.weights import open_model

    description, weights = _stored(name)
    architecture: Architecture = read_json(description, Architecture)
    if architecture.num_classes != num_classes:
        raise UserError(f"model {name}: it has {architecture.num_classes:,} classes, expected {num_classes:,}")
    with torch.device("cpu"):
        return open_model(architecture, weights)


def _stored(name: str) -> tuple[Path, Path]:
    """Return the architecture and the weights in a folder: of a run's stage, of `import`, of `train`, of a submission.

    Raises:
        UserError: a file is missing, or there are several with weights.
    """
    folder = _path(name)
    description = next((folder / file for file in DESCRIPTIONS if (folder / file).is_file()), None)
    weights = [folder / LAYERS] if (folder / LAYERS).is_file() else sorted(
        path for path in folder.glob("*") if path.suffix in (".pth", ".safetensors"))
    if description is None or len(weights) != 1:
        raise UserError(f"model {name}: expected a folder with {' or '.join(DESCRIPTIONS)} and one .pth or .safetensors "
                        "file")
    return description, weights[0]


def _path(name: str) -> Path:
    return Path(name.partition(":")[2]).expanduser()
