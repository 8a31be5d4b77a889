"""Whether letting torch compile a network pays: tried on the network itself where the training is long enough to tell.

Compiling fuses what lies between convolutions and saves passes over memory; it costs half a minute and more on two cores
and gains nothing where convolutions are all the work, so it is measured and not guessed.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from metadata.errors import first_line

LONG_SECONDS, LONG_STEPS = 1200.0, 200  # a shorter training is as good as over before compiling has paid
ROUNDS, STEPS = 3, 3


def faster(network: nn.Module, work: Callable[[nn.Module], None], steps: int, say: Callable[[str], None]) -> nn.Module:
    """The network itself, or its compiled form where a step of that is faster; its weights and statistics stay as they are.

    Args:
        network: to train.
        work: a step's forward and backward pass.
        steps: how many the training has left.
        say: is told what came of a trial.
    """
    if steps < LONG_STEPS:
        return network
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    try:
        with torch.random.fork_rng(devices=[]):
            return _tried(network, work, steps, say)
    finally:
        network.load_state_dict(state)
        network.zero_grad(set_to_none=True)


def compiled(network: nn.Module) -> nn.Module:
    """The compiled form: the same parameters, code for each size of batch and image that it meets."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found" on a CPU
    return torch.compile(network, dynamic=False)  # type: ignore[return-value]


def _tried(network: nn.Module, work: Callable[[nn.Module], None], steps: int, say: Callable[[str], None]) -> nn.Module:
    work(network)  # the first is slower
    if _seconds(network, work) * steps < LONG_SECONDS:
        return network
    candidate, started = compiled(network), time.monotonic()
    try:
        work(candidate)
    except (RuntimeError, OSError) as error:  # no C++ compiler, no Python headers, an operator it cannot do
        say(f"not compiled: {first_line(error)}")
        return network
    spent = time.monotonic() - started
    plain, fused = zip(*((_seconds(network, work), _seconds(candidate, work)) for _ in range(ROUNDS)), strict=True)
    ratio = statistics.median(plain) / statistics.median(fused)
    verdict = "compiled" if ratio > 1 else "left as it is"
    say(f"a compiled step is {ratio:.2f} times as fast (tried for {spent:.0f} s): {verdict}")
    return candidate if ratio > 1 else network


def _seconds(network: nn.Module, work: Callable[[nn.Module], None]) -> float:
    started = time.perf_counter()
    for _ in range(STEPS):
        work(network)
    return (time.perf_counter() - started) / STEPS
