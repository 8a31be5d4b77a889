"""`.pte` files on ExecuTorch, with XNNPACK's kernels."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from compress.evaluation.executorch_files import read_executorch
from compress.evaluation.runtime import FileRuntime, quiet_library
from compress.evaluation.submission_files import SubmissionFiles, check_claims
from metadata.errors import VerificationError, first_line


class ExecutorchRuntime(FileRuntime):
    """A `.pte` file on ExecuTorch."""

    module = package = "executorch"

    def __init__(self, files: SubmissionFiles, threads: int) -> None:
        file = read_executorch(files.weights, files.input_shape, files.layout)
        check_claims(files, file.parameters, file.macs)
        super().__init__("executorch", files, parameters=file.parameters, macs=file.macs, channels_last=file.channels_last,
                         batch=file.batch)
        library, self.content = executorch_library(), file.content  # the program reads from these bytes
        import torch
        self._tensor = torch.from_numpy
        try:
            with quiet_library():
                library._unsafe_reset_threadpool(threads)
                self.program = library._load_program_from_buffer(
                    self.content, enable_etdump=False, debug_buffer_size=0,
                    program_verification=library.Verification.InternalConsistency)
                self.method = self.program.load_method("forward")
        except (RuntimeError, ValueError) as error:
            raise VerificationError(f"{files.weights}: ExecuTorch cannot load it: {first_line(error)}") from error

    def run(self, inputs: np.ndarray) -> np.ndarray:
        logits: np.ndarray = self.method([self._tensor(np.ascontiguousarray(inputs))])[0].numpy()
        return logits


def executorch_library() -> Any:
    """Return ExecuTorch's runtime alone, which loads in a tenth of a second; the package around it takes seven.

    Raises:
        VerificationError: the installed version has another runtime.
    """
    import torch  # noqa: F401  # the library needs torch's own
    try:
        with quiet_library():
            return importlib.import_module("executorch.extension.pybindings._C")
    except ImportError as error:
        raise VerificationError(f"backend executorch: the installed version cannot be used: {first_line(error)}; "
                                "pip install -U executorch") from error
