"""The runtimes of a submission by their names: which one runs it, and how it is opened."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from architectures.architecture import Architecture
from architectures.counting import count_parameters
from architectures.kernels import ON_KERNELS, int8_arithmetic, why_not_int8
from architectures.weights import open_model
from compress.evaluation.file_formats import FILE_FORMATS, format_of
from compress.evaluation.runtime import Runtime
from compress.evaluation.submission import open_submission, read_submission
from compress.evaluation.submission_files import SubmissionFiles
from compress.evaluation.survey import Survey
from metadata.errors import UserError, enough_memory
from metadata.files import read_json
from metadata.schemas import ARCHITECTURE_FILE, Preprocessing

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How to measure a submission.

    Args:
        runs: timed calls at batch 1.
        warmup: calls before the timed ones.
        threads: threads of one inference; 1 is the most comparable between machines.
        backend: a name of `BACKENDS`; "auto" is the submission's own choice, or the first of its kind.
        batch_size: for the accuracy; latency is always measured at batch 1.
        min_accuracy: percent; below it the guarded score is zero.
        allow_code: run a submission that is code, in a sandbox.
        weak_sandbox: do without bubblewrap where it is missing.
        time_limit_s: seconds for reading and opening a submission and for all its calls.
        memory_limit_mb: MB (2^20 bytes) beyond what the submission's process has before it reads the submission.
    """

    runs: int = 130  # as many as a p95 needs
    warmup: int = 10
    threads: int = 1
    backend: str = "auto"
    batch_size: int = 1
    min_accuracy: float = 0.0
    allow_code: bool = False
    weak_sandbox: bool = False
    time_limit_s: float = 3600.0
    memory_limit_mb: int = 4096

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        for name, low, high in (("runs", 1, 10**6), ("warmup", 0, 10**6), ("threads", 1, 1024), ("batch_size", 1, 4096),
                                ("memory_limit_mb", 256, 2**20)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name}: expected {low} to {high}, got {getattr(self, name)}")
        if not 0 <= self.min_accuracy <= 100:
            raise UserError(f"--min_accuracy: expected a percentage, got {self.min_accuracy}")
        if not 0 < self.time_limit_s <= 10**7:
            raise UserError(f"--time_limit_s: expected a positive number of seconds up to 10^7, got {self.time_limit_s}")


class TorchRuntime(Runtime):
    """A submission of the toolkit's own format: an architecture JSON and a state dict."""

    def __init__(self, files: SubmissionFiles) -> None:
        import torch
        self.model = open_submission(files)
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        super().__init__("torch", {"all": count_parameters(self.model), "trainable": trainable},
                         files.metadata.macs if files.metadata else None)  # checked against the architecture
        if computed := int8_arithmetic(self.model):
            self.details["int8_arithmetic"] = computed
            if computed != ON_KERNELS:
                self.warnings.append(f"the int8 layers were computed {computed}")
        self._mode, self._tensor = torch.inference_mode, torch.from_numpy

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with self._mode():
            return self.model(self._tensor(images)).numpy()  # type: ignore[no-any-return]


# By the kind of submission; the first is the default.
BACKENDS = {"graph": ("torch",), "code": ("torch",), **{name: tuple(each.runtimes) for name, each in FILE_FORMATS.items()}}


def check_runnable(kind: str, backend: str, settings: EvaluationSettings, where: str, what: str) -> None:
    """Check before anything is opened that a submission can run as the settings say.

    Args:
        kind: of the submission.
        backend: that will run it.
        settings: whether code may run, and the batch size.
        where: the submission or its weights, for messages.
        what: the submission in words.

    Raises:
        UserError: the backend cannot run this kind of submission, or the submission is code and `allow_code` is off.
    """
    if backend not in BACKENDS[kind]:
        raise UserError(f"--backend {backend}: {where} runs on {' or '.join(BACKENDS[kind])}")
    if kind != "code":
        return
    if not settings.allow_code:
        raise UserError(f"{where}: this submission is {what}; it runs only with --allow_code, in a sandbox")
    if settings.batch_size != 1:
        raise UserError(f"--batch_size {settings.batch_size}: code is graded at batch 1, so that its timed calls and its "
                        "graded ones cannot be told apart")


def open_here(files: SubmissionFiles, backend: str, threads: int) -> Runtime:
    """Open a package or a model file in this process.

    Raises:
        UserError: the backend is not installed.
        VerificationError: the submission's claims do not hold, or it cannot be loaded.
    """
    if files.kind == "graph":
        return TorchRuntime(files)
    runtime = FILE_FORMATS[files.kind].runtimes[backend]
    if not importlib.util.find_spec(runtime.module):
        raise UserError(f"backend {backend}: the package is not installed; pip install {runtime.package}")
    return runtime(files, threads)


def preferred_backend(files: SubmissionFiles) -> str:
    """Return the backend that a submission names, if it is installed, or else the first backend of its kind."""
    named = files.metadata.runtime if files.metadata else None
    runtimes = FILE_FORMATS[files.kind].runtimes if files.kind in FILE_FORMATS else {}
    if named and named in runtimes and importlib.util.find_spec(runtimes[named].module):
        return named
    return BACKENDS[files.kind][0]


def open_file(path: Path, input_shape: tuple[int, int, int], preprocessing: Preprocessing, backend: str | None = None,
              threads: int = 1) -> Runtime:
    """Open a model file that is not packaged yet, on the runtime that will serve the package.

    Args:
        path: the file; its suffix is that of its format.
        input_shape: (C, H, W).
        preprocessing: how images become the input.
        backend: the default of the format unless given.
        threads: of one inference.

    Raises:
        UserError: the backend is not installed.
        VerificationError: the file cannot be loaded.
    """
    found = format_of(path)
    if found is None:
        raise UserError(f"{path}: expected a file of {', '.join(each.suffix for each in FILE_FORMATS.values())}")
    nothing = Survey(folder=path.parent, files={}, name_bytes=0, stamp="")  # the folder is the pipeline's own
    files = SubmissionFiles(folder=path.parent, survey=nothing, kind=found.name, weights=path, input_shape=input_shape,
                            preprocessing=preprocessing, preprocessing_from="the pipeline")
    runtime = open_here(files, backend or BACKENDS[found.name][0], threads)
    runtime.name = str(path)
    return runtime


def load_model(model_path: str | Path) -> nn.Module:
    """Load a packaged model, verified, in eval mode, on the CPU. Evaluation panels call this function.

    The module maps `(N, C, H, W)` float32, preprocessed as the metadata says, to `(N, num_classes)` float32 logits. A
    PyTorch model is a graph of its layers; a model of another format is a module without parameters, which calls the
    model's runtime.

    Args:
        model_path: the submission folder, or the weights file: a `.pth` with the architecture JSON beside it, or the
            model file (such as an `.onnx`) of a submission folder.

    Raises:
        UserError: the path does not exist, or is a submission of another kind.
        VerificationError: a file is not the one that was packaged, the weights do not fit the architecture, or the model
            needs more memory than there is.
    """
    path = Path(model_path)
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    with enough_memory(path):
        if path.is_file() and format_of(path) is None:
            return _warned(open_model(read_json(path.parent / ARCHITECTURE_FILE, Architecture), path), path)
        files = read_submission(path if path.is_dir() else path.parent)
        if path.is_file() and not path.samefile(files.weights):
            raise UserError(f"{path}: the submission beside it has the weights {files.weights.name}")
        if files.kind == "code":
            raise UserError(f"{files.folder}: this submission is code; it can be evaluated (--allow_code), not loaded")
        if files.kind == "graph":
            return _warned(open_submission(files), path)
        import torch
        return served_module()(open_here(files, preferred_backend(files), torch.get_num_threads())).eval()


def _warned(model: nn.Module, path: Path) -> nn.Module:
    """Return the model, after a warning if its int8 layers compute in float here."""
    if reason := why_not_int8(model):
        logging.getLogger(__name__).warning("%s: the int8 layers compute in float32: %s", path, reason)
    return model


@functools.cache
def served_module() -> type[nn.Module]:
    """Return the class of a module that calls a runtime; a function, because torch is imported where it is needed."""
    import torch
    from torch import nn

    class Served(nn.Module):
        """A runtime as a module: (N, C, H, W) float32 -> (N, classes) logits, on the CPU, without gradients."""

        def __init__(self, runtime: Runtime) -> None:
            super().__init__()
            self.runtime = runtime

        def forward(self, images: Tensor) -> Tensor:
            return torch.from_numpy(self.runtime(images.detach().cpu().float().contiguous().numpy()))

    return Served


def answering(runtime: Runtime) -> Callable[[Tensor], Tensor]:
    """Return a runtime as a function of tensors, for `measure_accuracy` and `measure_latency`."""
    import torch

    def answer(images: Tensor) -> Tensor:
        return torch.from_numpy(runtime(images.numpy()))

    return answer
