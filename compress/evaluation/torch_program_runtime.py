"""`.pt2` files of torch.export, run call by call in torch."""

from __future__ import annotations

import numpy as np

from architectures.counting import check_costs
from compress.evaluation.runtime import FileRuntime
from compress.evaluation.submission_files import SubmissionFiles, check_claims
from compress.evaluation.torch_operators import CALL_ERRORS
from compress.evaluation.torch_programs import check_batch, program_costs, read_torch_program
from metadata.errors import enough_memory


class TorchProgramRuntime(FileRuntime):
    """A `.pt2` file, read as data and run by torch's operators."""

    module = package = "torch"
    errors = CALL_ERRORS

    def __init__(self, files: SubmissionFiles, threads: int) -> None:
        import torch
        self.program = read_torch_program(files.weights)
        macs, work, _ = program_costs(files.weights, self.program, files.input_shape)
        check_costs(str(files.weights), macs, work)
        parameters = sum(values.size for values in self.program.tensors.values())
        check_claims(files, parameters, macs)
        super().__init__("torch_export", files, parameters=parameters, macs=macs, channels_last=False, batch=None)
        with enough_memory(files.weights):
            self.stored = {name: torch.from_numpy(values.copy()) for name, values in self.program.tensors.items()}
        self._mode, self._tensor = torch.inference_mode, torch.from_numpy
        self._checked: set[int] = {1}  # numbers of images whose shapes are known to fit

    def run(self, inputs: np.ndarray) -> np.ndarray:
        if len(inputs) not in self._checked:
            check_batch(self.program, inputs.shape[1:], len(inputs))
            self._checked.add(len(inputs))
        with self._mode():
            return self.program.run(self._tensor(inputs), self.stored).numpy()
