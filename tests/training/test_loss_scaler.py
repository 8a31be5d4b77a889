"""Loss scaling, as float16 needs it, with every optimizer: skipped steps leave no trace, the others are plain steps."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.training.data import seeded
from compress.training.distributed import Team
from compress.training.mixup import Batch
from compress.training.optimizers import OPTIMIZERS, make_optimizer
from compress.training.updates import Updater
from tests.helpers.trainings import settings

STEPS = 5
NAMES: list[dict[str, Any]] = [{"optimizer": name} for name in sorted(OPTIMIZERS)] + [
    {"optimizer": "sam", "sam_base": name} for name in sorted(OPTIMIZERS)]
WAYS: list[dict[str, Any]] = [{}, {"clip": 0.5}, {"accumulate": 2}, {"clip": 0.5, "accumulate": 2}]


def half_precision_loss(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return a large loss whose gradient passes through float16, where a factor of 65,536 makes it infinite."""
    logits = network(batch.images)
    return 64 * nn.functional.cross_entropy(logits.half().float(), batch.labels), logits


def small_model() -> nn.Sequential:
    with seeded(0, "model"):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                             nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))


def updater(chosen: dict[str, Any], *, scaled: bool) -> Updater:
    """Return what the training loop would move a small model's weights with."""
    model = small_model().train()
    values = settings(lr=0.01, weight_decay=0.01, **chosen)
    for parameter in model.parameters():  # memory that is allocated next holds NaN, as it may after any computation
        parameter.register_post_accumulate_grad_hook(
            lambda tensor: [torch.full_like(tensor, math.nan) for _ in range(8)].clear())
    return Updater(model=model, network=model, loss=half_precision_loss, settings=values,
                   optimizer=make_optimizer(values, model, batch().images[:1], scaled=scaled),
                   scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=scaled), dtype=None,
                   device=torch.device("cpu"), team=Team())


def batch() -> Batch:
    with seeded(0, "batch"):
        return Batch(images=torch.randn(8, 3, 8, 8), labels=torch.arange(8) % 4, ids=torch.arange(8), view=0)


def parameters(update: Updater) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in update.model.parameters()]


def memory(update: Updater) -> list[Tensor]:
    """Return what the optimizer remembers beside the weights; zeros are nothing."""
    found = [value for state in update.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [copy.deepcopy(value) for value in found if bool((value != 0).any())]


def skips(update: Updater) -> int:
    """Take steps until the loss scaler lets one through; return how many it skipped, each without a trace."""
    for count in range(40):
        scale, weights, remembered = update.scaler.get_scale(), parameters(update), memory(update)
        update.step(batch(), 0.01)
        if update.scaler.get_scale() >= scale:
            return count
        for old, now in zip([*weights, *remembered], [*parameters(update), *memory(update)], strict=True):
            assert torch.equal(old, now)
    raise AssertionError("every step was skipped")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way) or "plain")
@pytest.mark.parametrize("name", NAMES, ids=lambda name: "-".join(name.values()))
def test_a_training_with_skipped_steps_is_the_plain_training(name: dict[str, Any], way: dict[str, Any]) -> None:
    plain, scaled = updater(name | way, scaled=False), updater(name | way, scaled=True)
    before = parameters(plain)
    first = skips(scaled)
    for _ in range(STEPS - 1):
        skips(scaled)
    scaled.scaler.update(2.0**24)  # the next gradients overflow with momentum in place
    later = skips(scaled)
    assert first > 0 and later > 0
    for _ in range(STEPS + 1):
        plain.step(batch(), 0.01)
    for start, expected, got in zip(before, parameters(plain), parameters(scaled), strict=True):
        assert bool(got.isfinite().all())
        assert float((got - expected).abs().max()) <= 1e-3 * float((expected - start).abs().max()) + 1e-6
