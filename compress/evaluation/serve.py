"""Serving test images: one at a time, in an order that nobody can foresee, every call timed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compress.evaluation.measure import Progress
from compress.evaluation.runtimes import Runtime, EvaluationSettings
from loaders.images import read_images
from metadata.errors import VerificationError, first_line
from metadata.schemas import Preprocessing

REPEATS = 64  # images that are asked a second time
BURST = 32  # images decoded ahead, so that calls follow each other closely


@dataclasses.dataclass
class Answers:
    """What a runtime answered, and how long each call took by this process's clock.

    Args:
        logits: (N, classes) float32, the first answer to each image, in the images' order.
        first_ms: (N,) the first call with each image.
        order: (N,) in which the images were asked.
        again: (image, ms) of every repeated call.
    """

    logits: np.ndarray
    first_ms: np.ndarray
    order: np.ndarray
    again: list[tuple[int, float]] = dataclasses.field(default_factory=list)


class Deadline:
    """The moment after which a submission has taken too long; looked at between calls."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.moment = seconds, time.monotonic() + seconds

    def check(self, done: int, total: int) -> None:
        """Raises VerificationError once the time is over."""
        if time.monotonic() > self.moment:
            raise VerificationError(f"{done} of {total} images were answered within --time_limit_s {self.seconds:g}")


def serve(runtimes: Sequence[Runtime], preprocessings: Sequence[Preprocessing], images: Sequence[Path], classes: int,
          settings: EvaluationSettings, progress: Progress | None = None) -> list[Answers]:
    """Asks every runtime for every image, one at a time, in an order that nobody can foresee, and times each call.

    Timed calls and graded calls are the same calls, so the two runs cannot differ. Some images are asked again, later:
    their answers must be the same, and must not come suddenly faster (`repeats_ratio`). Several runtimes take turns on
    the same image, so that what slows the machine slows all of them.

    Raises:
        VerificationError: an answer is not finite logits, changes between two calls, or the time is over.
        UserError: an image is unreadable.
    """
    entropy = np.random.default_rng()  # seeded by the system: code under test must not know the order
    order = entropy.permutation(len(images))
    repeats = entropy.choice(len(images), max(min(REPEATS, len(images)), settings.runs - len(images)))
    place = np.argsort(order)
    keys = np.concatenate([np.arange(len(images)), entropy.uniform(place[repeats] + 0.5, len(images))])
    requests = np.concatenate([order, repeats])[np.argsort(keys, kind="stable")].tolist()
    answers = [Answers(np.full((len(images), classes), np.nan, np.float32), np.zeros(len(images)), order) for _ in runtimes]
    deadline, asked, seen = Deadline(settings.time_limit_s), 0, set[int]()
    for start in range(0, len(requests), BURST):
        burst = requests[start:start + BURST]
        inputs = [{image: read_images([images[image]], preprocessing) for image in burst}
                  for preprocessing in preprocessings]
        if start == 0:  # noise, so that no test image has been seen before its timed call
            for _ in range(settings.warmup):
                for runtime, pixels in zip(runtimes, inputs, strict=True):
                    deadline.check(0, len(images))
                    ask(runtime, entropy.standard_normal(pixels[burst[0]].shape, np.float32), classes)
        for image in burst:
            deadline.check(len(seen), len(images))
            turns = range(len(runtimes)) if asked % 2 == 0 else reversed(range(len(runtimes)))
            for index in turns:
                logits, took = ask(runtimes[index], inputs[index][image], classes)
                mine = answers[index]
                if image not in seen:
                    mine.logits[image], mine.first_ms[image] = logits[0], took
                    continue
                mine.again.append((image, took))
                if not _same(mine.logits[image], logits[0]):
                    raise VerificationError(f"{images[image]}: {runtimes[index].name} gave another answer when asked again")
            seen.add(image)
            asked += 1
        if progress:
            progress(asked, len(requests))
    return answers


def ask(runtime: Runtime, images: np.ndarray, classes: int) -> tuple[np.ndarray, float]:
    """One call: the logits (N, classes) float32, and its milliseconds.

    Raises:
        VerificationError: the model cannot answer, or not with one finite logit a class.
    """
    start = time.perf_counter_ns()
    try:
        logits = runtime(images)
    except runtime.errors as error:
        raise VerificationError(f"{runtime.name} cannot answer images of shape {list(images.shape)}: "
                                f"{first_line(error)}") from error
    took = (time.perf_counter_ns() - start) / 1e6
    fits = isinstance(logits, np.ndarray) and logits.shape == (len(images), classes)
    if not fits or not np.isfinite(logits).all():
        got = "NaN or infinite values" if fits else list(getattr(logits, "shape", [])) or type(logits).__name__
        raise VerificationError(f"{runtime.name}: the output for {len(images)} image(s) is {got}, expected finite logits "
                                f"{[len(images), classes]} for the data's {classes} classes")
    return logits.astype(np.float32, copy=False), took


def _same(one: np.ndarray, two: np.ndarray, tolerance: float = 1e-3) -> bool:
    """Equal but for rounding, and with the same first class, unless that is a tie but for rounding."""
    first, other = int(one.argmax()), int(two.argmax())
    tie = abs(float(one[first] - one[other])) <= tolerance * max(1e-6, abs(float(one[first])))
    return tie and bool(np.abs(one - two).max() <= tolerance * max(1e-6, float(np.abs(one).max())))


def classify(runtime: Runtime, preprocessing: Preprocessing, images: Sequence[Path], classes: int,
             settings: EvaluationSettings, progress: Progress | None = None) -> np.ndarray:
    """(N, classes) logits by batches, shuffled, so that neighbours give nothing away. Raises what `serve` raises."""
    order = np.random.default_rng().permutation(len(images))
    logits = np.empty((len(images), classes), np.float32)
    deadline = Deadline(settings.time_limit_s)
    for start in range(0, len(images), settings.batch_size):
        deadline.check(start, len(images))
        chunk = order[start:start + settings.batch_size]
        logits[chunk], _ = ask(runtime, read_images([images[index] for index in chunk], preprocessing), classes)
        if progress:
            progress(start + len(chunk), len(images))
    return logits


def repeats_ratio(answers: Answers) -> float | None:
    """Median over repeated images of second time / first time; None for fewer than eight. A cache gives itself away."""
    if len(answers.again) < 8:
        return None
    return float(np.median([took / answers.first_ms[image] for image, took in answers.again]))
