"""The training loop: from uint8 batches to trained weights, interruptible at any moment without a trace.

Everything random is a function of (seed, epoch, step), so a checkpoint needs the weights, the optimizer and a position;
a training that was killed and started again ends with the same weights as one that was not, bit for bit on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.optimizers import make_optimizer
from compress.schedules import rate
from compress.trackers import Tracker
from loaders.arrays import Split, prefetched
from loaders.augment import Augmenter, derive_seed
from metadata.files import write_tensors
from model_loader import Preprocessing, UserError, measure_accuracy, normalize

PROGRESS_SECONDS = 0.5  # between looks at the loss, each of which waits for the device


@dataclass(frozen=True)
class Batch:
    """What a loss function gets."""

    images: Tensor  # (N, C, H, W) float32, augmented and normalised
    labels: Tensor  # (N,) int64
    ids: Tensor  # (N,) int64, indices into the training split
    view: int  # which augmentation of each sample this is


@dataclass(frozen=True)
class Recipe:
    """How to train: numbers and names, resolved.

    Args:
        epochs: passes over the training split.
        batch_size: images a step; a last partial batch is left out.
        optimizer, lr, momentum, weight_decay: see `optimizers`.
        schedule, warmup: see `schedules`; `warmup` is a share of all steps.
        clip: largest norm of the gradient, 0 for no limit.
        views: how many different augmentations a sample goes through before they repeat; 0: a new one each epoch.
        bfloat16: autocast to bfloat16 (weights stay float32).
        max_steps: stop after so many steps of the schedule, for trials.
        checkpoint_seconds: time between checkpoints.
    """

    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    schedule: str
    warmup: float
    clip: float
    views: int
    bfloat16: bool
    max_steps: int | None
    checkpoint_seconds: float


Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Data:
    """The split to train on, the split to watch, and how images become inputs."""

    train: Split
    validation: Split
    augmenter: Augmenter
    preprocessing: Preprocessing


@contextmanager
def seeded(seed: int, *purpose: object) -> Iterator[None]:
    """Seeds torch's global generators inside, and puts their state back afterwards."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, *purpose))
        yield


def precision(bfloat16: bool, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()


def accuracy_of(model: nn.Module, split: Split, preprocessing: Preprocessing, batch_size: int = 250) -> float:
    """The share of a split that the model classifies rightly, in eval mode; the mode is put back."""
    training = model.training
    result = measure_accuracy(model.eval(), split.batches(batch_size), preprocessing, len(split))
    model.train(training)
    return result.fraction


def train(model: nn.Module, data: Data, loss: Loss, recipe: Recipe, *, label: str, seed: int, device: torch.device,
          checkpoint: Path, tracker: Tracker) -> float:
    """Trains a model in place and leaves it in eval mode.

    Args:
        model: any module (N, C, H, W) -> (N, classes); moved to the device.
        data: splits on the device.
        loss: (model, batch) -> scalar.
        recipe: how.
        label: the training's name in metrics and progress.
        seed: decides order, augmentation and dropout.
        device: where.
        checkpoint: file to continue from and to write; it stays when the training is over.
        tracker: where progress and metrics go.

    Returns:
        Seconds of training, over all sittings.

    Raises:
        UserError: the loss is not finite, or the split is smaller than two images.
    """
    samples = len(data.train)
    batch_size = min(recipe.batch_size, samples)
    if batch_size < 2:
        raise UserError(f"{label}: training needs batches of two or more images, got {batch_size} ({samples} in all)")
    steps_an_epoch = samples // batch_size
    total = recipe.epochs * steps_an_epoch
    last = min(total, recipe.max_steps or total)
    channels_last = any(isinstance(module, nn.Conv2d) for module in model.modules())
    model.to(device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(recipe.optimizer, model, recipe.lr, recipe.momentum, recipe.weight_decay)

    state = _read_checkpoint(checkpoint)
    step, earlier_seconds = 0, 0.0
    loss_sum = torch.zeros((), device=device)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, earlier_seconds = state["step"], state["seconds"]
        loss_sum += state["loss_sum"]
        tracker.say(f"  {label}: continuing at step {step} of {last}" if step < last else f"  {label}: done before")
    start = looked = saved = time.monotonic()
    tracker.start(label, step // steps_an_epoch)

    def save() -> None:
        _check_finite(float(loss_sum), label, step, recipe.lr, checkpoint)
        write_tensors(checkpoint, {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
            "loss_sum": float(loss_sum), "seconds": earlier_seconds + time.monotonic() - start})

    model.train()
    with tracker.progress(label, "steps") as advance, seeded(seed, "train"):
        while step < last:
            epoch, first = divmod(step, steps_an_epoch)
            view = epoch % recipe.views if recipe.views else epoch
            order = torch.randperm(samples, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch)))
            batches = order[first * batch_size:steps_an_epoch * batch_size].split(batch_size)
            for ids, images in prefetched(data.train.images, batches[:last - step]):
                factor = rate(recipe.schedule, recipe.warmup, step / total)
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr * factor
                torch.manual_seed(derive_seed(seed, "step", step))  # dropout
                ids = ids.to(device)
                images = normalize(data.augmenter(images.to(device), ids, view), data.preprocessing)
                if channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                with precision(recipe.bfloat16, device):
                    value = loss(model, Batch(images, data.train.labels[ids], ids, view))
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                if recipe.clip:
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                optimizer.step()
                loss_sum += value.detach()
                step += 1
                now = time.monotonic()
                if now - looked > PROGRESS_SECONDS:
                    looked = now
                    _check_finite(float(loss_sum), label, step, recipe.lr * factor, checkpoint)
                    advance(step, last)
                # At an epoch's end the checkpoint waits for the epoch's row in the metrics, below.
                if now - saved > recipe.checkpoint_seconds and step < last and step % steps_an_epoch:
                    saved = now
                    save()
            done = step - epoch * steps_an_epoch
            mean_loss = float(loss_sum) / done
            _check_finite(mean_loss, label, step, recipe.lr * factor, checkpoint)
            accuracy = accuracy_of(model, data.validation, data.preprocessing)
            tracker.epoch(label, epoch=epoch + 1, train_loss=mean_loss, accuracy=accuracy, lr=recipe.lr * factor,
                          seconds=round(earlier_seconds + time.monotonic() - start, 2))
            loss_sum.zero_()
            if time.monotonic() - saved > recipe.checkpoint_seconds or step == last:
                saved = time.monotonic()
                save()
    model.eval()
    return earlier_seconds + time.monotonic() - start


def _read_checkpoint(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _check_finite(value: float, label: str, step: int, lr: float, checkpoint: Path) -> None:
    if not math.isfinite(value):
        raise UserError(f"{label}: the loss is {value} at step {step} (learning rate {lr:.3g}); lower lr, lengthen the "
                        f"warmup or set clip; the last good state is kept in {checkpoint}")
