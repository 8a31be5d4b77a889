"""Foreign code in tests: with bubblewrap where it works, else in the weak sandbox, whose walls are Landlock and seccomp."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from compress.evaluation.runtimes import EvaluationSettings
from compress.evaluation.walls import bubblewrap_fault

WEAK = bool(bubblewrap_fault())
WEAK_FLAGS = ["--weak_sandbox"] if WEAK else []  # besides --allow_code or --task


def code_settings(**changes: Any) -> EvaluationSettings:
    """Returns settings that run foreign code here."""
    return EvaluationSettings(**{"allow_code": True, "weak_sandbox": WEAK, **changes})


def warnings_of_the_walls() -> list[str]:
    """Returns what an evaluation of foreign code warns of here when the kernel offers all of the inner wall."""
    return [f"sandbox: bubblewrap off: {bubblewrap_fault()}"] if WEAK else []


@contextlib.contextmanager
def without_bubblewrap() -> Iterator[None]:
    """Takes bubblewrap out of reach, as on a machine that lacks it."""
    before = os.environ["PATH"]
    os.environ["PATH"] = "/nonexistent"
    bubblewrap_fault.cache_clear()
    try:
        yield
    finally:
        os.environ["PATH"] = before
        bubblewrap_fault.cache_clear()
