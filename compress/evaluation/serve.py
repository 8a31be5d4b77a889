"""Serve the test images one at a time, in an order that nobody can foresee, and time every call."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from compress.evaluation.channel import Clock, OutOfTimeError
from compress.evaluation.measure import Progress
from compress.evaluation.pictures import Pictures
from compress.evaluation.runtime import Runtime
from compress.evaluation.runtimes import EvaluationSettings
from metadata.errors import VerificationError, first_line

REPEATS = 64  # images that are asked a second time
MOST_LOGITS = 2**28  # of all images, 4 bytes each; ImageNet's 50,000 images with 1,000 classes take a fifth


@dataclasses.dataclass(kw_only=True)
class Answers:
    """A runtime's answers, and the time of each call by this process's clock.

    Args:
        logits: (N, classes) float32, the first answer to each image, in the order of the images. Wider where a model has
            more outputs than the data have classes.
        first_ms: (N,) milliseconds of the first call with each image.
        order: (N,) indices of the images in the order of their first calls.
        again: (image, milliseconds) of every repeated call.
    """

    logits: np.ndarray
    first_ms: np.ndarray
    order: np.ndarray
    again: list[tuple[int, float]] = dataclasses.field(default_factory=list)

    def widen(self, outputs: int) -> None:
        """Make room for rows of so many logits."""
        if (missing := outputs - self.logits.shape[1]) > 0:
            self.logits = np.pad(self.logits, ((0, 0), (0, missing)), constant_values=np.nan)


def serve(runtimes: Sequence[Runtime], pictures: Sequence[Pictures], classes: Sequence[int],
          settings: EvaluationSettings, clocks: Sequence[Clock], progress: Progress | None = None) -> list[Answers]:
    """Ask every runtime for every image, one image at a time in a random order, and time each call.

    Timed calls and graded calls are the same calls, so a submission cannot tell them apart. Some images are asked again
    later: the answer must be the same, and must not take much less time than the first call (see `repeats_ratio`). The
    calls of several runtimes are interleaved image by image, so that whatever slows the machine slows all of them.

    Args:
        runtimes: the submissions.
        pictures: the N images, as each runtime's preprocessing makes them.
        classes: the number of logits, one for each runtime.
        settings: runs and warm-up.
        clocks: the time that each runtime may take.
        progress: called with the number of requests done and their total.

    Raises:
        VerificationError: an answer is not finite logits or changes between two calls, or a runtime's time is over.
    """
    entropy = np.random.default_rng()  # seeded by the system: code under test must not know the order
    count = len(pictures[0])
    for runtime, outputs in zip(runtimes, classes, strict=True):
        check_room(runtime, count, outputs)
    order, requests = _requests(count, settings.runs, entropy)
    answers = [Answers(logits=np.full((count, outputs), np.nan, np.float32), first_ms=np.zeros(count), order=order)
               for outputs in classes]
    asked, seen = 0, set[int]()
    for _ in range(settings.warmup):
        for runtime, shown, outputs, clock in zip(runtimes, pictures, classes, clocks, strict=True):
            # Noise, so that no test image has been seen before its timed call.
            noise = entropy.standard_normal((1, *shown.pixels.shape[1:]), np.float32)
            ask_in_time(runtime, noise, outputs, clock, 0, count)
    for image in requests:
        inputs = [shown.inputs([image]) for shown in pictures]
        turns = range(len(runtimes)) if asked % 2 == 0 else reversed(range(len(runtimes)))
        for index in turns:
            logits, took = ask_in_time(runtimes[index], inputs[index], classes[index], clocks[index], len(seen), count)
            if image not in seen:
                check_room(runtimes[index], count, logits.shape[1])
                answers[index].widen(logits.shape[1])
                answers[index].logits[image], answers[index].first_ms[image] = logits[0], took
                continue
            answers[index].again.append((image, took))
            if not same_answer(answers[index].logits[image], logits[0]):
                raise VerificationError(f"{pictures[0].paths[image]}: {runtimes[index].name} gave another answer when "
                                        "asked again")
        seen.add(image)
        asked += 1
        if progress:
            progress(asked, len(requests))
    return answers


def check_room(runtime: Runtime, images: int, outputs: int) -> None:
    """Raise VerificationError where the answers to all images do not fit into the evaluator's memory."""
    if images * outputs > MOST_LOGITS:
        raise VerificationError(f"{runtime.name}: {outputs:,} outputs for {images:,} images are {images * outputs:,} "
                                f"numbers, and the evaluator holds at most {MOST_LOGITS:,}: state fewer classes")


def _requests(count: int, runs: int, entropy: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """Return the order of first calls, and all calls: every image once, and some again somewhere after their first call."""
    order = entropy.permutation(count)
    repeats = entropy.choice(count, max(min(REPEATS, count), runs - count))
    place = np.argsort(order)
    keys = np.concatenate([np.arange(count), entropy.uniform(place[repeats] + 0.5, count)])
    return order, np.concatenate([order, repeats])[np.argsort(keys, kind="stable")].tolist()


def ask_in_time(runtime: Runtime, images: np.ndarray, classes: int, clock: Clock, done: int, total: int
                ) -> tuple[np.ndarray, float]:
    """Call a runtime once, see `ask`, unless its time is over.

    Args:
        runtime, images, classes: see `ask`.
        clock: the runtime's time. A runtime in this process is stopped between two calls alone.
        done: images that were answered before.
        total: all images.

    Raises:
        OutOfTimeError: the time is over.
        VerificationError: see `ask`.
    """
    late = f"{done} of {total} images were answered within --time_limit_s {clock.seconds:g}"
    if clock.left <= 0:
        raise OutOfTimeError(f"{runtime.name}: {late}")
    try:
        with clock.running():
            return ask(runtime, images, classes)
    except OutOfTimeError as error:
        raise OutOfTimeError(f"{runtime.name}: {late}") from error


def ask(runtime: Runtime, images: np.ndarray, classes: int) -> tuple[np.ndarray, float]:
    """Call a runtime once. Return the logits, (N, classes) float32, and the milliseconds of the call.

    Raises:
        VerificationError: the model cannot answer, or its answer is not one finite logit for each class.
    """
    start = time.perf_counter_ns()
    try:
        logits = runtime(images)
    except runtime.errors as error:
        raise VerificationError(f"{runtime.name} cannot answer images of shape {list(images.shape)}: "
                                f"{first_line(error)}") from error
    took = runtime.duration_ms((time.perf_counter_ns() - start) / 1e6)
    fits = isinstance(logits, np.ndarray) and logits.shape == (len(images), runtime.outputs or classes)
    if not fits or not np.isfinite(logits).all():
        got = "NaN or infinite values" if fits else list(getattr(logits, "shape", [])) or type(logits).__name__
        more = f", or up to {runtime.max_outputs:,} outputs" if runtime.max_outputs else ""
        raise VerificationError(f"{runtime.name}: the output for {len(images)} image(s) is {got}, expected finite logits "
                                f"{[len(images), classes]} for {classes} classes{more}")
    return logits.astype(np.float32, copy=False), took


def same_answer(one: np.ndarray, two: np.ndarray, tolerance: float = 1e-3) -> bool:
    """Tell whether two rows of logits are equal but for rounding, and have the same first class unless that is a tie.

    The differences are measured by how far the best logits lie apart. Neither an offset nor outputs far below the best
    ones, which could be there for show, hide another answer.
    """
    first, other = int(one.argmax()), int(two.argmax())
    best = np.sort(one)[::-1]
    rounding = 32 * float(np.finfo(np.float32).eps) * max(1e-6, abs(float(best[0])))
    if float(one[first] - one[other]) > rounding:
        return False
    near = np.union1d(np.argsort(one)[-5:], np.argsort(two)[-5:])
    spread = float(best[0] - best[min(4, len(best) - 1)])
    return float(np.abs(one - two)[near].max()) <= tolerance * spread + rounding


def classify(runtime: Runtime, pictures: Pictures, classes: int, settings: EvaluationSettings, clock: Clock,
             progress: Progress | None = None) -> np.ndarray:
    """Return (N, classes) logits, asked in batches of shuffled images, so that neighbours give nothing away.

    Raises:
        VerificationError: an answer is not finite logits, or the time is over.
    """
    check_room(runtime, len(pictures), classes)
    order = np.random.default_rng().permutation(len(pictures))
    logits = np.empty((len(order), classes), np.float32)
    for start in range(0, len(order), settings.batch_size):
        chunk = order[start:start + settings.batch_size]
        logits[chunk], _ = ask_in_time(runtime, pictures.inputs(chunk), classes, clock, start, len(order))
        if progress:
            progress(start + len(chunk), len(order))
    return logits


def repeats_ratio(answers: Answers) -> float | None:
    """Return the median of (repeated call's time / first call's time), or None for fewer than eight repeated calls.

    A ratio far below 1 gives a cache of answers away.
    """
    if len(answers.again) < 8:
        return None
    return float(np.median([took / answers.first_ms[image] for image, took in answers.again]))
