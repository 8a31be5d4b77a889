"""Trying a compiled network: which form wins, and that the trial leaves no trace. Compiler and clock are stand-ins."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compress.training.compiling import Trial, Work, faster


class Compiled(nn.Module):
    """Stands for the compiled form, which shares the network's parameters."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)  # type: ignore[no-any-return]


class NoCompiler(Compiled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no C++ compiler\nand where it was looked for")


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2))


def work(network: nn.Module) -> None:
    network(torch.randn(5, 3, 8, 8)).square().sum().backward()


def clock(plain: float, compiled: float) -> object:
    def seconds(network: nn.Module, work: Work) -> float:
        work(network)
        return compiled if isinstance(network, Compiled) else plain
    return seconds


@pytest.mark.parametrize(("plain", "compiled", "steps", "wins", "said"), [
    (2.0, 1.0, 1000, True, ["a compiled step is 2.00 times as fast (tried for 0 s): compiled"]),
    (1.2, 1.5, 1000, False, ["a compiled step is 0.80 times as fast (tried for 0 s): left as it is"]),
    (1.0, 0.1, 1000, False, []),  # 1000 s: over before compiling has paid
    (90.0, 1.0, 199, False, [])])  # too few steps to be timed
def test_the_faster_form_wins_and_the_trial_leaves_no_trace(plain: float, compiled: float, steps: int, wins: bool,
                                                            said: list[str]) -> None:
    network = small_network().train()
    before, randomness, lines = copy.deepcopy(network.state_dict()), torch.get_rng_state(), []
    trial = Trial(compile=Compiled, seconds=clock(plain, compiled))  # type: ignore[arg-type]
    chosen = faster(network, work, steps, lines.append, trial)
    assert isinstance(chosen, Compiled) == wins and lines == said
    assert (chosen.network if isinstance(chosen, Compiled) else chosen) is network
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), randomness)


def test_a_network_that_cannot_be_compiled_is_trained_as_it_is() -> None:
    network, lines = small_network(), []
    chosen = faster(network, work, 1000, lines.append, Trial(compile=NoCompiler, seconds=clock(2.0, 1.0)))  # type: ignore[arg-type]
    assert chosen is network and lines == ["not compiled: no C++ compiler"]
