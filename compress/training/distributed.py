"""Several processes that train one model: who takes which images, and whose word counts.

Each process works on its share of every batch; DistributedDataParallel averages the gradients, so the weights stay equal.
The first process alone measures, writes and speaks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metadata.errors import UserError


@dataclass(frozen=True)
class Team:
    """The processes of a training; alone by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    cuda: bool = False

    @property
    def device(self) -> torch.device:
        """This process's, where its messages lie as well: NCCL carries no others."""
        return torch.device("cuda", self.local_rank) if self.cuda else torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this process is the one that measures and writes."""
        return self.rank == 0

    def mine(self, ids: Tensor) -> Tensor:
        """This process's share of a batch of indices (B,), B a multiple of the team's size."""
        return ids[self.rank::self.size]

    def wrapped(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with gradients that are averaged over the team; batch statistics too, on CUDA."""
        if self.size == 1:
            return model
        if device.type == "cuda":
            return nn.parallel.DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model),
                                                       device_ids=[device.index])
        return nn.parallel.DistributedDataParallel(model)

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The others enter when the first process has left."""
        if not self.first:
            self.of_first([])
        yield
        if self.first:
            self.of_first([])

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the team."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def of_first(self, values: list[float]) -> list[float]:
        """The first process's numbers, for everyone.

        Raises:
            UserError: the first process is gone.
        """
        if self.size == 1:
            return values
        shared = torch.tensor([0.0, *values], dtype=torch.float64, device=self.device)
        try:
            dist.broadcast(shared, 0)
        except RuntimeError as error:  # it has left, and said why
            raise UserError(f"process {self.rank}: the first process has stopped; its message says why") from error
        return [float(value) for value in shared[1:]]


@contextmanager
def joined(cuda: bool) -> Iterator[Team]:
    """The team that `torchrun` started this process in, or a team of one.

    Raises:
        UserError: more processes on this machine than CUDA devices.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team(cuda=cuda)
        return
    try:
        rank, size, local_rank = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError) as error:
        raise UserError(f"WORLD_SIZE is set, as torchrun does, but {error.args[0]} is not; start with torchrun, or unset "
                        "WORLD_SIZE") from error
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"torchrun started process {local_rank} on this machine, which has "
                        f"{torch.cuda.device_count()} CUDA devices; pass a smaller --nproc_per_node")
    if cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Team(rank, size, local_rank, cuda)
    finally:
        dist.destroy_process_group()
