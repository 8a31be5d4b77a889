"""The training loop: from uint8 batches to trained weights, interruptible at any moment without a trace.

Everything random is a function of (seed, epoch, step), so a checkpoint needs the weights, the optimizer and a position;
a training that was killed and started again ends with the same weights as one that was not, bit for bit on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.weights import load_tensors
from compress.training.assessment import assess, precision
from compress.training.averaging import Average
from compress.training.compiling import compiled, faster
from compress.training.distributed import Team
from compress.training.memory_format import suits_channels_last, unsafe_channels_last
from compress.training.mixup import Batch, mixed, parts
from compress.training.optimizers import Ascent, frozen_statistics, make_optimizer
from compress.training.recipe import Recipe, scheduled
from compress.training.schedules import Plateau
from compress.training.trackers import Tracker
from loaders.arrays import Split, prefetched
from loaders.augment import Augmenter, derive_seed
from loaders.images import normalize
from metadata.errors import UserError, VerificationError, first_line
from metadata.formats import write_tensors
from metadata.schemas import Preprocessing

PROGRESS_SECONDS = 0.5  # between looks at the loss, each of which waits for the device


class DivergedError(UserError):
    """The loss or the weights are not finite any more; which step and what helps is in the text."""


Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]  # -> mean loss, (N, classes) logits


@dataclass(frozen=True)
class Data:
    """The split to train on, the split to watch (it may be empty), and how images become inputs."""

    train: Split
    validation: Split
    augmenter: Augmenter
    preprocessing: Preprocessing


@dataclass(frozen=True)
class Trained:
    """What a training took: seconds over all sittings, epochs, and the epoch (counted from 1) of the weights kept."""

    seconds: float
    epochs: int
    kept_epoch: int


@contextmanager
def seeded(seed: int, *purpose: object) -> Iterator[None]:
    """Seeds torch's global generators inside, and puts their state back afterwards."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, *purpose))
        yield


def _shrunk(images: Tensor, size: int) -> Tensor:
    """(N, C, H, W) -> (N, C, size, size), antialiased; size 0 leaves them as they are."""
    return images if size in (0, images.shape[2]) else F.interpolate(
        images, (size, size), mode="bilinear", antialias=True)


def train(model: nn.Module, data: Data, loss: Loss, recipe: Recipe, *, label: str, seed: int, device: torch.device,
          checkpoint: Path, tracker: Tracker, team: Team = Team()) -> Trained:  # noqa: B008 - it is immutable
    """Trains a model in place and leaves it in eval mode.

    Args:
        model: any module (N, C, H, W) -> (N, classes); moved to the device.
        data: splits on the device.
        loss: (model, batch) -> mean loss and logits.
        recipe: how.
        label: the training's name in metrics and progress.
        seed: decides order, augmentation, mixup and dropout.
        device: where.
        checkpoint: file to continue from and to write; it stays when the training is over.
        tracker: where progress and metrics go.
        team: the processes that train it together; their files are on one disk, and only the first one's tracker speaks.

    Raises:
        DivergedError: the loss is not finite.
        UserError: batches would be smaller than two images, or the checkpoint is of another training.
    """
    return _Training(model, data, loss, recipe, label, seed, device, checkpoint, tracker, team).run()


def best_file(checkpoint: Path, epoch: int | str) -> Path:
    """Where the weights of the best epoch are kept, beside the checkpoint that speaks of it."""
    return checkpoint.with_name(f"best-{epoch}.pth")


def _read_state(path: Path) -> Any:
    try:
        return load_tensors(path)
    except VerificationError as error:
        raise UserError(f"{error}; it is damaged, remove the training's files to start from the beginning") from error


class _Training:
    """The state of one training: where it is, and what it has come to."""

    def __init__(self, model: nn.Module, data: Data, loss: Loss, recipe: Recipe, label: str, seed: int,
                 device: torch.device, checkpoint: Path, tracker: Tracker, team: Team) -> None:
        self.data, self.loss, self.recipe, self.label, self.seed = data, loss, recipe, label, seed
        self.device, self.checkpoint, self.tracker, self.team = device, checkpoint, tracker, team
        self.samples = len(data.train)
        recipe.check_batches(label, self.samples, team.size)
        last = suits_channels_last(model, device) if recipe.channels_last is None else recipe.channels_last
        if last and (reason := unsafe_channels_last(model, device)):
            last = False
            if recipe.channels_last:
                tracker.warn(f"{label}: channels_last is left out; {reason}")
        self.format = torch.channels_last if last else torch.contiguous_format
        self.model = model.to(device)
        if self.format == torch.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.network = team.wrapped(self.model, device)
        self.compiled = recipe.compile  # None until it is known
        self.optimizer = make_optimizer(recipe.optimizer, self.model)
        self.ascent = (Ascent(self.model.parameters(), recipe.optimizer.sam_rho) if recipe.optimizer.name == "sam"
                       else None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.autocast == torch.float16)
        self.average = Average(self.model, recipe.ema) if recipe.ema else None
        self.plateau = Plateau(recipe.patience, recipe.factor)
        # Position: `done` steps of `epoch`, `step` in all; what the epoch has come to; what the best epoch was.
        self.epoch = self.done = self.step = 0
        self.loss_sum, self.correct, self.seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
        self.best_loss, self.best_epoch = math.inf, 0
        self.stopped, self.lr = False, recipe.optimizer.lr
        self.earlier_seconds, self.start = 0.0, time.monotonic()
        self.total = sum(recipe.steps(epoch, self.samples)[1] for epoch in range(recipe.epochs))
        self.last = min(self.total, recipe.max_steps or self.total)

    def run(self) -> Trained:
        self._restore()
        self.tracker.start(self.label, self.epoch)
        self.looked = self.saved = time.monotonic()
        self.model.train()
        self._compile()
        with self.tracker.progress(self.label, "steps") as self.advance, seeded(self.seed, "train"):
            while self.step < self.last and not self.stopped:
                self._train_epoch()
                self._end_epoch()
        if self.average:
            self.model.load_state_dict(self.average.state_dict())
        if self.recipe.keep_best and self.best_epoch and self.team.first:  # the one that wrote it
            self.model.load_state_dict(_read_state(best_file(self.checkpoint, self.best_epoch)))
        self.model.eval()
        return Trained(self._seconds(), self.epoch,
                       self.best_epoch if self.recipe.keep_best and self.best_epoch else self.epoch)

    def _compile(self) -> None:
        """Compiles the network if it is to be, or if that is faster; what was found holds for later sittings too."""
        if self.compiled is None and self.device.type == "cpu" and self.team.size == 1 and self.step < self.last:
            ids = torch.arange(self.recipe.steps(self.epoch, self.samples)[0])
            size, pieces = scheduled(self.recipe.sizes, self.epoch, 0), self.recipe.accumulate
            batch = parts(self._batch(ids, self.data.train.images.batch(ids), 0, size), pieces)[0]

            def work(network: nn.Module) -> None:
                with precision(self.recipe.autocast, self.device):
                    value, _ = self.loss(network, batch)
                value.backward()

            fastest = faster(self.network, work, pieces * (self.last - self.step), lambda text: self.tracker.say(
                f"  {self.label}: {text}"))
            self.compiled, self.network = fastest is not self.network, fastest
        elif self.compiled:
            self.network = compiled(self.network)

    # --------------------------------------------------------------------------------------------------- an epoch

    def _train_epoch(self) -> None:
        batch_size, steps = self.recipe.steps(self.epoch, self.samples)
        view = self.epoch % self.recipe.views if self.recipe.views else self.epoch
        size = scheduled(self.recipe.sizes, self.epoch, 0)
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(
            derive_seed(self.seed, "order", self.epoch)))
        batches = order[self.done * batch_size:steps * batch_size].split(batch_size)[:self.last - self.step]
        started, images_done = time.monotonic(), 0
        for ids, pixels in prefetched(self.data.train.images, [self.team.mine(ids) for ids in batches]):
            # At the middle of the step, so that neither the first of a warm-up nor the last of a decay is at rate nought.
            progress = (self.epoch + (self.done + 0.5) / steps) / self.recipe.epochs
            factor = self.recipe.schedule.factor(progress, self.epoch)
            self.lr = self.recipe.optimizer.lr * factor * self.plateau.value
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr
            # Dropout and mixup; by step, so that a resumed training draws the same.
            seed = derive_seed(self.seed, "step", self.step, *([self.team.rank] if self.team.rank else []))
            # Not torch.manual_seed: where CUDA is built in and not in use, it remembers every call with its traceback.
            torch.default_generator.manual_seed(seed)
            if self.device.type == "cuda":
                torch.cuda.manual_seed(seed)
            batch = self._batch(ids, pixels, view, size)
            self._step(mixed(batch, self.recipe.mixup) if self.recipe.mixup else batch)
            self.step, self.done, images_done = self.step + 1, self.done + 1, images_done + len(ids) * self.team.size
            if self.average:
                self.average.follow(self.step)
            now = time.monotonic()
            if now - self.looked > PROGRESS_SECONDS:
                self.looked = now
                self._check_finite()
                self.advance(self.step, self.last, f"{images_done / (now - started):,.0f} images/s")
            # At an epoch's end the checkpoint waits for the epoch's row in the metrics, below.
            if now - self.saved > self.recipe.checkpoint_seconds and self.step < self.last and self.done < steps:
                self._save()
        self.speed = images_done / (time.monotonic() - started)

    def _batch(self, ids: Tensor, pixels: Tensor, view: int, size: int) -> Batch:
        ids = ids.to(self.device)
        images = normalize(self.data.augmenter(pixels.to(self.device), ids, view), self.data.preprocessing)
        return Batch(_shrunk(images, size).contiguous(memory_format=self.format), self.data.train.labels[ids], ids, view)

    def _step(self, batch: Batch) -> None:
        """One step of the optimizer on a batch."""
        loss, correct = self._gradients(batch)
        self.loss_sum += loss * len(batch.labels)
        self.correct += correct
        self.seen += len(batch.labels)
        if self.device.type == "cpu":  # elsewhere a look at the loss would wait for the device
            self._check_finite(self.step + 1)
        if self.ascent:
            self.ascent.up(self.scaler.get_scale())
            with frozen_statistics(self.model):
                self._gradients(batch)
            self.ascent.down()
        if self.recipe.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Leaves the gradient of the mean loss in the parameters; returns that loss and the number of right answers."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, correct = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        pieces = parts(batch, self.recipe.accumulate)
        for index, part in enumerate(pieces):
            last = index == len(pieces) - 1
            with nullcontext() if last or self.team.size == 1 else self.network.no_sync():  # type: ignore[operator]
                with precision(self.recipe.autocast, self.device):
                    value, logits = self.loss(self.network, part)
                value = value * (len(part.labels) / len(batch.labels))
                self.scaler.scale(value).backward()
            loss += value.detach()
            correct += part.right(logits.detach())
        return loss, correct

    def _end_epoch(self) -> None:
        """Measures, notes, decides whether to go on, and saves."""
        self._check_finite()
        sums = self.team.total(torch.stack([self.loss_sum / self.seen, self.correct, torch.tensor(
            float(self.seen), device=self.device)]))
        train_loss, train_accuracy = float(sums[0]) / self.team.size, float(sums[1] / sums[2])
        row: dict[str, Any] = dict(epoch=self.epoch + 1, train_loss=train_loss, train_accuracy=train_accuracy)
        watched = train_loss
        if len(self.data.validation) and self.team.first and self.recipe.measures(self.epoch + 1):
            model = self.average.model if self.average else self.model
            found = assess(model, self.data.validation, self.data.preprocessing, self.recipe.autocast)
            row |= dict(validation_loss=found.loss, validation_accuracy=found.accuracy)
            if not self.recipe.watch_training:
                watched = found.loss
        watched, = self.team.of_first([watched])
        self.tracker.epoch(self.label, **row, lr=self.lr, images_per_second=round(self.speed, 1),
                           seconds=round(self._seconds(), 2))
        if self.done == self.recipe.steps(self.epoch, self.samples)[1]:  # not cut short by max_steps
            self.epoch, self.done, self.seen = self.epoch + 1, 0, 0
            self.loss_sum.zero_()
            self.correct.zero_()
            if self.recipe.schedule.name == "plateau":
                self.plateau.see(watched)
            if not math.isfinite(watched):
                self.tracker.warn(f"{self.label}: the watched loss of epoch {self.epoch} is {watched}")
            if watched < self.best_loss:
                self.best_loss, self.best_epoch = watched, self.epoch
                if self.recipe.keep_best and self.team.first:
                    kept = self.average.model if self.average else self.model
                    write_tensors(best_file(self.checkpoint, self.epoch), kept.state_dict())
            waited = self.epoch - self.best_epoch
            self.stopped = bool(self.recipe.early_patience) and waited >= self.recipe.early_patience
            if self.stopped:
                self.tracker.say(f"  {self.label}: stopped after epoch {self.epoch}, no lower loss for {waited} epochs")
        if time.monotonic() - self.saved > self.recipe.checkpoint_seconds or self.step == self.last or self.stopped:
            self._save()

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.start

    _POSITION = ("epoch", "done", "step", "seen", "best_loss", "best_epoch", "stopped", "compiled")

    def _save(self) -> None:
        self.saved = time.monotonic()
        if not self.team.first:
            return
        self._check_finite()
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise self._diverged("the weights are not finite any more")
        write_tensors(self.checkpoint, {
            **{key: getattr(self, key) for key in self._POSITION}, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average else None, "plateau": vars(self.plateau),
            "loss_sum": float(self.loss_sum), "correct": float(self.correct), "seconds": self._seconds()})
        for path in self.checkpoint.parent.glob(best_file(self.checkpoint, "*").name):
            if path != best_file(self.checkpoint, self.best_epoch):  # no checkpoint speaks of it any more
                path.unlink()

    def _restore(self) -> None:
        if not self.checkpoint.is_file():
            return
        state = _read_state(self.checkpoint)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.average:
                self.average.load_state_dict(state["average"])
            self.plateau = Plateau(**state["plateau"])
            for key in self._POSITION:
                setattr(self, key, state[key])
            if self.recipe.compile is not None:
                self.compiled = self.recipe.compile
            self.loss_sum += state["loss_sum"]
            self.correct += state["correct"]
            self.earlier_seconds = state["seconds"]
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"{self.checkpoint}: not a checkpoint of this training ({first_line(error)}); remove it to "
                            "start from the beginning") from error
        over = self.step >= self.last or self.stopped
        where = "done before" if over else f"continuing at step {self.step} of {self.last}"
        self.tracker.say(f"  {self.label}: {where}")

    # ----------------------------------------------------------------------------------------------------- errors

    def _check_finite(self, step: int | None = None) -> None:
        if not math.isfinite(loss := float(self.loss_sum)):
            raise self._diverged(f"the loss is {loss}", step)

    def _diverged(self, what: str, step: int | None = None) -> DivergedError:
        kept = f"the last good state is kept in {self.checkpoint}" if self.checkpoint.is_file() else "nothing was saved yet"
        return DivergedError(f"{self.label}: {what} at step {step or self.step} (learning rate {self.lr:.3g}); lower lr, "
                             f"lengthen the warmup or set clip; {kept}")
