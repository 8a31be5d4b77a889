"""Which cases of a long list run in the quick suite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Return the cases as parameters, marked slow but for the quick ones.

    Raises:
        AssertionError: A quick case is not in the list.
    """
    cases, quick = list(cases), set(quick)
    assert quick <= set(cases), quick - set(cases)
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
