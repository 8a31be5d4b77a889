"""Foreign code in tests: with bubblewrap where it works, else in the weak sandbox, whose walls are Landlock and seccomp."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.evaluation.runtimes import EvaluationSettings
from compress.evaluation.walls import UNHIDDEN, bubblewrap_fault

WEAK = bool(bubblewrap_fault())
WEAK_FLAGS = ["--weak_sandbox"] if WEAK else []  # besides --allow_code or --task


def code_settings(**changes: Any) -> EvaluationSettings:
    """Returns settings that run foreign code here."""
    return EvaluationSettings(**{"allow_code": True, "weak_sandbox": WEAK, **changes})


def warnings_of_the_walls() -> list[str]:
    """Returns what an evaluation of foreign code warns of here when the kernel offers all of the inner wall."""
    return [f"sandbox: bubblewrap off: {bubblewrap_fault()}; {UNHIDDEN}"] if WEAK else []


@contextlib.contextmanager
def without_bubblewrap() -> Iterator[None]:
    """Takes bubblewrap out of reach, as on a machine that lacks it."""
    with programs_from("/nonexistent"):
        yield


@contextlib.contextmanager
def old_bubblewrap(folder: Path) -> Iterator[None]:
    """Puts a program in bubblewrap's place that knows no --size, as before version 0.7, and is bubblewrap otherwise."""
    program = folder / "bwrap"
    program.write_text(OLD.format(python=sys.executable, bwrap=shutil.which("bwrap")))
    program.chmod(0o755)
    with programs_from(f"{folder}{os.pathsep}{os.environ['PATH']}"):
        yield


OLD = """#!{python} -I
import os, sys
given = sys.argv[1:]
if "--args" in given:
    given += os.pread(int(given[given.index("--args") + 1]), 2**24, 0).decode().split(chr(0))
if "--size" in given:
    sys.exit("bwrap: Unknown option --size")
os.execv({bwrap!r}, ["bwrap", *sys.argv[1:]])
"""


@contextlib.contextmanager
def programs_from(path: str) -> Iterator[None]:
    """Sets where programs are searched, and forgets what was found before."""
    before = os.environ["PATH"]
    os.environ["PATH"] = path
    bubblewrap_fault.cache_clear()
    try:
        yield
    finally:
        os.environ["PATH"] = before
        bubblewrap_fault.cache_clear()
