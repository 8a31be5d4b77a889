"""A submission under evaluation: its reader, its classes, the test images as it wants them, its model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from compress.evaluation.channel import Clock
from compress.evaluation.class_order import ClassOrder, class_order
from compress.evaluation.extras import toolkit
from compress.evaluation.facts import SubmissionFacts
from compress.evaluation.measure import Progress
from compress.evaluation.pictures import Pictures, TestData, decode_pictures
from compress.evaluation.reader_runtime import ReaderRuntime, SubmissionReader
from compress.evaluation.runtime import Runtime
from compress.evaluation.runtimes import check_runnable, EvaluationSettings
from metadata.errors import VerificationError


class Contestant:
    """A submission under evaluation: a reader of its own, and its model once that is open.

    Attributes:
        clock: the time that the submission may take.
        facts: what its files say.
        order: its classes.
        pictures: the test images as it wants them.
        runtime: its model.
        versions: of the packages that run it.
    """

    facts: SubmissionFacts
    order: ClassOrder
    pictures: Pictures
    runtime: Runtime
    versions: dict[str, str]

    def __init__(self, folder: str | Path, settings: EvaluationSettings) -> None:
        self.settings, self.clock, self.closing = settings, Clock(settings.time_limit_s), contextlib.ExitStack()
        self.reader = SubmissionReader(Path(folder), settings, self.clock)
        self.closing.callback(self.reader.close)
        self.peak_memory: dict[str, Any] | None = None

    def prepare(self, data: TestData, progress: Progress | None = None) -> None:
        """Read the submission, and the test images as it wants them. Nothing of it has run after that.

        Raises:
            UserError: the submission cannot run as the settings say, or an image is unreadable.
            VerificationError: what the files say does not hold, or the time is over.
        """
        self.facts = facts = self.reader.read()
        self.backend = facts.backend if self.settings.backend == "auto" else self.settings.backend
        where = str(facts.folder) if facts.kind == "code" else Path(facts.weights).name
        check_runnable(facts.kind, self.backend, self.settings, where, facts.what)
        self.order = class_order(facts, data.listing)
        self.pictures = decode_pictures(data.paths, facts.preprocessing, facts.input_shape, facts.packaged, self.clock,
                                        progress)

    def open(self, data: TestData) -> None:
        """Open the model. Raise as `prepare` does."""
        if self.facts.kind == "code":
            seen = self.reader.command("open")
            self.versions = seen["versions"]
            self.runtime = toolkit("--allow_code", "code_runtime").open_code(
                self.facts, self.settings, len(self.order.names), data.listing.folder, seen, self.clock)
        else:
            self.runtime = runtime = ReaderRuntime(self.reader, self.backend)
            self.versions = runtime.versions
        self.closing.callback(self.runtime.close)
        self.runtime.name = str(self.facts.folder)

    def finish(self) -> None:
        """End the model, and check that the submission's files are as they were. Raise VerificationError if not."""
        self.runtime.close()
        now = self.reader.command("hash")
        if now["hashes"] != self.facts.hashes or now["stamp"] != self.facts.stamp:
            raise VerificationError(f"{self.facts.folder}: the folder changed while its model ran")
        if self.facts.kind != "code":
            self.peak_memory = self.reader.command("close")["peak_memory"]

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.close()
