"""What a runtime is: a submission that can be called, whatever its format."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from architectures.image_layout import answered_in_batches
from compress.evaluation.submission_files import SubmissionFiles


class Runtime:
    """A submission that can be called: (N, C, H, W) float32 -> (N, classes) logits.

    Attributes:
        backend: its name, such as "torch" or "onnxruntime".
        parameters: the number of stored numbers ("all"), and of trainable ones where that is known.
        macs: multiply-adds an image, where known.
        outputs: the number of logits where a model has more than the data have classes; else None.
        max_outputs: so many logits are accepted where a model has more than the data have classes; 0: none beyond.
        name: for messages.
        errors: the exceptions of a call that the model cannot answer.
        details, warnings: for the result.
    """

    errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, MemoryError)
    max_outputs = 0

    def __init__(self, backend: str, parameters: dict[str, int | None], macs: int | None) -> None:
        self.backend, self.parameters, self.macs = backend, parameters, macs
        self.name = "the model"
        self.outputs: int | None = None
        self.details: dict[str, Any] = {}
        self.warnings: list[str] = []

    def __call__(self, images: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def duration_ms(self, measured_ms: float) -> float:
        """Return the milliseconds that count for the last call, of which the evaluator measured `measured_ms`."""
        return measured_ms

    def close(self) -> None:
        """End what the runtime started, and add details that are known only at the end."""


class FileRuntime(Runtime):
    """Base of the runtimes of a model file: it gives a file images in the file's own layout, as many as the file takes.

    Attributes:
        module: the Python module that the runtime needs.
        package: the name to install it by.
        channels_last: whether the file takes (N, H, W, C).
        batch: the only number of images that a call may have, or None where the file takes any.
    """

    module: ClassVar[str]
    package: ClassVar[str]

    def __init__(self, backend: str, files: SubmissionFiles, *, parameters: int, macs: int | None, channels_last: bool,
                 batch: int | None) -> None:
        super().__init__(backend, {"all": parameters, "trainable": None}, macs)
        self.channels_last, self.batch = channels_last, batch
        self.warnings += files.notes
        if channels_last:
            self.details["input_layout"] = "NHWC"
        if batch and batch > 1:
            self.warnings.append(
                f"the file takes {batch} images a call and no other number: one image is served among zeros, and "
                "its latency is that of the whole call; export with a batch of any size, or of 1")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return answered_in_batches(self.run, images, self.channels_last, self.batch)

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Return the logits of as many images as the file takes, in the file's layout."""
        raise NotImplementedError


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """Keep what a library writes to stderr below Python off the terminal: some tell what they find, and have no setting."""
    with open(os.devnull, "wb") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
