"""Rebuild the committed networks of the MNIST challenge, and count their correct answers on the test split."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from architectures.architecture import Architecture
from architectures.weights import open_model
from compress.evaluation.measure import measure_accuracy
from compress.training.assessment import learned_parameters
from compress.training.run import flags_named
from loaders.catalog import load
from loaders.request import Request
from metadata.errors import VerificationError
from metadata.files import read_json

WEIGHTS = Path(__file__).parent / "mnist_weights"


def verify_weights(data_root: Path | None, download: bool, console: Console) -> None:
    """Rebuild the committed networks from their architecture and weights, and count their correct answers.

    Raises:
        VerificationError: the parameters or the correct answers differ from the record.
        UserError: MNIST is missing.
    """
    with flags_named():
        splits = load(Request(name="mnist", root=data_root, download=download))
        test = splits.open_test()
    records = json.loads((WEIGHTS / "weights.json").read_text())["models"]
    for name, record in records.items():
        architecture: Architecture = read_json(WEIGHTS / f"{name}.json", Architecture)
        model = open_model(architecture, WEIGHTS / f"{name}.pth").eval()
        found = measure_accuracy(model, test.batches(250), splits.card.preprocessing, len(test))
        parameters = learned_parameters(model)
        console.print(f"{name}: {parameters:,} parameters, {found.correct:,} of {found.total:,} test images right "
                      f"({found.fraction:.2%}); recorded {record['correct']:,}", highlight=False)
        # Rounding differs between CPUs, which can change the answer to an image near a decision boundary.
        if parameters != record["parameters"] or abs(found.correct - record["correct"]) > 3:
            raise VerificationError(f"{name}: {parameters} parameters and {found.correct} right, recorded "
                                    f"{record['parameters']} and {record['correct']}")
