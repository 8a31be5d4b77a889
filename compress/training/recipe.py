"""How to train, as the training loop takes it: numbers and names, resolved from whatever configuration there is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from compress.training import optimizers
from compress.training.schedules import Schedule
from metadata.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """How to train: numbers and names, resolved.

    Args:
        epochs: passes over the training split.
        batch_size: images a step, of all processes together; a last partial batch is left out, unless `partial`.
        optimizer: see `optimizers`.
        schedule: see `schedules`.
        clip: largest norm of the gradient, 0 for no limit.
        views: how many different augmentations a sample goes through before they repeat; 0: a new one each epoch.
        autocast: compute in float16 (with a loss scaler) or bfloat16; weights stay float32.
        max_steps: stop after so many steps of the schedule, for trials.
        checkpoint_seconds: time between checkpoints.
        batch_sizes: epoch (counted from nought) -> images a step from then on.
        sizes: epoch (counted from nought) -> side in pixels to which images are shrunk from then on.
        accumulate: parts in which a step's batch is worked, where it does not fit into memory whole.
        mixup: alpha of the Beta distribution; 0 mixes nothing.
        ema: decay of the weight average that is measured and kept; 0 keeps the weights themselves.
        patience, factor: of the schedule "plateau".
        early_patience: epochs without a lower loss after which to stop; 0 never stops.
        keep_best: end with the weights of the epoch with the lowest loss.
        watch_training: plateau, stopping and the best go by the training loss, not the validation loss.
        measure_every: epochs between looks at the validation split, which must not be watched then; the last epoch is
            always measured.
        partial: an epoch ends with the batch of what is left over (if it is two images a part or more).
        compile: let torch compile the network; None tries it where the training is long, and keeps what is faster.
        channels_last: keep images and kernels so in memory; None decides by the network (see `suits_channels_last`).
    """

    epochs: int
    batch_size: int
    optimizer: optimizers.Settings = field(default_factory=optimizers.Settings)
    schedule: Schedule = field(default_factory=Schedule)
    clip: float = 0.0
    views: int = 0
    autocast: torch.dtype | None = None
    max_steps: int | None = None
    checkpoint_seconds: float = 20.0
    batch_sizes: dict[int, int] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    accumulate: int = 1
    mixup: float = 0.0
    ema: float = 0.0
    patience: int = 5
    factor: float = 0.1
    early_patience: int = 0
    keep_best: bool = False
    watch_training: bool = False
    measure_every: int = 1
    partial: bool = False
    compile: bool | None = None
    channels_last: bool | None = None

    def __post_init__(self) -> None:
        assert self.measure_every == 1 or self.watch_training, "what is watched is measured each epoch"

    def steps(self, epoch: int, samples: int) -> tuple[int, int]:
        """(images a step, steps) of an epoch over so many samples."""
        batch_size = min(scheduled(self.batch_sizes, epoch, self.batch_size), samples)
        left_over = self.partial and samples % batch_size >= 2 * self.accumulate
        return batch_size, samples // batch_size + left_over

    def measures(self, epoch: int) -> bool:
        """Whether the validation split is looked at after an epoch, counted from 1."""
        return epoch % self.measure_every == 0 or epoch == self.epochs

    def looks(self) -> int:
        """How often the validation split is looked at in a whole training."""
        return sum(self.measures(epoch) for epoch in range(1, self.epochs + 1))

    def check_batches(self, label: str, samples: int, processes: int) -> None:
        """Raises UserError if so many processes cannot share every batch equally, or get less than two images of one."""
        if self.partial and processes > 1:
            raise UserError(f"{label}: the last partial batch of an epoch cannot be shared by {processes} processes; train "
                            "with one")
        for size in {min(size, samples) for size in (self.batch_size, *self.batch_sizes.values())}:
            if (smallest := size // (self.accumulate * processes)) < 2:
                raise UserError(f"{label}: training needs batches of two or more images, got {smallest} ({samples} images "
                                f"in all, batch_size {size}, accumulate {self.accumulate}, {processes} processes)")
            if size % processes:
                raise UserError(f"{label}: a batch of {size} images cannot be shared equally by {processes} processes; "
                                "choose a batch_size that can")


def scheduled(changes: dict[int, int], epoch: int, default: int) -> int:
    """The value that holds in an epoch: the latest change up to it, or the default."""
    return changes[max(past)] if (past := [start for start in changes if start <= epoch]) else default
