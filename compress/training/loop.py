"""The training loop: from uint8 batches to trained weights. A training may be interrupted at any moment.

Every random number is a function of (seed, epoch, step), so a checkpoint needs the weights, the optimizer and a position.
A training that was killed and started again ends with the same weights as an uninterrupted one, bit for bit on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.training.assessment import assess
from compress.training.averaging import Average
from compress.training.checkpoints import Checkpoints
from compress.training.compiling import compile_if_faster
from compress.training.cuda import fast_kernels, step_of
from compress.training.data import Data, epoch_order, seed_step, seeded
from compress.training.distributed import Team
from compress.training.memory_format import chosen_memory_format
from compress.training.mixup import Batch, Loss, mixed
from compress.training.optimizers import make_optimizer
from compress.training.precision import autocast_dtype
from compress.training.schedules import Plateau, rate_factor
from compress.training.settings import TrainingSettings, at_epoch
from compress.training.state import TrainingState
from compress.training.trackers import Tracker
from compress.training.updates import Updater

PROGRESS_SECONDS = 0.5  # between looks at the loss, each of which waits for the device


@dataclass(frozen=True)
class Trained:
    """What a training took: seconds over all sittings, epochs, and the epoch (counted from 1) of the weights kept."""

    seconds: float
    epochs: int
    kept_epoch: int


def train(model: nn.Module, data: Data, loss: Loss, settings: TrainingSettings, *, label: str, seed: int,
          device: torch.device, checkpoint: Path, tracker: Tracker,
          team: Team = Team()) -> Trained:  # noqa: B008 - it is immutable
    """Train a model in place and leave it in eval mode.

    Args:
        model: any module (N, C, H, W) -> (N, classes); moved to the device.
        data: splits on the device.
        loss: (model, batch) -> mean loss and logits.
        settings: how to train.
        label: the training's name in metrics and progress.
        seed: decides order, augmentation, mixtures of images and dropout.
        device: where to train.
        checkpoint: file to continue from and to write; the file stays when the training is over.
        tracker: takes progress and metrics.
        team: the processes that train together; their files are on one disk, and only the first one's tracker prints.

    Raises:
        DivergedError: the loss is not finite.
        UserError: batches would be smaller than two images, or the checkpoint is of another training or other data.
    """
    samples = len(data.train)
    settings.check_batches(label, samples, team.size)
    last = settings.total_steps(samples)
    memory_format = chosen_memory_format(model, settings.channels_last, device,
                                         lambda text: tracker.warn(f"{label}: {text}"))
    model.to(device)
    model.to(memory_format=memory_format)  # both ways: an earlier training may have left the weights channels last
    example = torch.zeros(1, *data.input_shape, device=device)
    updater = _updater(model, loss, settings, device, team, example)
    state = _first_state(updater)
    files = Checkpoints(path=checkpoint, label=label, seconds=settings.checkpoint_seconds, writes=team.first,
                        data=data.fingerprint)
    if files.restore(state):
        over = state.step >= last or state.stopped
        tracker.say(f"  {label}: {'done before' if over else f'continuing at step {state.step} of {last}'}")
    tracker.start(label, state.epoch)
    model.train()

    def batches_of(ids: Sequence[Tensor], view: int) -> Iterator[Batch]:
        return data.batches(ids, view=view, size=at_epoch(settings.size_schedule, state.epoch, 0), device=device,
                            memory_format=memory_format)

    if state.step < last:
        some = torch.arange(settings.steps(state.epoch, samples)[0])
        compile_if_faster(updater, state, lambda: next(batches_of([some], 0)), last - state.step,
                          lambda text: tracker.say(f"  {label}: {text}"))
    step = step_of(updater, lambda text: tracker.warn(f"{label}: {text}"))
    looked = time.monotonic()
    with tracker.progress(label, "steps") as show, seeded(seed, "train"), fast_kernels(device):
        while state.step < last and not state.stopped:
            batch_size, steps = settings.steps(state.epoch, samples)
            view = state.epoch % settings.views if settings.views else state.epoch
            order = epoch_order(seed, state.epoch, samples)
            batches = order[state.done * batch_size:steps * batch_size].split(batch_size)[:last - state.step]
            started, images = time.monotonic(), 0
            for batch in batches_of([team.mine(ids) for ids in batches], view):
                # Progress at the middle of the step: neither a warmup's first step nor a decay's last is at rate 0.
                progress = (state.epoch + (state.done + 0.5) / steps) / settings.epochs
                state.lr = settings.lr * rate_factor(settings, progress, state.epoch) * state.plateau.value
                seed_step(seed, state.step, team.rank, device)
                if settings.mixup or settings.cutmix:
                    batch = mixed(batch, settings.mixup, settings.cutmix)
                state.count(*step(batch, state.lr), len(batch.ids))
                if device.type == "cpu":  # elsewhere a look at the loss would wait for the device
                    files.check_finite(state, state.step + 1)
                state.advance()
                images += len(batch.ids) * team.size
                if (now := time.monotonic()) - looked > PROGRESS_SECONDS:
                    looked = now
                    files.check_finite(state)
                    show(state.step, last, f"{images / (now - started):,.0f} images/s")
                if files.due and state.step < last and state.done < steps:  # at an epoch's end, metrics come first
                    files.save(state)
            speed = images / (time.monotonic() - started)
            files.check_finite(state)
            monitored, row = _measured(updater, state, data)
            tracker.epoch(label, **row, lr=state.lr, images_per_second=round(speed, 1), seconds=round(state.seconds, 2))
            if state.done == steps:  # max_steps did not cut the epoch short
                if state.end_epoch(monitored, settings) and settings.keeps_best:
                    files.save_best(state)
                if not math.isfinite(monitored):
                    tracker.warn(f"{label}: the monitored loss of epoch {state.epoch} is {monitored}")
                if state.stopped:
                    tracker.say(f"  {label}: stopped after epoch {state.epoch}, no lower loss for "
                                f"{settings.early_patience} epochs")
            if files.due or state.step == last or state.stopped:
                files.save(state)

    if state.average:
        model.load_state_dict(state.average.state_dict())
    kept_epoch = state.epoch
    if settings.keeps_best and state.best_epoch:
        files.load_best(state, model)
        kept_epoch = state.best_epoch
    model.eval()
    return Trained(state.seconds, state.epoch, kept_epoch)


def _updater(model: nn.Module, loss: Loss, settings: TrainingSettings, device: torch.device, team: Team,
             example: Tensor) -> Updater:
    """Return what moves the model's weights, shared by the processes of a team."""
    dtype = autocast_dtype(settings.precision, device)
    scaled = dtype == torch.float16
    return Updater(model=model, network=team.wrapped(model, device), loss=loss, settings=settings,
                   optimizer=make_optimizer(settings, model, example, scaled=scaled),
                   scaler=torch.amp.GradScaler(device.type, enabled=scaled), dtype=dtype, device=device, team=team)


def _first_state(updater: Updater) -> TrainingState:
    """Return the state before the first step."""
    settings, device = updater.settings, updater.device
    return TrainingState(
        model=updater.model, optimizer=updater.optimizer, scaler=updater.scaler,
        average=Average(updater.model, settings.ema) if settings.ema else None,
        plateau=Plateau(patience=settings.patience, factor=settings.factor), lr=settings.lr, compiled=settings.compile,
        loss_sum=torch.zeros((), device=device), correct=torch.zeros((), device=device))


def _measured(updater: Updater, state: TrainingState, data: Data) -> tuple[float, dict[str, Any]]:
    """Return the monitored loss of the epoch that has just ended, and its row of metrics."""
    settings, team = updater.settings, updater.team
    loss, correct, seen = team.total(torch.stack([state.loss_sum / state.seen, state.correct, torch.tensor(
        float(state.seen), device=updater.device)]))
    monitored = float(loss) / team.size
    row: dict[str, Any] = dict(epoch=state.epoch + 1, train_loss=monitored, train_accuracy=float(correct / seen))
    if len(data.validation) and team.first and settings.measures(state.epoch + 1):
        found = assess(state.measured, data.validation, data.preprocessing, updater.dtype)
        row |= dict(validation_loss=found.loss, validation_accuracy=found.accuracy)
        if settings.monitor == "validation":
            monitored = found.loss
    monitored, = team.of_first([monitored])
    return monitored, row
