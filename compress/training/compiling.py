"""torch.compile, where it makes a training faster: tried on the network itself if the training is long enough to tell.

Compiling fuses the operations between convolutions and saves passes over memory. It costs half a minute or more on two
cores and gains nothing where convolutions are all the work, so the gain is measured and not guessed.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from compress.training.mixup import Batch, parts
from compress.training.state import TrainingState
from compress.training.updates import Updater
from metadata.errors import first_line

LONG_SECONDS, LONG_STEPS = 1200.0, 200  # a shorter training is nearly over before compiling has paid
ROUNDS, STEPS = 3, 3


def compile_if_faster(updater: Updater, state: TrainingState, make_batch: Callable[[], Batch], steps: int,
                      say: Callable[[str], None]) -> None:
    """Compile the updater's network if that was asked for or is faster; a trial's result holds for later sittings too.

    Args:
        updater: whose network is compiled.
        state: `compiled` says what was asked for or found; None leads to a trial, if one process trains on a CPU.
        make_batch: returns a batch of the size that trains.
        steps: how many the training has left.
        say: takes the result of a trial.
    """
    if state.compiled:
        updater.network = compiled(updater.network)
    elif state.compiled is None and updater.device.type == "cpu" and updater.team.size == 1:
        pieces = updater.settings.accumulate
        batch = parts(make_batch(), pieces)[0]

        def work(network: nn.Module) -> None:
            updater.forward(network, batch)[0].backward()

        fastest = faster(updater.network, work, pieces * steps, say)
        state.compiled, updater.network = fastest is not updater.network, fastest


def compiled(network: nn.Module) -> nn.Module:
    """Return the compiled form: the same parameters, and code for each size of batch and image."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found" on a CPU
    return torch.compile(network, dynamic=False)  # type: ignore[return-value]


def faster(network: nn.Module, work: Callable[[nn.Module], None], steps: int, say: Callable[[str], None]) -> nn.Module:
    """Return the network, or its compiled form if a step of that is faster; weights and statistics stay as they are.

    Args:
        network: what to train.
        work: a step's forward and backward pass.
        steps: how many the training has left.
        say: takes the result of a trial.
    """
    if steps < LONG_STEPS:
        return network
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    try:
        with torch.random.fork_rng(devices=[]):
            work(network)  # the first step is slower
            if seconds_per_step(network, work) * steps < LONG_SECONDS:
                return network
            return try_compiled(network, work, say)
    finally:
        network.load_state_dict(state)
        network.zero_grad(set_to_none=True)


def try_compiled(network: nn.Module, work: Callable[[nn.Module], None], say: Callable[[str], None]) -> nn.Module:
    """Compile a network and return the faster form, by interleaved timing."""
    candidate, started = compiled(network), time.monotonic()
    try:
        work(candidate)
    except (RuntimeError, OSError) as error:  # no C++ compiler, no Python headers, an unsupported operator
        say(f"not compiled: {first_line(error)}")
        return network
    spent = time.monotonic() - started
    plain, fused = zip(*((seconds_per_step(network, work), seconds_per_step(candidate, work)) for _ in range(ROUNDS)),
                       strict=True)
    ratio = statistics.median(plain) / statistics.median(fused)
    verdict = "compiled" if ratio > 1 else "left as it is"
    say(f"a compiled step is {ratio:.2f} times as fast (tried for {spent:.0f} s): {verdict}")
    return candidate if ratio > 1 else network


def seconds_per_step(network: nn.Module, work: Callable[[nn.Module], None]) -> float:
    """Return the mean seconds of a few steps."""
    started = time.perf_counter()
    for _ in range(STEPS):
        work(network)
    return (time.perf_counter() - started) / STEPS
