"""The times of many networks that are served one beside another, and how far the machine lets one tell them apart."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from architectures.architecture import Architecture
from architectures.build import build
from compress.evaluation.runtimes import answering, open_file
from compress.packaging.export import export
from compress.quantization.dynamic import quantize_graph
from compress.quantization.static import Calibration, StaticSettings, quantize_static
from metadata.errors import UserError
from metadata.machine import torch_threads
from metadata.schemas import Preprocessing

Backend = Literal["torch", "onnxruntime", "openvino"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
Precision = Literal["float32", "int8"]
RUNS = 6  # of one network in a row
FEWEST_ROUNDS, MOST_ROUNDS = 4, 40
STEADY = 0.004  # median difference between two measurements at which no more rounds are taken
CALM = 0.25  # the quantile of runs and rounds that counts: other work on the machine only ever makes a run slower
SEED = 0

Times = NDArray[np.float64]
Answer = Callable[[Tensor], Tensor]  # (1, C, H, W) preprocessed -> (1, classes) logits


def check_backend(backend: str) -> None:
    """Check that networks can be timed on a runtime here.

    Raises:
        UserError: the runtime is unknown or not installed.
    """
    if backend not in BACKENDS:
        raise UserError(f"search.backend: expected {', '.join(BACKENDS)}, got {backend!r}")
    if not importlib.util.find_spec(backend):
        raise UserError(f"search.backend {backend}: the package is not installed; pip install {backend}, or choose another")


def as_served(architecture: Architecture, backend: Backend, precision: Precision, threads: int, folder: Path) -> Answer:
    """Return a network with random weights as its package is served; the time does not depend on the weights.

    Args:
        architecture: the float network.
        backend: torch runs the graph, in int8 as the stage `quantize_dynamic` makes it; the others run `random_onnx`.
        precision: of the weights.
        threads: of one inference.
        folder: where the file lies while a runtime opens it.
    """
    if backend == "torch":
        with torch.random.fork_rng(devices=[]), torch_threads(threads):
            torch.manual_seed(SEED)
            model = build(architecture).eval()
            return quantize_graph(model, (), torch.randn(1, *architecture.input_shape))[0] if precision == "int8" else model
    path = folder / "network.onnx"
    path.write_bytes(random_onnx(architecture, precision).SerializeToString())
    return answering(open_file(path, architecture.input_shape, Preprocessing(), backend, threads))


def random_onnx(architecture: Architecture, precision: Precision) -> onnx.ModelProto:
    """Return a network with random weights as ONNX, in int8 by the default settings of static int8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network, _ = export(build(architecture).eval(), architecture)
        if precision == "float32":
            return network
        image = torch.randn(1, *architecture.input_shape).numpy()
    return quantize_static(Calibration(network, image), StaticSettings()).model


def take_turns(answers: Sequence[Answer], input_shape: tuple[int, int, int], threads: int, seconds: float,
               rng: np.random.Generator, advance: Callable[[int, int], None] = lambda done, total: None) -> Times:
    """Return the milliseconds of each network at batch 1 in each round, (rounds, networks).

    Each round runs all networks, in an order of its own, so that a slow moment of the machine hits others every time. The
    rounds end when a second measurement would agree, or when the time is over; some are made in any case.

    Args:
        answers: the networks.
        input_shape: (C, H, W).
        threads: of one inference.
        seconds: that all rounds may take.
        rng: draws the orders.
        advance: shows how many rounds are done.
    """
    image = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(SEED))
    end, rounds = time.monotonic() + seconds, list[list[float]]()
    with torch.inference_mode(), torch_threads(threads):
        while len(rounds) < FEWEST_ROUNDS or (time.monotonic() < end and len(rounds) < MOST_ROUNDS):
            row = [0.0] * len(answers)
            for place in rng.permutation(len(answers)):
                row[place] = _milliseconds(answers[place], image)
            rounds.append(row)
            advance(len(rounds), MOST_ROUNDS)
            if len(rounds) >= 2 * FEWEST_ROUNDS and float(np.median(repeat_errors(np.array(rounds)))) < STEADY:
                break
    return np.array(rounds)


def _milliseconds(answer: Answer, image: Tensor) -> float:
    """Return the time of a calm call, of some after one that warms the caches."""
    answer(image)
    taken = []
    for _ in range(RUNS):
        start = time.perf_counter_ns()
        answer(image)
        taken.append((time.perf_counter_ns() - start) / 1e6)
    return float(np.quantile(taken, CALM))


def typical(times: Times) -> Times:
    """Return each network's time in calm rounds, (networks,): what slowed all networks of a round alike is left out.

    Args:
        times: milliseconds, (rounds, networks).

    Source: Tukey 1977, "Exploratory Data Analysis", chapter 11: median polish, here of the logarithms, and with a lower
    quantile for the networks.
    """
    logs = np.log(times)
    networks = np.quantile(logs, CALM, axis=0)
    for _ in range(3):
        slowness = np.median(logs - networks, axis=1)
        slowness -= np.quantile(slowness, CALM)
        networks = np.quantile(logs - slowness[:, None], CALM, axis=0)
    return np.exp(networks)  # type: ignore[no-any-return]


def repeat_errors(times: Times) -> Times:
    """Return by which share two measurements of each network would differ, relative to the other networks, (networks,).

    The even and the odd rounds are two measurements of half the length, which differ by the root of two more.
    """
    ratios = typical(times[::2]) / typical(times[1::2])
    return np.abs(ratios / np.median(ratios) - 1) / np.sqrt(2)  # type: ignore[no-any-return]
