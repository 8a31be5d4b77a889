"""Which products oneDNN's int8 kernels add in 16 bits: the kernels themselves are asked, on whichever CPU runs the test."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from architectures.pairs import can_saturate, saturating_pairs, weight_pairs
from tests.helpers.kernels import convolved, multiplied

CONVOLUTIONS = [(channels, kernel, groups, stride) for channels in range(1, 10) for kernel in (1, 3)
                for groups in (1, 2, 4) for stride in (1, 2) if channels * kernel > 1]


def two_at_a_time(channels: int, kernel: int, groups: int) -> Tensor:
    """Return a layer with one output channel for each two places in its weights, which hold 127, the rest being 0."""
    places = list(itertools.combinations(range(channels * kernel * kernel), 2))
    places += [places[0]] * (-len(places) % 16)  # kernels of whole blocks of output channels
    weight = torch.zeros(len(places), channels * kernel * kernel, dtype=torch.int8)
    weight[torch.arange(len(places))[:, None], torch.tensor(places)] = 127
    return weight.view(-1, channels, kernel, kernel).repeat(groups, 1, 1, 1)


def differing(got: Tensor, expected: Tensor) -> Tensor:
    """Return which output channels differ."""
    return (got != expected).transpose(0, 1).flatten(1).any(1)


@pytest.mark.parametrize(("channels", "kernel", "groups", "stride"), CONVOLUTIONS)
def test_kernels_add_no_other_pairs(channels: int, kernel: int, groups: int, stride: int) -> None:
    weight = two_at_a_time(channels, kernel, groups)
    levels = torch.full((1, channels * groups, 7, 7), 255, dtype=torch.uint8)
    exact = torch.nn.functional.conv2d(levels.double(), weight.double(), padding=kernel // 2, stride=stride, groups=groups)
    wrong = differing(convolved(levels, weight, groups, stride), exact.float())
    counted = can_saturate(weight_pairs(weight.numpy()))
    assert not bool((wrong.numpy() & ~counted.any(1)).any())  # what is not counted as a pair is exact
    assert int(counted.sum()) == saturating_pairs(weight.numpy())


@pytest.mark.parametrize("features", [2, 3, 4, 7, 8, 16, 33])
def test_linear_kernels_add_no_other_pairs(features: int) -> None:
    weight = two_at_a_time(features, 1, 1).flatten(1)
    levels = torch.full((1, features), 255, dtype=torch.uint8)
    wrong = differing(multiplied(levels, weight), (levels.double() @ weight.double().T).float())
    assert not bool((wrong.numpy() & ~can_saturate(weight_pairs(weight.numpy())).any(1)).any())
