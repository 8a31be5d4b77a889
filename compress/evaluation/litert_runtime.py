"""`.tflite` files on LiteRT, with XNNPACK's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from architectures.counting import check_costs
from compress.evaluation.litert_files import QUANTIZED, StoredTensor, litert_costs, read_litert
from compress.evaluation.runtime import FileRuntime, quiet_library
from compress.evaluation.submission_files import SubmissionFiles, check_claims
from metadata.errors import VerificationError, first_line


class LitertRuntime(FileRuntime):
    """A `.tflite` file on LiteRT. Images and logits of 8 or 16 bits are rounded and restored as the file says."""

    module, package = "ai_edge_litert", "ai-edge-litert"

    def __init__(self, files: SubmissionFiles, threads: int) -> None:
        self.file = read_litert(files.weights, files.input_shape, files.layout)
        from ai_edge_litert.interpreter import Interpreter
        try:
            with quiet_library():
                self.interpreter = Interpreter(model_content=self.file.content, num_threads=threads)
                self.interpreter.allocate_tensors()
            images, logits = self.interpreter.get_input_details()[0], self.interpreter.get_output_details()[0]
            shapes = [self.interpreter._get_tensor_details(index, 0)["shape"].tolist()
                      for index in range(len(self.file.shapes))]
        except (RuntimeError, ValueError) as error:
            raise VerificationError(f"{files.weights}: LiteRT cannot load it: {first_line(error)}") from error
        macs, work = litert_costs(self.file.operators, shapes, self.file.batch)  # by the shapes as they were computed
        check_costs(str(files.weights), macs, work)
        check_claims(files, self.file.parameters, macs)
        super().__init__("litert", files, parameters=self.file.parameters, macs=macs,
                         channels_last=self.file.channels_last, batch=self.file.batch)
        if self.file.input.dtype in QUANTIZED or self.file.output.dtype in QUANTIZED:
            self.details["input_and_output"] = f"{self.file.input.dtype} and {self.file.output.dtype}"
        self.input, self.output = images["index"], logits["index"]

    def run(self, inputs: np.ndarray) -> np.ndarray:
        self.interpreter.set_tensor(self.input, to_grid(inputs, self.file.input))
        self.interpreter.invoke()
        logits = from_grid(self.interpreter.get_tensor(self.output), self.file.output)
        return logits.reshape(len(inputs), -1) if logits.ndim != 2 and logits.shape[:1] == (len(inputs),) else logits


def to_grid(values: np.ndarray, tensor: StoredTensor) -> np.ndarray:
    """Return float32 values as a tensor of the file takes them: rounded to its grid where it is of whole numbers."""
    if tensor.dtype not in QUANTIZED:
        return values
    limits: Any = np.iinfo(tensor.dtype)
    assert tensor.scale is not None and tensor.zero_point is not None
    whole: np.ndarray = np.rint(values / np.float32(tensor.scale)) + tensor.zero_point
    return whole.clip(limits.min, limits.max).astype(tensor.dtype)


def from_grid(values: np.ndarray, tensor: StoredTensor) -> np.ndarray:
    """Return the float32 values that the numbers of a tensor of the file stand for."""
    if tensor.dtype not in QUANTIZED:
        return values
    assert tensor.scale is not None and tensor.zero_point is not None
    return (values.astype(np.float32) - np.float32(tensor.zero_point)) * np.float32(tensor.scale)
