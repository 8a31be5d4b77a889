"""Packaged folders, edited as a careless or a lying author would."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def weights_of(folder: Path) -> Path:
    return next(folder.glob("compressed_*.pth"))


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
