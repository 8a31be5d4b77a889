"""ONNX files on ONNX Runtime and on OpenVINO."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from architectures.onnx_files import read_onnx
from architectures.onnx_sessions import onnxruntime_options
from compress.evaluation.runtime import FileRuntime
from compress.evaluation.submission_files import SubmissionFiles, check_claims, check_int8_layers
from metadata.errors import UserError, VerificationError, first_line


class OnnxFileRuntime(FileRuntime):
    """Base of the runtimes of an ONNX file: checks the file and its claims."""

    def __init__(self, backend: str, files: SubmissionFiles) -> None:
        self.file = read_onnx(files.weights, files.input_shape, files.layout)
        check_claims(files, self.file.parameters, self.file.macs)
        check_int8_layers(files, self.file.layers)
        super().__init__(backend, files, parameters=self.file.parameters, macs=self.file.macs,
                         channels_last=self.file.channels_last, batch=self.file.batch)


class OnnxRuntime(OnnxFileRuntime):
    """An ONNX file on ONNX Runtime's CPU provider."""

    module = package = "onnxruntime"

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


class OnOpenvino(FileRuntime):
    """The part of OpenVINO's runtimes that compiles a model for each number of images in a call: fixed shapes are faster.

    Attributes:
        path: the file, for messages.
        threads: of one inference.
        shape: of an image in the file's layout.
        compiled: by the number of images.
    """

    module = package = "openvino"

    def prepare(self, files: SubmissionFiles, threads: int, channels_last: bool) -> None:
        """Set the attributes, before anything is compiled."""
        channels, height, width = files.input_shape
        self.path, self.threads = files.weights, threads
        self.shape = (height, width, channels) if channels_last else files.input_shape
        self.compiled: dict[int, Any] = {}

    def model(self) -> Any:
        """Return a new OpenVINO model, or the bytes of an ONNX file."""
        raise NotImplementedError

    def compile(self, images: int) -> Any:
        """Compile the model for a number of images in a call.

        Raises:
            VerificationError: OpenVINO cannot load it.
        """
        try:
            self.compiled[images] = compile_for_openvino(self.model(), [images, *self.shape], self.threads)
        except RuntimeError as error:
            raise VerificationError(f"{self.path}: OpenVINO cannot load it: {first_line(error)}") from error
        return self.compiled[images]

    def run(self, inputs: np.ndarray) -> np.ndarray:
        model = self.compiled.get(len(inputs)) or self.compile(len(inputs))
        return next(iter(model(inputs).values()))


class OpenvinoRuntime(OnOpenvino, OnnxFileRuntime):
    """An ONNX file on OpenVINO's CPU plugin."""

    def __init__(self, files: SubmissionFiles, threads: int) -> None:
        OnnxFileRuntime.__init__(self, "openvino", files)
        self.prepare(files, threads, self.file.channels_last)
        self.content = self.file.content or files.weights.read_bytes()  # the file may be gone at a later call
        self.compile(self.file.batch or 1)

    def model(self) -> bytes:
        return self.content


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
    core = openvino_core()
    if isinstance(model, bytes):
        model = core.read_model(model)
    model.reshape(list(shape))
    return core.compile_model(model, "CPU", {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32", **options})  # the plugin's default may compute in less than float32


@functools.cache
def openvino_core() -> Any:
    """Return OpenVINO's runtime, one for the process: the runtime must live as long as the models that it compiled.

    Raises:
        UserError: OpenVINO is not installed.
    """
    return import_openvino().Core()


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
