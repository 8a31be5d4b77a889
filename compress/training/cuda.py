"""What a training does on CUDA alone: cuDNN's fastest kernels, TF32, and whole steps captured in CUDA graphs.

A step of a small network is a few hundred kernels of some microseconds each, and Python takes longer to launch them than
the device takes to run them. A captured step is launched as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.training.mixup import Batch
from compress.training.updates import Updater
from metadata.errors import UserError, first_line

Step = Callable[[Batch, float], tuple[Tensor, Tensor]]  # batch, learning rate -> mean loss, right predictions
EAGER_STEPS = 3  # of a batch shape before its step is captured; libraries and optimizers allocate in the first ones


@contextmanager
def fast_kernels(device: torch.device) -> Iterator[None]:
    """Let cuDNN try its kernels for each shape, and products of float32 use TF32, inside the context; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.set_float32_matmul_precision(before[1])


def step_of(updater: Updater, warn: Callable[[str], None]) -> Step:
    """Return the updater's step, captured in CUDA graphs if the settings ask for that and it is possible.

    Args:
        updater: what makes the steps.
        warn: takes the reason where the steps were to be captured and cannot be.
    """
    if not updater.settings.cuda_graph:
        return updater.step
    if reason := why_not_captured(updater):
        warn(f"cuda_graph is left out: {reason}")
        return updater.step
    return GraphedSteps(updater)


def why_not_captured(updater: Updater) -> str:
    """Return why the steps of a training cannot be captured in CUDA graphs, or an empty text."""
    if updater.device.type != "cuda":
        return f"the device is {updater.device.type}"
    if updater.team.size > 1:
        return "several processes train together"
    if updater.scaler.is_enabled():
        return "the loss scaler of float16 decides about each step on the host"
    if updater.settings.mixup or updater.settings.cutmix:
        return "mixtures of images draw their proportion on the host"
    if updater.network is not updater.model:
        return "the network is compiled"
    return ""


@dataclass(frozen=True, kw_only=True)
class Captured:
    """The step of one batch shape as a CUDA graph, with the tensors that the graph reads and writes."""

    graph: Any  # torch.cuda.CUDAGraph
    batch: Batch
    lr: Tensor
    results: tuple[Tensor, Tensor]


@dataclass
class GraphedSteps:
    """Steps of an updater, replayed from one CUDA graph for each batch shape.

    The first steps of a shape are plain steps on a side stream, as capturing requires. Dropout draws other numbers in each
    replay, because a graph reads the seed of the default generator when it is launched.
    Source: PyTorch's notes on CUDA, "Whole-network capture".
    """

    updater: Updater
    _seen: dict[torch.Size, int] = field(default_factory=dict)
    _captured: dict[torch.Size, Captured] = field(default_factory=dict)

    def __call__(self, batch: Batch, lr: float) -> tuple[Tensor, Tensor]:
        """Move the weights by a batch; return its mean loss and the number of right predictions, before the step.

        Raises:
            UserError: the step does something that a graph cannot hold, such as reading a number back.
        """
        shape = batch.images.shape
        self._seen[shape] = self._seen.get(shape, 0) + 1
        if self._seen[shape] <= EAGER_STEPS:
            return self._plain(batch, lr)
        if shape not in self._captured:
            try:
                self._captured[shape] = self._capture(batch, lr)
            except RuntimeError as error:
                raise UserError(f"cuda_graph: a step of this training cannot be captured ({first_line(error)}); continue "
                                "with cuda_graph false") from error
        step = self._captured[shape]
        step.batch.images.copy_(batch.images)
        step.batch.labels.copy_(batch.labels)
        step.batch.ids.copy_(batch.ids)
        assert isinstance(step.batch.view, Tensor)
        step.batch.view.fill_(batch.view)
        step.lr.fill_(lr)
        step.graph.replay()
        return step.results

    def _plain(self, batch: Batch, lr: float) -> tuple[Tensor, Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            results = self.updater.step(batch, lr)
        torch.cuda.current_stream().wait_stream(side)
        return results

    def _capture(self, batch: Batch, lr: float) -> Captured:
        optimizer, device = self.updater.optimizer, batch.images.device
        # Of one element, not of none: torch reads an index without dimensions back to the host.
        view = torch.zeros(1, dtype=torch.int64, device=device)
        still = Batch(images=batch.images.clone(), labels=batch.labels.clone(), ids=batch.ids.clone(), view=view)
        rate, graph = torch.full((), lr, device=device), torch.cuda.CUDAGraph()
        optimizer.zero_grad(set_to_none=True)  # the graph allocates gradients of its own
        checked = [group for group in optimizer.param_groups if "capturable" in group]  # Adam's want to be told
        try:
            for group in checked:
                group["capturable"] = True
            with torch.cuda.graph(graph):
                results = self.updater.step(still, rate)
        finally:  # plain steps of other shapes may follow, and checkpoints
            for group in checked:
                group["capturable"] = False
            for group in optimizer.param_groups:
                group["lr"] = lr
        return Captured(graph=graph, batch=still, lr=rate, results=results)
