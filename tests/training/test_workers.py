"""The pool of local worker processes: results, progress, and every way to fail."""

from __future__ import annotations

import multiprocessing

from compress.training import workers
from tests.helpers.work import some_work


def test_every_way_to_fail_is_an_outcome() -> None:
    tasks = ["a", "mistake", "bug", "b", "torch", "exit", "c"]
    seen: dict[str, workers.TaskOutcome[str, str]] = {}
    told: set[str] = set()
    workers.run_local(some_work, tasks, 2, lambda outcome: seen.update({outcome.task: outcome}),
                      lambda task, share: told.add(task))
    assert {name: seen[name].result for name in tasks} == {"a": "A", "b": "B", "c": "C", "mistake": None, "bug": None,
                                                           "torch": None, "exit": None}
    assert seen["mistake"].failure == "expected this, got that"
    assert seen["torch"].failure == "RuntimeError: out of memory"
    assert seen["bug"].failure == "the worker process ended with exit status 1: KeyError: 'unforeseen'"
    assert seen["exit"].failure.startswith("the worker process ended with exit status 3")
    assert {"a", "b", "c"} <= told
    assert not multiprocessing.active_children()
