"""What a search for static int8 builds and measures with: the quantizer, the runtimes, the clock, the validation images.

`Workbench` says what the search needs; `OnnxWorkbench` is the real one. A test passes one that answers from a table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from compress.evaluation.measure import measure_accuracy
from compress.evaluation.runtimes import answering, open_file
from compress.quantization.calibration import Images, session
from compress.quantization.layer_times import layer_times
from compress.quantization.portability import verify_portability
from compress.quantization.saturation import Backend
from compress.quantization.static import Calibration, Int8Network, StaticSettings, layer_weights, layers_of, quantize_static
from compress.training.assessment import interleaved_times
from loaders.images import normalize
from loaders.splits import Split
from metadata.files import write_atomically
from metadata.schemas import Preprocessing

SENSITIVITY_IMAGES, PROBE_IMAGES = 64, 32  # calibration images
PORTABILITY_IMAGES, PORTABILITY_BYTES = 2048, 2**29  # upper bounds on the validation images that are emulated

Answer = Callable[[Tensor], Tensor]  # (N, C, H, W) preprocessed -> (N, classes) logits


class Workbench(Protocol):
    """What a search needs.

    Attributes:
        float_content: the float network's file.
        weights: the number of weights of each layer, in the order of the graph.
        images: the number of validation images.
        calibration_images: the number of calibration images.
    """

    float_content: bytes
    weights: dict[str, int]
    images: int
    calibration_images: int

    def now(self) -> float:
        """Return the seconds since some fixed moment."""

    def quantize(self, settings: StaticSettings, kept_float: Collection[str] = ()) -> Int8Network:
        """Return the int8 network, see `quantize_static`."""

    def open(self, content: bytes, backend: Backend) -> Answer:
        """Load a file on a runtime."""

    def probe(self, answer: Answer) -> Tensor:
        """Return the logits of some calibration images, one image at a time, as images are served."""

    def reference(self, network: Int8Network | None = None) -> Tensor:
        """Return ONNX Runtime's logits of the same images: of a network, or of the float network."""

    def count_correct(self, answer: Answer) -> int:
        """Return the number of right answers on the validation images."""

    def latencies(self, answers: Sequence[Answer]) -> list[float]:
        """Return the milliseconds of each model at batch 1, measured interleaved."""

    def layer_times(self, network: Int8Network | None, backend: Backend) -> dict[str, float]:
        """Return the milliseconds of each layer, by the runtime's profiler; of the float network for None."""

    def sensitivity(self, settings: StaticSettings, layer: str) -> float:
        """Return how much the layer disturbs the logits when the layer alone is int8: mean squared error over variance."""

    def portability(self, content: bytes, backend: Backend, tolerated_drop: float) -> dict[str, Any]:
        """Return what `verify_portability` finds on the validation images."""


class OnnxWorkbench:
    """The real workbench: ONNX Runtime's quantizer, the runtimes that will serve the file, and the monotonic clock.

    Args:
        calibration: the float network with its calibration images.
        split: the validation split.
        images: the largest number of validation images to use; they are drawn at random.
        preprocessing: of the network's images.
        folder: where files lie while a runtime loads them.
    """

    def __init__(self, calibration: Calibration, split: Split, images: int, preprocessing: Preprocessing, *,
                 folder: Path) -> None:
        self.calibration, self.split, self.preprocessing, self.folder = calibration, split, preprocessing, folder
        self.ids = split.sample(images)
        self.images, self.calibration_images = len(self.ids), len(calibration.images)
        self.float_content: bytes = calibration.model.SerializeToString()
        weights = layer_weights(calibration.model)
        self.weights = {node.name: weights[node.name] for node in layers_of(calibration.model)}
        channels, height, width = calibration.images.shape[1:]
        self.input_shape = channels, height, width
        self._logits_before: dict[bool, Images] = {}

    def now(self) -> float:
        return time.monotonic()

    def quantize(self, settings: StaticSettings, kept_float: Collection[str] = ()) -> Int8Network:
        return quantize_static(self.calibration, settings, kept_float)

    def open(self, content: bytes, backend: Backend) -> Answer:
        path = self.folder / "candidate.onnx"
        write_atomically(path, content)
        answer = answering(open_file(path, self.input_shape, self.preprocessing, backend))
        path.unlink()
        return answer

    def probe(self, answer: Answer) -> Tensor:
        return torch.cat([answer(image[None]) for image in torch.from_numpy(self.calibration.images[:PROBE_IMAGES])])

    def reference(self, network: Int8Network | None = None) -> Tensor:
        model = self.calibration.model if network is None else network.model
        return torch.from_numpy(self._logits(model, self.calibration.images[:PROBE_IMAGES]))

    def count_correct(self, answer: Answer) -> int:
        """Return the number of right answers, one image at a time: kernels differ with the batch."""
        return measure_accuracy(answer, self.split.batches(1, self.ids), self.preprocessing, self.images).correct

    def latencies(self, answers: Sequence[Answer]) -> list[float]:
        return interleaved_times(answers, self.input_shape)

    def layer_times(self, network: Int8Network | None, backend: Backend) -> dict[str, float]:
        return layer_times(network.model if network else self.calibration.model, backend, self.calibration.images[:1])

    def sensitivity(self, settings: StaticSettings, layer: str) -> float:
        images = self.calibration.images[:SENSITIVITY_IMAGES]
        if settings.equalise not in self._logits_before:
            self._logits_before[settings.equalise] = self._logits(self.calibration.network(settings.equalise), images)
        expected = self._logits_before[settings.equalise]
        scale = float(np.square(expected - expected.mean(axis=1, keepdims=True)).mean())
        alone = quantize_static(self.calibration, replace(settings, float_ends=False), only=[layer])
        got = self._logits(alone.model, images)
        return float(np.square(got - expected).mean()) / max(scale, 1e-30)

    def portability(self, content: bytes, backend: Backend, tolerated_drop: float) -> dict[str, Any]:
        images, labels = self._sample
        return verify_portability(content, images, labels, tolerated_drop, backend, self.calibration.threads)

    @cached_property
    def _sample(self) -> tuple[Tensor, Tensor]:
        """Validation images, preprocessed, and their labels, for the emulation."""
        count = min(PORTABILITY_IMAGES, max(1, PORTABILITY_BYTES // self.calibration.images[0].nbytes))
        ids = self.ids[torch.linspace(0, self.images - 1, min(count, self.images)).long()]
        images = self.split.images.batch(ids).cpu()
        return normalize(images, self.preprocessing), self.split.labels[ids.to(self.split.labels.device)].cpu()

    def _logits(self, model: Any, images: Images) -> Any:
        return session(model, self.calibration.threads).run(None, {model.graph.input[0].name: images})[0]
