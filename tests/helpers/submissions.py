"""Packaged folders, edited as a careless or a lying author would."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def weights_of(folder: Path) -> Path:
    return next(folder.glob("compressed_*.pth"))


def compressed_text(folder: Path) -> int:
    """The bytes of a folder's source, JSON and prose that model_size counts: compressed, beyond a 16th of the weights."""
    text = sum(len(zlib.compress(path.read_bytes(), 9)) for path in folder.iterdir()
               if path.suffix in (".json", ".md", ".py", ".txt"))
    weights = max(path.stat().st_size for path in folder.iterdir() if path.suffix in (".pth", ".pt"))
    return max(0, text - weights // 16)


def restate(folder: Path) -> None:
    """Makes the metadata state the hashes of the files as they are: a liar would."""
    path = folder / "model_metadata.json"
    metadata = json.loads(path.read_text())
    for name in metadata["files"]:
        content = (folder / name).read_bytes()
        metadata["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    path.write_text(json.dumps(metadata))


def edit_json(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = torch.load(weights_of(folder), weights_only=True)
    change(weights)
    torch.save(weights, weights_of(folder))


def rename_weights(folder: Path, name: str) -> None:
    """States another name for the weights, hash and all."""
    def change(metadata: dict[str, Any]) -> None:
        metadata["files"][name] = metadata["files"][metadata["weights_file"]]
        metadata["weights_file"] = name
    edit_json(folder, "model_metadata.json", change)


def write_package(folder: Path, layers: list[dict[str, Any]], weights: dict[str, torch.Tensor], macs: int,
                  input_shape: tuple[int, int, int] = (3, 8, 8), classes: int = 0, **metadata: Any) -> Path:
    """Writes a package of the toolkit's format around any layers and weights; the metadata state what is there.

    The last weights are the bias of the classifier unless `classes` is given.
    """
    folder.mkdir(parents=True)
    classes = classes or len(list(weights.values())[-1])
    (folder / "trained_pruned_architecture.json").write_text(json.dumps({
        "schema": 1, "model_type": "Net", "num_classes": classes, "input_shape": input_shape, "output_shape": [classes],
        "layers": layers}))
    torch.save(weights, folder / "compressed_net.pth")
    files = ("trained_pruned_architecture.json", "compressed_net.pth")
    channels, size, _ = input_shape
    weighted = [each["name"] for each in layers if "out_channels" in each or "out_features" in each]
    (folder / "model_metadata.json").write_text(json.dumps({
        "schema": 1, "model_format": "pytorch", "architecture": "Net", "num_classes": classes,
        "class_names": [str(index) for index in range(classes)], "weights_file": "compressed_net.pth",
        "input_shape": input_shape, "preprocessing": {"mode": "RGB" if channels == 3 else "L", "resize": size, "crop": size,
                                                      "mean": [0.3] * channels, "std": [0.4] * channels},
        "quantization": {"scheme": "none", "layers": dict.fromkeys(weighted, "float32: of a test")},
        "parameters": sum(tensor.numel() for tensor in weights.values()), "macs": macs, "files": dict.fromkeys(files),
        **metadata}))
    restate(folder)
    return folder
