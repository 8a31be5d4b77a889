"""The runtimes of a submission behind one interface: PyTorch, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy as np

from architectures.architecture import Architecture
from architectures.counting import count_parameters
from architectures.kernels import ON_KERNELS, int8_arithmetic, why_not_int8
from architectures.weights import open_model
from architectures.onnx_files import read_onnx
from compress.evaluation.submission import SubmissionFiles, check_claims, open_submission, read_submission
from compress.evaluation.survey import Survey
from metadata.errors import UserError, VerificationError, enough_memory, first_line
from metadata.files import read_json
from metadata.machine import machine
from metadata.schemas import ARCHITECTURE_FILE, METADATA_FILE, Preprocessing

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How to measure a submission.

    Args:
        runs: timed calls at batch 1.
        warmup: calls before the timed ones.
        threads: threads of one inference; 1 is the most comparable between machines.
        backend: "torch", "onnxruntime" or "openvino"; "auto" is the submission's own choice, or the first of its kind.
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


class Runtime:
    """A submission that can be called: (N, C, H, W) float32 -> (N, classes) logits.

    Attributes:
        backend: "torch", "onnxruntime" or "openvino".
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


class OnnxFileRuntime(Runtime):
    """Base of the runtimes of an ONNX file: checks the file and its claims, and gives it images in its own layout."""

    def __init__(self, backend: str, files: SubmissionFiles) -> None:
        self.file = read_onnx(files.weights, files.input_shape)
        check_claims(files, self.file.parameters, self.file.macs)
        if files.metadata and files.metadata.quantization.scheme == "static_int8":
            stated = {name: text.startswith("int8") for name, text in files.metadata.quantization.layers.items()}
            odd = min((name for name in stated.keys() | self.file.layers.keys()
                       if stated.get(name) != self.file.layers.get(name)), default=None)
            if odd is not None:
                raise VerificationError(f"{files.folder}: quantization in {METADATA_FILE} is not what the layers are "
                                        f"({odd})")
        super().__init__(backend, {"all": self.file.parameters, "trainable": None}, self.file.macs)
        self.warnings += files.notes
        if self.file.channels_last:
            self.details["input_layout"] = "NHWC"
        if self.file.batch and self.file.batch > 1:
            self.warnings.append(
                f"the file takes {self.file.batch} images a call and no other number: one image is served among zeros, and "
                "its latency is that of the whole call; export with a batch of any size, or of 1")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        if self.file.channels_last:
            images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        batch = self.file.batch or len(images)
        if batch == len(images):
            return self.run(images)
        missing = -len(images) % batch if len(images) else batch
        filled = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)]) if missing else images
        parts = [self.run(filled[start:start + batch]) for start in range(0, len(filled), batch)]
        return np.concatenate(parts)[:len(images)]

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Return the logits of as many images as the file takes, in the file's layout."""
        raise NotImplementedError


class OnnxRuntime(OnnxFileRuntime):
    """An ONNX file on ONNX Runtime's CPU provider."""

    def __init__(self, files: SubmissionFiles, threads: int) -> None:
        super().__init__("onnxruntime", files)
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state
        self.errors = (RuntimeError, ValueError, *(kind for kind in vars(state).values()
                                                   if isinstance(kind, type) and issubclass(kind, Exception)))
        try:
            self.session = onnxruntime.InferenceSession(
                self.file.content or str(files.weights), onnxruntime_options(threads, self.file.may_saturate),
                ["CPUExecutionProvider"])
        except self.errors as error:
            raise VerificationError(f"{files.weights}: ONNX Runtime cannot load it: {first_line(error)}") from error

    def run(self, inputs: np.ndarray) -> np.ndarray:
        return self.session.run(None, {self.file.input_name: inputs})[0]  # type: ignore[no-any-return]


def onnxruntime_options(threads: int, may_saturate: bool) -> Any:
    """Return ONNX Runtime's session options: the number of threads, no log, and exact integer products on every CPU.

    On CPUs without VNNI instructions the fast kernel saturates in 16 bits with some weights. For a file with such weights
    an option selects the exact kernel there, which takes up to twice as long.

    Args:
        threads: of one inference.
        may_saturate: see `architectures.onnx_files.may_saturate`.
    """
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    if may_saturate and not {"avx512_vnni", "avx_vnni"} & set(machine()["flags"]):
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


class OpenvinoRuntime(OnnxFileRuntime):
    """An ONNX file on OpenVINO's CPU plugin, compiled for each number of images in a call: fixed shapes are faster."""

    def __init__(self, files: SubmissionFiles, threads: int) -> None:
        super().__init__("openvino", files)
        channels, height, width = files.input_shape
        self.threads, self.path = threads, files.weights
        self.content = self.file.content or files.weights.read_bytes()  # the file may be gone at a later call
        self.shape = (height, width, channels) if self.file.channels_last else files.input_shape
        self.compiled: dict[int, Any] = {}
        self._compile(self.file.batch or 1)

    def _compile(self, images: int) -> Any:
        try:
            self.compiled[images] = compile_for_openvino(self.content, [images, *self.shape], self.threads)
        except RuntimeError as error:
            raise VerificationError(f"{self.path}: OpenVINO cannot load it: {first_line(error)}") from error
        return self.compiled[images]

    def run(self, inputs: np.ndarray) -> np.ndarray:
        model = self.compiled.get(len(inputs)) or self._compile(len(inputs))
        return next(iter(model(inputs).values()))


def compile_for_openvino(model: Any, shape: Sequence[int], threads: int, **options: Any) -> Any:
    """Compile a model, or the bytes of an ONNX file, for OpenVINO's CPU plugin: inputs of one shape, least latency.

    Args:
        model: an OpenVINO model, or bytes.
        shape: (N, C, H, W) of the input.
        threads: threads of one inference.
        options: properties of the plugin that replace the defaults here.

    Raises:
        UserError: OpenVINO is not installed.
        RuntimeError: OpenVINO cannot compile the model.
    """
    core = _core(import_openvino())
    if isinstance(model, bytes):
        model = core.read_model(model)
    model.reshape(list(shape))
    return core.compile_model(model, "CPU", {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32", **options})  # the plugin's default may compute in less than float32


@functools.cache
def _core(openvino: Any) -> Any:
    """Return OpenVINO's runtime, one for the process: the runtime must live as long as the models that it compiled."""
    return openvino.Core()


def import_openvino() -> Any:
    """Import openvino with its telemetry off; on import the package would report to an analytics server.

    Raises:
        UserError: the package is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # openvino falls back to a stub
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise UserError("backend openvino: the package is not installed; pip install openvino") from error


ONNX_RUNTIMES: dict[str, type[OnnxRuntime] | type[OpenvinoRuntime]] = {
    "onnxruntime": OnnxRuntime, "openvino": OpenvinoRuntime}
# By the kind of submission; the first is the default.
BACKENDS = {"graph": ("torch",), "onnx": tuple(ONNX_RUNTIMES), "code": ("torch",)}


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
    """Open a package or an ONNX file in this process.

    Raises:
        VerificationError: the submission's claims do not hold, or it cannot be loaded.
    """
    return TorchRuntime(files) if files.kind == "graph" else ONNX_RUNTIMES[backend](files, threads)


def preferred_backend(files: SubmissionFiles) -> str:
    """Return the backend that a submission names, if it is installed, or else the first backend of its kind."""
    named = files.metadata.runtime if files.metadata else None
    if files.kind == "onnx" and named and (named != "openvino" or importlib.util.find_spec("openvino")):
        return named
    return BACKENDS[files.kind][0]


def open_onnx(path: Path, input_shape: tuple[int, int, int], preprocessing: Preprocessing, backend: str = "onnxruntime",
              threads: int = 1) -> Runtime:
    """Open an ONNX file that is not packaged yet, on the runtime that will serve the package.

    Raises:
        UserError: the backend is not installed.
        VerificationError: the file cannot be loaded, see `read_onnx`.
    """
    nothing = Survey(folder=path.parent, files={}, name_bytes=0, stamp="")  # the folder is the pipeline's own
    files = SubmissionFiles(folder=path.parent, survey=nothing, kind="onnx", weights=path, input_shape=input_shape,
                            preprocessing=preprocessing, preprocessing_from="the pipeline")
    runtime = ONNX_RUNTIMES[backend](files, threads)
    runtime.name = str(path)
    return runtime


def load_model(model_path: str | Path) -> nn.Module:
    """Load a packaged model, verified, in eval mode, on the CPU. Evaluation panels call this function.

    The module maps `(N, C, H, W)` float32, preprocessed as the metadata says, to `(N, num_classes)` float32 logits. A
    PyTorch model is a graph of its layers; an ONNX model is a module without parameters, which calls the model's runtime.

    Args:
        model_path: the submission folder, or the weights file: a `.pth` with the architecture JSON beside it, or the
            `.onnx` of a submission folder.

    Raises:
        UserError: the path does not exist, or is a submission of another kind.
        VerificationError: a file is not the one that was packaged, the weights do not fit the architecture, or the model
            needs more memory than there is.
    """
    path = Path(model_path)
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    with enough_memory(path):
        if path.is_file() and path.suffix != ".onnx":
            return _warned(open_model(read_json(path.parent / ARCHITECTURE_FILE, Architecture), path), path)
        files = read_submission(path if path.is_dir() else path.parent)
        if path.is_file() and not path.samefile(files.weights):
            raise UserError(f"{path}: the submission beside it has the weights {files.weights.name}")
        if files.kind == "code":
            raise UserError(f"{files.folder}: this submission is code; it can be evaluated (--allow_code), not loaded")
        if files.kind == "graph":
            return _warned(open_submission(files), path)
        import torch
        return served_module()(ONNX_RUNTIMES[preferred_backend(files)](files, torch.get_num_threads())).eval()


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
