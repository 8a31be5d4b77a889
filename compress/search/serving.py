"""How a network is served: in which form, on which runtime. A network is made ready for it, and timed as it will run."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx

from architectures.architecture import Architecture
from architectures.describe import carry_over, describe
from compress.evaluation.measure import measure_latency
from compress.evaluation.runtimes import answering, open_file
from compress.packaging.export import export
from compress.quantization.dynamic import quantize_graph
from compress.quantization.saturation import Backend as OnnxBackend
from compress.quantization.static import Calibration, StaticSettings, quantize_static
from compress.quantization.weights import DEFAULT_FORM, WeightForm
from compress.search.sizes import Form
from compress.search.timings import Backend, Precision, check_backend
from metadata.files import write_atomically
from metadata.formats import weights_content
from metadata.machine import torch_threads
from metadata.schemas import Preprocessing

ROUNDS, RUNS, WARMUP = 7, 20, 4  # of an interleaved comparison
FEW_ROUNDS, MOST_ROUNDS = 3, 28  # where time is no limit; where the machine is noisy
TIMED_EXAMPLES = 32  # to calibrate with: they change neither time nor bytes
NOISE = 0.02  # of the mean of a ratio of two times; above it, more rounds are taken

Answer = Callable[[Tensor], Tensor]  # (1, C, H, W) preprocessed -> (1, classes) logits


@dataclass(frozen=True)
class Serving:
    """A form of the weights, and the runtime that computes with them."""

    backend: Backend
    form: Form

    @property
    def name(self) -> str:
        """Both in words."""
        return f"{self.form} on {self.backend}"

    @property
    def precision(self) -> Precision:
        """The form as the cost models name it."""
        return "float32" if self.form == "float32" else "int8"


SERVINGS = (Serving("torch", "float32"), Serving("torch", "int8_dynamic"), Serving("onnxruntime", "int8_static"),
            Serving("openvino", "int8_static"))


def servings(backend: str) -> list[Serving]:
    """Return the ways to serve on a runtime, or with "auto" on all that are installed.

    Raises:
        UserError: the runtime is not installed.
    """
    if backend != "auto":
        check_backend(backend)
    return [serving for serving in SERVINGS if serving.backend == backend or (
        backend == "auto" and importlib.util.find_spec(serving.backend))]


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """A network as it is served.

    Args:
        answer: runs it.
        size_bytes: of the weights file.
        architecture: of what is served; of an ONNX file the float network with BatchNorm folded.
        module: of a PyTorch form.
        content: of an ONNX form.
    """

    answer: Answer
    size_bytes: int
    architecture: Architecture
    module: fx.GraphModule | None = None
    content: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """What is needed to make a network ready to be served.

    Args:
        examples: (N, C, H, W) float32, preprocessed training images.
        preprocessing: of the images.
        threads: of one inference.
        folder: where a file lies while a runtime opens it.
    """

    examples: Tensor
    preprocessing: Preprocessing
    threads: int
    folder: Path

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.examples.shape[1:]
        return channels, height, width

    def deploy(self, network: fx.GraphModule, architecture: Architecture, serving: Serving,
               weights: WeightForm = DEFAULT_FORM) -> Deployed:
        """Return a float network in a form, with the default settings of that form, and few images to calibrate with.

        Args:
            network: on any device; it stays as it is.
            architecture: its layers, with its history.
            serving: the form.
            weights: which integers are allowed.
        """
        network = copy.deepcopy(network).cpu().eval()
        if serving.form == "int8_static":
            exported, folded = export(network, architecture)
            calibration = Calibration(exported, self.examples[:TIMED_EXAMPLES].numpy(), torch.get_num_threads())
            content = quantize_static(calibration, StaticSettings(weights=weights)).model.SerializeToString()
            assert serving.backend != "torch"
            return self.opened(content, folded, serving.backend)
        if serving.form == "int8_dynamic":
            with torch_threads(self.threads):
                network, _ = quantize_graph(network, (), self.examples[:8], weights=weights)
            architecture = carry_over(describe(network, architecture.input_shape), architecture)
        size = len(weights_content(network.state_dict()))
        return Deployed(answer=network, size_bytes=size, architecture=architecture, module=network)

    def opened(self, content: bytes, architecture: Architecture, backend: OnnxBackend) -> Deployed:
        """Return an ONNX file on its runtime."""
        path = self.folder / "candidate.onnx"
        write_atomically(path, content)
        try:
            runtime = open_file(path, self.input_shape, self.preprocessing, backend, self.threads)
        finally:
            path.unlink()
        return Deployed(answer=answering(runtime), size_bytes=len(content), architecture=architecture, content=content)


@dataclass(frozen=True)
class Timing:
    """The time of a network at batch 1, and how uncertain it is: one standard error, as a share of it."""

    latency_ms: float
    noise: float


class Stopwatch:
    """Times networks beside one reference, so that a slow moment of the machine hits both.

    A latency is the network's share of the reference's time, taken in turns, times the reference's own latency when the
    machine was calmest. So latencies that were measured at different moments can be compared.

    Args:
        reference: of all comparisons.
        input_shape: (C, H, W).
        threads: of one inference.
        calm_ms: the reference's latency at the calmest moment so far; infinite before the first.
        exact: take more rounds on a noisy machine; else a few are enough, because time is no limit.
    """

    def __init__(self, reference: Answer, input_shape: tuple[int, int, int], threads: int,
                 calm_ms: float = float("inf"), exact: bool = True) -> None:
        self.reference, self.input_shape, self.threads, self.calm_ms = reference, input_shape, threads, calm_ms
        self.rounds, self.most_rounds = (ROUNDS, MOST_ROUNDS) if exact else (FEW_ROUNDS, FEW_ROUNDS)

    def times(self, answers: Sequence[Answer]) -> list[Timing]:
        """Return the time of each network. On a noisy machine it takes up to four times as many rounds."""
        rows: list[list[float]] = []
        while True:
            rows += [[measure_latency(answer, self.input_shape, runs=RUNS, warmup=WARMUP, threads=self.threads).median_ms
                      for answer in (self.reference, *answers)] for _ in range(self.rounds)]
            taken = np.array(rows)
            ratios = taken[:, 1:] / taken[:, :1]
            low, middle, high = np.percentile(ratios, [16, 50, 84], axis=0)
            noise = (high - low) / 2 / middle / np.sqrt(len(rows))
            if len(rows) >= self.most_rounds or not (noise > NOISE).any():
                break
        self.calm_ms = min(self.calm_ms, float(np.median(taken[:, 0])))
        return [Timing(float(ratio) * self.calm_ms, float(each)) for ratio, each in zip(middle, noise, strict=True)]
