"""The result of one run of the MNIST challenge: the three rules, and the summary.json that holds it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.training.run import SUMMARY, read_summary
from metadata.errors import UserError

EPOCHS, PARAMETERS, ACCURACY, LAST = 15, 8000, 0.994, 5  # the rules


@dataclass(kw_only=True)
class ChallengeResult:
    """The result of one model with one seed."""

    model: str
    seed: int
    parameters: int
    macs: int
    epochs: int
    seconds: float
    test_accuracies: list[float] = field(default_factory=list)  # of the last five epochs, in [0, 1]

    @property
    def rules(self) -> dict[str, bool]:
        """The three rules of the challenge, and whether the result keeps each."""
        return {f"at least {100 * ACCURACY:.1f} % in each of the last {LAST} epochs":
                    len(self.test_accuracies) == LAST and min(self.test_accuracies) >= ACCURACY,
                f"at most {EPOCHS} epochs": self.epochs <= EPOCHS,
                f"fewer than {PARAMETERS:,} parameters": self.parameters < PARAMETERS}

    def to_json(self) -> dict[str, Any]:
        """Return the content of summary.json."""
        return {"model": self.model, "seed": self.seed, "parameters": self.parameters, "macs": self.macs,
                "epochs": self.epochs, "seconds": round(self.seconds, 1),
                "last_epochs_test_accuracy": self.test_accuracies, "mean": statistics.mean(self.test_accuracies),
                "minimum": min(self.test_accuracies), "rules": self.rules, "passed": all(self.rules.values())}


def read_result(folder: Path) -> ChallengeResult | None:
    """Return the result of a run from its summary.json, or None if the run is not finished.

    Raises:
        UserError: the summary is damaged, or belongs to another training.
    """
    summary = read_summary(folder)
    if summary is None:
        return None
    keys = {"model": "model", "seed": "seed", "parameters": "parameters", "macs": "macs", "epochs": "epochs",
            "seconds": "seconds", "last_epochs_test_accuracy": "test_accuracies"}
    if missing := [key for key in keys if key not in summary]:
        raise UserError(f"{folder / SUMMARY}: no run of the challenge, {missing[0]} is missing; choose --log_dir OTHER")
    return ChallengeResult(**{field_name: summary[key] for key, field_name in keys.items()})


def finished_results(folder: Path) -> list[ChallengeResult]:
    """Return the results of all finished runs in a folder."""
    found = [read_result(path.parent) for path in sorted(folder.glob(f"*/seed*/{SUMMARY}"))]
    return [result for result in found if result]
