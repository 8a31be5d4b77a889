"""Trainings that fit into a time: a number of steps with a whole schedule, or as many steps as a clock allows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from architectures.weights import load_tensors
from compress.training.data import Data, seed_step, seeded
from compress.training.loop import train
from compress.training.mixup import Batch, Loss
from compress.training.settings import TrainingSettings
from compress.training.trackers import Tracker


FIRST_PART, PART = 0.1, 0.4  # of the time left, trained before the rest is planned again, by the speed that was measured
LAST_PART = 0.06  # of the whole time: so short a rest is trained in one go
PROBE_STEPS, PROBE_SECONDS = 3, 5.0


def in_steps(settings: TrainingSettings, steps: int, samples: int) -> TrainingSettings:
    """Return settings whose schedule ends with a step, wherever in an epoch it is; its end is what counts, not the best.

    Args:
        settings: the batch size, the schedule and all else; `epochs` is replaced.
        steps: of the whole training.
        samples: number of training images.
    """
    an_epoch = settings.steps(0, samples)[1]
    epochs = math.ceil(steps / an_epoch)
    return settings.model_copy(update={
        "epochs": epochs, "max_steps": steps, "anneal": settings.anneal * steps / (epochs * an_epoch), "keep": "last",
        "early_patience": 0, "compile": bool(settings.compile)})


def step_seconds(model: nn.Module, data: Data, loss: Loss, settings: TrainingSettings, device: torch.device) -> float:
    """Return how long a step takes, measured on a few that change nothing, for a first plan."""
    model.to(device).train()
    taken: list[float] = []
    ids = list(torch.arange(len(data.train)).split(min(settings.batch_size, len(data.train)))[:PROBE_STEPS])
    with seeded(0, "probe"):
        started = time.monotonic()
        batches = data.batches(ids, view=0, size=0, device=device, memory_format=torch.contiguous_format)
        for number, batch in enumerate(batches):
            seed_step(0, number, 0, device)
            loss(model, batch)[0].backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.monotonic() - started)
            started = time.monotonic()
            if sum(taken) > PROBE_SECONDS:
                break
    model.zero_grad(set_to_none=True)
    return min(taken)


def train_within(model: nn.Module, data: Data, loss: Loss, settings: TrainingSettings, *, left: Callable[[], float],
                 pace: float, most_steps: int, label: str, seed: int, device: torch.device, checkpoint: Path,
                 tracker: Tracker) -> int:
    """Train a model in place until a time is over, with a schedule that ends when the time does.

    The number of steps is planned from the speed, and planned again several times on the way: a step that became slower
    makes the training shorter, not longer. At the end of the time the training ends, in the middle of its plan if need be.
    A training that was killed continues from its checkpoint.

    Args:
        model: see `compress.training.loop.train`, as for the others.
        left: seconds that are left for it.
        pace: seconds of a step, a first guess.
        most_steps: that it may take.

    Returns:
        the number of steps.
    """
    samples = len(data.train)
    before = done = int(load_tensors(checkpoint)["step"]) if checkpoint.is_file() else 0
    whole, made, share = left(), 0, FIRST_PART

    def guarded(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        nonlocal made
        if before + made and left() <= 0:
            raise _TimeOverError
        made += 1
        return loss(network, batch)

    while True:
        seconds = left()
        more = min(int(seconds / pace), most_steps - done)
        more = max(more, 0 if done else 1)  # of nothing at all there is no schedule
        part = more if seconds <= LAST_PART * whole or more < 4 else math.ceil(share * more)
        started = time.monotonic()
        # The schedule is that of all steps planned; this call makes the first ones of them.
        planned = in_steps(settings, done + more, samples).model_copy(update={"max_steps": done + part})
        try:
            train(model, data, guarded, planned, label=label, seed=seed, device=device, checkpoint=checkpoint,
                  tracker=tracker)
        except _TimeOverError:  # steps became slower since the last plan; these few are missing at the schedule's end
            model.eval()
            return before + made
        done += part
        if part == more:
            return done
        pace, share = (time.monotonic() - started) / part, PART


class _TimeOverError(Exception):
    """The time of a training is over in the middle of it."""
