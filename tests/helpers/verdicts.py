"""What the evaluator's command line answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compress.evaluation.score import RESULT_KEYS

Evaluate = Callable[..., tuple[int, dict[str, Any], str]]


def assert_refused(outcome: tuple[int, dict[str, Any], str], said: str, code: int = 1) -> None:
    """One line on stderr, zeros in the result, and the reason in its status."""
    got, result, error = outcome
    assert got == code and said in error and len(error.strip().splitlines()) == 1, error
    assert all(result[key] == 0 for key in RESULT_KEYS) and result["details"]["guarded_score"] == 0
    assert result["details"]["status"].startswith("failed: ") and said in result["details"]["status"]
