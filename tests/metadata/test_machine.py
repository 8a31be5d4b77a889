"""The machine: the memory limit holds."""

from __future__ import annotations

import pytest
import torch

from metadata.errors import VerificationError
from metadata.machine import memory_limit


def test_memory_limit_holds_inside_and_only_there() -> None:
    import resource
    before = resource.getrlimit(resource.RLIMIT_AS)
    with memory_limit(200):
        torch.zeros(2**20)
    for greedy in (lambda: torch.zeros(2**30), lambda: bytearray(2**32)):
        with pytest.raises(VerificationError, match="more than --memory_limit_mb 200"), memory_limit(200):
            greedy()
    with pytest.raises(RuntimeError, match="shape"), memory_limit(200):
        torch.zeros(2) + torch.zeros(3).reshape(5)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert torch.zeros(2**27).numel() == 2**27
