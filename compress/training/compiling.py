"""torch.compile, where it makes a training faster: tried on the network itself if the training is long enough to tell.

Compiling fuses the operations between convolutions and saves passes over memory. It costs half a minute or more on two
cores and gains nothing where convolutions are all the work, so the gain is measured and not guessed.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.training.memory_format import unsafe_channels_last
from compress.training.mixup import Batch, parts
from compress.training.state import TrainingState
from compress.training.updates import Updater
from metadata.errors import first_line

ROUNDS, STEPS = 3, 3  # of the interleaved comparison
Work = Callable[[nn.Module], None]


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
    """Return the compiled form: it shares the parameters, and has code for each batch and image size that it meets.

    On a CPU the compiler lays convolutions out channels last whatever the images' layout, so a network that is unsafe that
    way is compiled without it.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found" on a CPU
    parameter = next(network.parameters(), None)
    unsafe = parameter is not None and bool(unsafe_channels_last(network, parameter.device))
    options: dict[str, Any] | None = {"layout_optimization": False} if unsafe else None
    return torch.compile(network, dynamic=False, options=options)  # type: ignore[return-value]


def seconds_per_step(network: nn.Module, work: Work) -> float:
    """Return the mean time of a step."""
    started = time.perf_counter()
    for _ in range(STEPS):
        work(network)
    return (time.perf_counter() - started) / STEPS


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a compiled network is tried.

    Args:
        long_seconds: a training that takes less time is as good as over before compiling has paid.
        long_steps: a training with fewer steps is not even timed.
        compile: makes the compiled form.
        seconds: times a step.
    """

    long_seconds: float = 1200.0
    long_steps: int = 200
    compile: Callable[[nn.Module], nn.Module] = compiled
    seconds: Callable[[nn.Module, Work], float] = seconds_per_step


def faster(network: nn.Module, work: Work, steps: int, say: Callable[[str], None],
           trial: Trial = Trial()) -> nn.Module:
    """Return the compiled network where a step of it is faster, and else the network itself.

    Args:
        network: the network to train; its weights and statistics stay unchanged.
        work: a step's forward and backward pass.
        steps: the number of steps that the training has left.
        say: gets a line on the outcome of a trial.
        trial: how to try.
    """
    if steps < trial.long_steps:
        return network
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    try:
        with torch.random.fork_rng(devices=[]):
            work(network)  # the first step is slower
            if trial.seconds(network, work) * steps < trial.long_seconds:
                return network
            return _try_compiled(network, work, say, trial)
    finally:
        network.load_state_dict(state)
        network.zero_grad(set_to_none=True)


def _try_compiled(network: nn.Module, work: Work, say: Callable[[str], None], trial: Trial) -> nn.Module:
    """Compile a network and return the faster form, by interleaved timing."""
    candidate, started = trial.compile(network), time.monotonic()
    try:
        work(candidate)
    except (RuntimeError, OSError) as error:  # no C++ compiler, no Python headers, an unsupported operator
        say(f"not compiled: {first_line(error)}")
        return network
    spent = time.monotonic() - started
    plain, fused = zip(*((trial.seconds(network, work), trial.seconds(candidate, work)) for _ in range(ROUNDS)),
                       strict=True)
    ratio = statistics.median(plain) / statistics.median(fused)
    verdict = "compiled" if ratio > 1 else "left as it is"
    say(f"a compiled step is {ratio:.2f} times as fast (tried for {spent:.0f} s): {verdict}")
    return candidate if ratio > 1 else network
