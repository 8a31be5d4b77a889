"""OpenVINO's IR on OpenVINO's CPU plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from architectures.counting import check_costs
from compress.evaluation.onnx_runtimes import OnOpenvino, import_openvino, openvino_core
from compress.evaluation.openvino_files import ir_costs, read_openvino
from compress.evaluation.submission_files import SubmissionFiles, check_claims, check_int8_layers
from metadata.errors import VerificationError, first_line


class OpenvinoIrRuntime(OnOpenvino):
    """An IR on OpenVINO."""

    def __init__(self, files: SubmissionFiles, threads: int) -> None:
        self.file = read_openvino(files.weights, files.input_shape, files.layout)
        self.prepare(files, threads, self.file.channels_last)
        batch = self.file.batch or 1
        try:
            model = self.model()
            model.reshape([batch, *self.shape])
            macs, work = ir_costs(files.weights, model, batch)
        except RuntimeError as error:
            raise VerificationError(f"{files.weights}: OpenVINO cannot load it: {first_line(error)}") from error
        check_costs(str(files.weights), macs, work)
        check_claims(files, self.file.parameters, macs)
        check_int8_layers(files, self.file.layers)
        super().__init__("openvino", files, parameters=self.file.parameters, macs=macs,
                         channels_last=self.file.channels_last, batch=self.file.batch)
        self.compile(batch)

    def model(self) -> Any:
        openvino = import_openvino()
        numbers = openvino.Tensor(np.frombuffer(self.file.numbers or b"\0", np.uint8))
        return openvino_core().read_model(self.file.graph, numbers)


def numbers_beside(path: Path) -> tuple[Path, ...]:
    """Return the file with the numbers of an IR."""
    return (path.with_suffix(".bin"),)
