"""An ONNX file that ONNX Runtime runs, as a torch module: the measure of an imported network, and a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from architectures.onnx_network.reading import OnnxClassifier
from metadata.errors import UserError, first_line

COUNTS = (1, 2, 3)  # images in a batch that a network is compared for
TOLERANCE = 1e-5  # of the largest logit


class _Session:
    """A session of ONNX Runtime. Copies of a module share it: it cannot be copied, and holds no state."""

    def __init__(self, opened: OnnxClassifier) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"{opened.path}: running it needs the package onnxruntime; pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
        try:
            self.session = onnxruntime.InferenceSession(opened.model.SerializeToString(), options, ["CPUExecutionProvider"])
        except Exception as error:  # the runtime's classes of errors have no common base
            raise UserError(f"{opened.path}: ONNX Runtime cannot load it: {first_line(error)}") from error
        self.path, self.file = opened.path, opened.file

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def run(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of as many images as the file takes, in the file's layout."""
        try:
            found: np.ndarray = self.session.run(None, {self.file.input_name: images})[0]
        except Exception as error:  # see above
            raise UserError(f"{self.path}: ONNX Runtime cannot run it: {first_line(error)}") from error
        return found.reshape(len(found), -1)


class RunOnnxFile(nn.Module):
    """An ONNX classifier on ONNX Runtime: (N, C, H, W) float32 -> (N, classes) logits, without gradients.

    The file's stored numbers are buffers, so that they are counted and saved; the runtime reads the file itself.

    Args:
        opened: the file.
        why: the reason that it is not a network of torch, for a line to the user.
    """

    def __init__(self, opened: OnnxClassifier, why: str = "") -> None:
        super().__init__()
        from onnx import numpy_helper
        self.running = _Session(opened)
        self.remarks = [*opened.notes, f"ONNX Runtime runs it, on the CPU and without training: {why}"]
        for number, tensor in enumerate(opened.model.graph.initializer):
            values = torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
            self.register_buffer(f"stored_{number}", values)
        if not opened.model.graph.initializer:
            self.register_buffer("stored_0", torch.zeros(0))
        with torch.no_grad():
            self.classes: int = self(torch.zeros(1, *opened.input_shape)).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        file = self.running.file
        inputs = images.detach().cpu().float().numpy()
        if file.channels_last:
            inputs = inputs.transpose(0, 2, 3, 1)
        inputs = np.ascontiguousarray(inputs)
        batch = file.batch or len(inputs)
        if missing := -len(inputs) % batch:
            inputs = np.concatenate([inputs, np.zeros((missing, *inputs.shape[1:]), inputs.dtype)])
        parts = [self.running.run(inputs[start:start + batch]) for start in range(0, len(inputs), batch)]
        return torch.from_numpy(np.concatenate(parts)[:len(images)]).float().to(images.device)


def largest_difference(network: nn.Module, opened: OnnxClassifier, images: Tensor | None = None,
                       counts: Sequence[int] = COUNTS) -> float:
    """Return how far a network's logits are from those of ONNX Runtime, relative to the largest logit.

    Args:
        network: in eval mode, on the CPU.
        opened: the file.
        images: (N, C, H, W) float32; random ones unless given.
        counts: the numbers of images in a batch that are tried, each on the first images.
    """
    if images is None:
        images = torch.randn(max(counts), *opened.input_shape, generator=torch.Generator().manual_seed(0))
    runtime, worst = RunOnnxFile(opened), 0.0
    with torch.no_grad():
        for count in counts:
            expected, got = runtime(images[:count]), network(images[:count])
            if expected.shape != got.shape:
                raise UserError(f"{opened.path}: {count} images give logits {list(got.shape)}, ONNX Runtime gives "
                                f"{list(expected.shape)}")
            scale = float(expected.abs().max()) or 1.0
            worst = max(worst, float((expected - got).abs().max()) / scale)
    return worst
