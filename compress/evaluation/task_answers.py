"""Ask the model of a 2.5M-parameter solution for its answers to the test rows, so that adapting to them gains nothing.

A model can keep what it is asked, and learn from rows without labels. Two new processes therefore get the model's bytes.
The rows are cut into two random halves. Each process is asked for one half first, row by row, and these answers are graded.
Then it is asked for the other half, which the other process had first: in batches, as the public evaluator asks, and then
row by row, each time in another order. So every row has a graded answer, given after at most half of the rows, and two
others that must agree with it. The answer in a batch tells what a model that adapts to its batch would score with the
public evaluator.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from compress.evaluation.runtimes import EvaluationSettings
from compress.evaluation.sandbox import Child
from metadata.errors import VerificationError

BATCH_SIZE = 128  # of the public evaluator
TOLERANCE = 1e-3  # of the spread of a row's logits
ROUNDING = 16 * 2.0**-24  # of the largest logit: float32 rounds an offset so finely that all logits have in common


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskAnswers:
    """What a model answers, and what our own code found in its bytes.

    Args:
        classes: (N,) the graded predictions, each for a row asked alone.
        classes_in_batches: (N,) the predictions for the rows asked in batches.
        changed: rows that the two processes, asked for single rows in other orders, answer differently.
        changed_in_batches: rows that are answered differently in a batch and alone.
        held: see `inventory.take_inventory`.
        stated: the trainable parameters that the model states.
        protection: of the processes, see `Child`.
        usage: of each of the two processes, see `Child.usage`.
        unprotected: see `Child.unprotected`.
    """

    classes: np.ndarray
    classes_in_batches: np.ndarray
    changed: int
    changed_in_batches: int
    held: dict[str, Any]
    stated: int
    protection: dict[str, str]
    usage: list[dict[str, float | None]]
    unprotected: list[str]


def answer_alone(content: bytes, inputs: np.ndarray, classes: int, settings: EvaluationSettings, threads: int, where: str,
                 seed: int) -> TaskAnswers:
    """Return the answers of a serialised model.

    Args:
        content: the serialised model.
        inputs: (N, D) float32 test rows.
        classes: C, the number of logits.
        settings: limits on time and memory, for each process.
        threads: of each process.
        where: for messages.
        seed: of torch and numpy in the processes, before the model is made.

    Raises:
        VerificationError: the model cannot be made or does not answer with finite logits.
    """
    order = _shuffled(np.arange(len(inputs)))
    halves = order[:len(order) // 2], order[len(order) // 2:]
    graded, batched, again = np.empty((3, len(inputs), classes), np.float32)
    usage, facts = [], []
    with _two_processes(content, max(len(content), 4 * BATCH_SIZE * inputs.shape[1]), settings, threads, where,
                        seed) as children:
        for child, own, other in zip(children, halves, halves[::-1], strict=True):
            held = child.facts()  # by our own code, before the model's own runs
            facts.append((held, count_in(child.facts(), "trainable", child)))
            # Each time in a new order: a model that could replay the other process would know what that has answered.
            for row in _shuffled(own):
                graded[row] = _logits(child, inputs[row][None], classes)
            for chunk in np.split(_shuffled(other), range(BATCH_SIZE, len(other), BATCH_SIZE)):
                batched[chunk] = _logits(child, inputs[chunk], classes)
            for row in _shuffled(other):
                again[row] = _logits(child, inputs[row][None], classes)
            usage.append(child.usage())
    changed = differ(graded, again) | (graded.argmax(1) != again.argmax(1))  # the same calls: not even a tie may change
    return TaskAnswers(
        classes=graded.argmax(1), classes_in_batches=batched.argmax(1), changed=int(changed.sum()),
        changed_in_batches=int(differ(graded, batched).sum()), held=facts[0][0],
        stated=max(stated for _, stated in facts), protection=child.protection, usage=usage,
        unprotected=child.unprotected())


def _shuffled(rows: np.ndarray) -> np.ndarray:
    """Return rows in an order that no model can know: the system's own randomness decides."""
    return np.random.default_rng().permutation(rows)


@contextlib.contextmanager
def _two_processes(content: bytes, capacity: int, settings: EvaluationSettings, threads: int, where: str,
                   seed: int) -> Iterator[list[Child]]:
    """Start two processes with the model at the same time, as most of a start is importing torch. End them afterwards."""
    boot = {"mode": "answer", "bytes": len(content), "seed": seed}

    def start(_: int) -> Child:
        return Child(boot, {}, settings, threads, where, capacity, content)

    # The kernel ends a child with the thread that has started it, so these threads live as long as the processes.
    with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
        starting = [pool.submit(start, index) for index in range(2)]
        for future in starting:
            stack.callback(_end, future)
        yield [future.result() for future in starting]


def _end(starting: Future[Child]) -> None:
    """End a process, when it has started at all."""
    if not starting.exception():
        starting.result().close()


def differ(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Return (N,) bool: whether two answers differ by more than rounding.

    What all logits of a row have in common decides nothing, and is subtracted first. The rest is compared relative to its
    spread.

    Args:
        one: (N, C) logits.
        two: (N, C) logits.
    """
    first, other = (logits - logits.mean(1, keepdims=True) for logits in (one.astype(float), two.astype(float)))
    spread = np.maximum(np.abs(first).max(1), np.abs(other).max(1))
    largest = np.maximum(np.abs(one).max(1), np.abs(two).max(1)).astype(float)
    return np.abs(first - other).max(1) > TOLERANCE * spread + ROUNDING * largest  # type: ignore[no-any-return]


def count_in(facts: dict[str, Any], key: str, child: Child) -> int:
    """Return a count that the child states. Raise VerificationError for a value that is no count."""
    value = facts.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise child.forged()
    return value


def _logits(child: Child, rows: np.ndarray, classes: int) -> np.ndarray:
    """Return (N, classes) logits. Raise VerificationError for another number of values, or values that are not finite."""
    answer = child.ask(rows)
    if answer.size != len(rows) * classes or not np.isfinite(answer).all():
        raise VerificationError(f"{child.where}: the answer to {len(rows)} rows has {answer.size} numbers, expected finite "
                                f"logits ({len(rows)}, {classes})")
    return answer.reshape(len(rows), classes)
