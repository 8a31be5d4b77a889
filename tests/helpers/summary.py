"""A pytest plugin: at its end, a test run says which CPU it ran on, what it skipped and why."""

from __future__ import annotations

import collections
import os
import platform
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from metadata.machine import machine

CAPS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS")  # what makes a CPU seem less than it is
LEFT_OUT = pytest.StashKey[int]()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    stash = items[0].config.stash
    stash[LEFT_OUT] = stash.get(LEFT_OUT, 0) + len(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if output := getattr(session.config, "workeroutput", None):  # of a worker of pytest-xdist, for its controller
        output["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker collects all tests, so that each leaves out the same ones."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.section("where this ran, and what was skipped")
    terminalreporter.write_line(where())
    reasons = collections.Counter(reason(report) for report in terminalreporter.getreports("skipped"))
    for why, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {why}")
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{count} left out: by {config.getoption('markexpr') or 'the command line'!r}"
                                    + ("; make slow runs them" if config.getoption("markexpr") == "not slow" else ""))


def where() -> str:
    """Return the CPU, its instruction sets and cores, what torch makes of it, and the versions, in one line."""
    found = machine()
    caps = [f"{name}={os.environ[name]}" for name in CAPS if name in os.environ]
    return ", ".join([found["cpu"], f"{found['cores']} of {os.cpu_count()} cores",
                      " ".join(found["flags"]) or "flags unknown",
                      f"torch {torch.__version__} as {torch.backends.cpu.get_cpu_capability()}",
                      f"{torch.cuda.device_count()} CUDA devices", f"Python {platform.python_version()}", *caps])


def reason(report: Any) -> str:
    """Return why a test was skipped."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
