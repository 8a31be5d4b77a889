"""Running the command line in tests, and holding it to one line for a mistake."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SMALL = ["teacher.options.width=8", "teacher.train.epochs=3", "teacher.floor=0.3", "distill.options.width=8",
         "distill.train.epochs=3", "distill.control=false", "prune.multiple=4", "finetune.train.epochs=3", "threads=1"]

Compress = Callable[..., "subprocess.CompletedProcess[str]"]


def run_compress(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs `python -m compress` from the project's root."""
    return subprocess.run([sys.executable, "-W", "error::DeprecationWarning:compress", "-m", "compress",
                           *map(str, arguments)], cwd=PROJECT, capture_output=True, text=True, timeout=timeout,
                          check=False)


def run_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command line inside this process, which spares the seconds of importing torch and its compiler."""
    from compress.cli.main import main

    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    code = ended.value.code
    return subprocess.CompletedProcess([*map(str, arguments)], code if isinstance(code, int) else 1, output.getvalue(),
                                       errors.getvalue())


def assert_one_line_error(done: subprocess.CompletedProcess[str], *parts: str, code: int = 2) -> None:
    """The command failed with the exit code and one line on stderr that holds the parts."""
    assert done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for part in parts:
        assert part in lines[0], (part, lines[0])
