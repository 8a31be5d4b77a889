"""Look at the weights of a submission that is code as data, before its code runs: count them, and check the claims on them.

Nothing is unpickled and nothing runs. What cannot be read as data is left to the code, in the sandbox.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import RootModel

from architectures.checkpoints import STAND_INS
from architectures.counting import count_numbers
from architectures.weights import all_finite, check_tensors, load_tensors, stored_values
from compress.evaluation.original import file_kind
from compress.evaluation.panel import state_dict_in, tensors_in
from compress.evaluation.submission_files import SubmissionFiles
from metadata.errors import VerificationError, first_line, printable
from metadata.files import read_json


def check_stored(files: SubmissionFiles) -> tuple[list[str], int | None]:
    """Read the weights as data. Return warnings, and the number of numbers in a state dict, or None for other files.

    Raises:
        VerificationError: a state dict for model.py is cut short, holds NaN or infinite values, or has other channels than
            the architecture file's `pruning_info` states. (The panel checks none of this; where it loads a submission, what
            is wrong becomes a warning.)
    """
    by_class = files.ways[0] == "class"
    if not by_class and file_kind(files.weights)[0] != "state dict":
        return [], None
    try:
        weights = state_dict_in(load_tensors(files.weights, STAND_INS))
    except VerificationError as error:
        if by_class and not isinstance(error.__cause__, torch._weights_only_unpickler.UnpicklingError):  # type: ignore[attr-defined]
            raise
        return [], None  # it holds more than tensors, or in a pickle protocol that torch reads only unsafely
    if by_class:
        weights = check_tensors(weights, str(files.weights), files.weights.stat().st_size)
        if not weights:
            raise VerificationError(f"{files.weights}: expected a state dict (names to tensors), got an empty one")
        check_pruning_claims(files, weights)
        return [], count_numbers(weights)
    if not isinstance(weights, dict):
        return [], None
    remarks = []
    odd = next((name for name, value in weights.items() for tensor in tensors_in(value) if not all_finite(tensor)), None)
    if odd is not None:
        remarks.append(f"{files.weights.name}: tensor {printable(odd, 100)} holds NaN or infinite values")
    try:
        check_pruning_claims(files, weights)
    except VerificationError as error:
        remarks.append(f"{first_line(error)}; the panel does not read this file")
    return remarks, sum(stored_values(tensor).numel() for tensor in tensors_in(weights) if not tensor.is_meta)


def check_pruning_claims(files: SubmissionFiles, weights: dict[str, Any]) -> None:
    """Raise VerificationError where an architecture file states other `remaining_channels` than the weights have."""
    for name, claimed in (pruning_claims(files.architecture_path) if files.architecture_path else {}).items():
        shape: tuple[int, ...] = getattr(weights.get(f"{name}.weight"), "shape", ())
        if len(shape) and shape[0] != claimed:
            raise VerificationError(f"{files.architecture_path}: layer {name}: remaining_channels is {claimed}, its "
                                    f"weights have {shape[0]}")


def pruning_claims(path: Path) -> dict[str, int]:
    """Return layer -> `remaining_channels` of an architecture file in the original style.

    Raises:
        VerificationError: not JSON.
    """
    content: Any = read_json(path, RootModel[Any]).root
    layers = content.get("layers") if isinstance(content, dict) else None
    claims = {}
    for layer in layers if isinstance(layers, list) else []:
        info = layer.get("pruning_info") if isinstance(layer, dict) else None
        if isinstance(info, dict) and isinstance(info.get("remaining_channels"), int):
            claims[str(layer.get("name"))] = info["remaining_channels"]
    return claims
