"""Several processes that train one model.

Each process computes its share of every batch; DistributedDataParallel averages the gradients, so the weights stay equal.
The first process alone measures, writes and prints.
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


@dataclass(frozen=True, kw_only=True)
class Team:
    """The processes of a training; one by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    cuda: bool = False

    @property
    def device(self) -> torch.device:
        """The device of this process. Messages lie there too, because NCCL carries no others."""
        return torch.device("cuda", self.local_rank) if self.cuda else torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this process is the one that measures and writes."""
        return self.rank == 0

    def mine(self, ids: Tensor) -> Tensor:
        """Return this process's share of a batch of indices (B,); B is a multiple of the team's size."""
        return ids[self.rank::self.size]

    def wrapped(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return the model with gradients that are averaged over the team; on CUDA, batch statistics too."""
        if self.size == 1:
            return model
        if device.type == "cuda":
            return nn.parallel.DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model),
                                                       device_ids=[device.index])
        return nn.parallel.DistributedDataParallel(model)

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Let the other processes enter when the first has left."""
        if not self.first:
            self.of_first([])
        yield
        if self.first:
            self.of_first([])

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over the team."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def of_first(self, values: list[float]) -> list[float]:
        """Return the first process's numbers in every process.

        Raises:
            UserError: the first process has ended.
        """
        if self.size == 1:
            return values
        shared = torch.tensor([0.0, *values], dtype=torch.float64, device=self.device)
        try:
            dist.broadcast(shared, 0)
        except RuntimeError as error:  # it has ended, with a message of its own
            raise UserError(f"process {self.rank}: the first process has stopped; its message says why") from error
        return [float(value) for value in shared[1:]]


@contextmanager
def joined(cuda: bool) -> Iterator[Team]:
    """Join the team that `torchrun` started this process in, or a team of one.

    Raises:
        UserError: this machine has more processes than CUDA devices.
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
        yield Team(rank=rank, size=size, local_rank=local_rank, cuda=cuda)
    finally:
        dist.destroy_process_group()
