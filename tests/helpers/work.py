"""Work for the pool of workers: every way in which a task can end. Worker processes import this module by name."""

from __future__ import annotations

import os

from compress.training.workers import Report
from metadata.errors import UserError


def some_work(task: str, report: Report) -> str:
    report(0.5)
    if task == "mistake":
        raise UserError("expected this, got that")
    if task == "torch":
        raise RuntimeError("out of memory\nand more")
    if task == "bug":
        raise KeyError("unforeseen")
    if task == "exit":
        os._exit(3)
    return task.upper()
