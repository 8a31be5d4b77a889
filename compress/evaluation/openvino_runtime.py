"""OpenVINO's IR on OpenVINO's CPU plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from architectures.counting import check_costs
from compress.evaluation.onnx_runtimes import compile_for_openvino, import_openvino, openvino_core
from compress.evaluation.openvino_files import ir_costs, read_openvino
from compress.evaluation.runtime import FileRuntime
from compress.evaluation.submission_files import SubmissionFiles, check_claims, check_int8_layers
from metadata.errors import VerificationError, first_line


class OpenvinoIrRuntime(FileRuntime):
    """An IR on OpenVINO, compiled for each number of images in a call, as an ONNX file there."""

    module = package = "openvino"

    def __init__(self, files: SubmissionFiles, threads: int) -> None:
        self.path, self.threads = files.weights, threads
        self.file = read_openvino(files.weights, files.input_shape, files.layout)
        channels, height, width = files.input_shape
        self.shape = (height, width, channels) if self.file.channels_last else files.input_shape
        self.compiled: dict[int, Any] = {}
        batch = self.file.batch or 1
        try:
            model = self._model()
            model.reshape([batch, *self.shape])
            macs, work = ir_costs(files.weights, model, batch)
        except RuntimeError as error:
            raise VerificationError(f"{files.weights}: OpenVINO cannot load it: {first_line(error)}") from error
        check_costs(str(files.weights), macs, work)
        check_claims(files, self.file.parameters, macs)
        check_int8_layers(files, self.file.layers)
        super().__init__("openvino", files, parameters=self.file.parameters, macs=macs,
                         channels_last=self.file.channels_last, batch=self.file.batch)
        self._compile(batch)

    def _model(self) -> Any:
        openvino = import_openvino()
        numbers = openvino.Tensor(np.frombuffer(self.file.numbers or b"\0", np.uint8))
        return openvino_core().read_model(self.file.graph, numbers)

    def _compile(self, images: int) -> Any:
        try:
            self.compiled[images] = compile_for_openvino(self._model(), [images, *self.shape], self.threads)
        except RuntimeError as error:
            raise VerificationError(f"{self.path}: OpenVINO cannot load it: {first_line(error)}") from error
        return self.compiled[images]

    def run(self, inputs: np.ndarray) -> np.ndarray:
        model = self.compiled.get(len(inputs)) or self._compile(len(inputs))
        return next(iter(model(inputs).values()))


def numbers_beside(path: Path) -> tuple[Path, ...]:
    """Return the file with the numbers of an IR."""
    return (path.with_suffix(".bin"),)
