"""Sweeps of scaling experiments: small plans, their processes, and their tables."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from metadata.formats import read_csv
from tests.helpers.commands import PROJECT

COMMON = {"dataset": "digits", "batch_size": 64, "num_epochs": 3, "test_freq": 1, "checkpoint_seconds": 0}
SMALL = {"kind": "data", "dataset_sizes": [100, 200], "width": 2, "depth": 1}


def write_plan(path: Path, *parts: dict[str, Any], **common: Any) -> Path:
    path.write_text(json.dumps({**COMMON, **common, "sweeps": list(parts)}))  # JSON is YAML
    return path


def start(*arguments: object) -> subprocess.Popen[str]:
    """A command that Ctrl-C reaches, even where the tests themselves run in the background and are deaf to it."""
    return subprocess.Popen([sys.executable, "-m", "compress", "scaling", *map(str, arguments)], cwd=PROJECT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def forks(process: int) -> list[int]:
    """The children of a process."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return [int(word) for task in Path(f"/proc/{process}/task").iterdir()
                for word in (task / "children").read_text().split()]
    return []


def worker_processes(process: int) -> list[int]:
    """The worker processes of a sweep: the forks of its fork server."""
    found = []
    for child in forks(process):
        with suppress(FileNotFoundError, ProcessLookupError):
            if "multiprocessing.forkserver" in Path(f"/proc/{child}/cmdline").read_text():
                found += forks(child)
    return found


def wait_for(process: subprocess.Popen[str], happened: Any) -> None:
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def without_seconds(path: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_csv(path)]
