"""An ONNX file that ONNX Runtime runs, as a torch module: the measure of an imported network, and a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from architectures.agreement import relative_difference
from architectures.image_layout import answered_in_batches
from architectures.onnx_network.graph import NotExpressibleError
from architectures.onnx_network.network import OnnxNetwork
from architectures.onnx_network.reading import OnnxClassifier, read_network
from architectures.onnx_sessions import onnxruntime_options
from metadata.errors import UserError, first_line

COUNTS = (1, 2, 3)  # images in a batch that a network is compared for
TOLERANCE = 1e-5  # of the largest logit
PROBABILITIES = ("its answers are not below zero and sum to 1 for random images: they seem to be probabilities, and are "
                 "taken as logits; export it without what makes them")


class _Session:
    """A session of ONNX Runtime. Copies of a module share it: it cannot be copied, and holds no state."""

    def __init__(self, opened: OnnxClassifier) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"{opened.path}: running it needs the package onnxruntime; pip install onnxruntime") from error
        options = onnxruntime_options(torch.get_num_threads(), opened.file.may_saturate)
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
        opened: the file; where its answers seem to be probabilities, a note is added that says so.
        why: the reason that it is not a network of torch, for a line to the user.
    """

    def __init__(self, opened: OnnxClassifier, why: str = "") -> None:
        super().__init__()
        from onnx import numpy_helper
        self.running = _Session(opened)
        for number, tensor in enumerate(opened.model.graph.initializer):
            values = torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
            self.register_buffer(f"stored_{number}", values)
        if not opened.model.graph.initializer:
            self.register_buffer("stored_0", torch.zeros(0))
        with torch.no_grad():
            logits = self(_random_images(opened, max(COUNTS)))
        self.classes: int = logits.shape[1]
        if (PROBABILITIES not in opened.notes and bool((logits >= 0).all())
                and torch.allclose(logits.sum(1), logits.new_ones(1))):
            opened.notes.append(PROBABILITIES)
        self.remarks = [*opened.notes, f"ONNX Runtime runs it, on the CPU and without training: {why}"]

    def forward(self, images: Tensor) -> Tensor:
        file = self.running.file
        inputs = np.ascontiguousarray(images.detach().cpu().float().numpy())
        logits = answered_in_batches(self.running.run, inputs, file.channels_last, file.batch)
        return torch.from_numpy(logits).float().to(images.device)


def proven_network(opened: OnnxClassifier) -> OnnxNetwork | RunOnnxFile:
    """Return a file's network, whose logits are ONNX Runtime's; else the file on ONNX Runtime, the reason as last remark.

    Raises:
        UserError: onnxruntime is not installed, or cannot run the file.
    """
    try:
        network = read_network(opened)
    except NotExpressibleError as error:
        return RunOnnxFile(opened, str(error))
    difference = difference_from_file(network, opened)
    if difference <= TOLERANCE:
        return network
    return RunOnnxFile(opened, f"{opened.path}: the network that was read has other logits than the file: they differ by "
                               f"{difference:.1e} of the largest, more than {TOLERANCE:.0e}")


def difference_from_file(network: nn.Module, opened: OnnxClassifier, images: Tensor | None = None,
                         counts: Sequence[int] = COUNTS) -> float:
    """Return how far a network's logits are from those of ONNX Runtime, relative to the largest logit.

    Args:
        network: in eval mode, on the CPU.
        opened: the file.
        images: (N, C, H, W) float32; random ones unless given.
        counts: the numbers of images in a batch that are tried, each on the first images.
    """
    if images is None:
        images = _random_images(opened, max(counts))
    runtime, worst = RunOnnxFile(opened), 0.0
    with torch.no_grad():
        for count in counts:
            expected, got = runtime(images[:count]), network(images[:count])
            if expected.shape != got.shape:
                raise UserError(f"{opened.path}: {count} images give logits {list(got.shape)}, ONNX Runtime gives "
                                f"{list(expected.shape)}")
            worst = max(worst, relative_difference(expected, got))
    return worst


def _random_images(opened: OnnxClassifier, count: int) -> Tensor:
    return torch.randn(count, *opened.input_shape, generator=torch.Generator().manual_seed(0))
