"""What a training reads: the splits on the device, and how uint8 images become a batch of inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.training.mixup import Batch, cut
from compress.training.settings import Augmentation, TrainingSettings
from loaders.arrays import ArrayImages, prefetched
from loaders.augment import Affine, Augmenter, derive_seed
from loaders.content import trained_on
from loaders.images import normalize
from loaders.splits import Split
from metadata.errors import UserError
from metadata.records import DatasetCard
from metadata.schemas import Preprocessing

CHUNK_BYTES = 2**28  # of float32 inputs that are made at once on a device: 21,845 images of 32x32


@dataclass(frozen=True, kw_only=True)
class Data:
    """The split to train on, the split to measure (which may be empty), and how images become inputs."""

    train: Split
    validation: Split
    augmenter: Augmenter
    preprocessing: Preprocessing
    fingerprint: str = ""  # of the data set's content

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the inputs, unless `size_schedule` makes them smaller."""
        return len(self.preprocessing.mean), *self.augmenter.size

    def batches(self, ids: Sequence[Tensor], *, view: int, size: int, device: torch.device,
                memory_format: torch.memory_format) -> Iterator[Batch]:
        """Yield the batches of the images with the given indices; see `batch`.

        On a CPU each batch is made by itself, which leaves it in the cache. Another device that holds the images makes many
        batches in one go and cuts them apart, because there a call costs more than its arithmetic.
        """
        images = self.train.images
        together = 1
        if device.type != "cpu" and isinstance(images, ArrayImages) and ids:
            together = max(1, CHUNK_BYTES // (4 * images.pixels[0].numel() * len(ids[0])))
        chunks = [ids[start:start + together] for start in range(0, len(ids), together)]
        joined = [torch.cat(list(chunk)) if len(chunk) > 1 else chunk[0] for chunk in chunks]
        for chunk, (some, pixels) in zip(chunks, prefetched(images, joined), strict=True):
            made = self.batch(some, pixels, view=view, size=size, device=device, memory_format=memory_format)
            yield from cut(made, [len(part) for part in chunk])

    def batch(self, ids: Tensor, pixels: Tensor, *, view: int, size: int, device: torch.device,
              memory_format: torch.memory_format) -> Batch:
        """Augment and normalize images of the training split.

        Args:
            ids: (N,) int64, indices into the training split.
            pixels: (N, C, H, W) uint8, the images with these indices.
            view: number of the augmentation.
            size: pixels to which the shorter side is shrunk; 0 leaves the images as they are.
            device: where the batch goes.
            memory_format: of the images.
        """
        if device.type == "cuda" and pixels.device.type == "cpu":  # streamed: copied while the device computes
            pixels = pixels.pin_memory()
        ids = ids.to(device)
        images = normalize(self.augmenter(pixels.to(device, non_blocking=True), ids, view), self.preprocessing)
        return Batch(images=_shrunk(images, size).contiguous(memory_format=memory_format),
                     labels=self.train.labels[ids], ids=ids, view=view)


def _shrunk(images: Tensor, size: int) -> Tensor:
    """(N, C, H, W) -> (N, C, *shrunk_size), antialiased; size 0 leaves the images as they are."""
    return images if size in (0, min(images.shape[2:])) else F.interpolate(
        images, shrunk_size((images.shape[2], images.shape[3]), size), mode="bilinear", antialias=True)


def shrunk_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the (H, W) of images whose shorter side is shrunk to `side`, in their proportions."""
    height, width = (round(part * side / min(size)) for part in size)
    return height, width


def training_data(train: Split, validation: Split, card: DatasetCard, settings: TrainingSettings, *, seed: int,
                  device: torch.device) -> Data:
    """Return two splits on the device with the augmentation that the settings and the data set's card ask for."""
    train = train.to(device)
    affine = Affine(degrees=settings.affine_degrees, scale=settings.affine_scale, shear=settings.affine_shear,
                    shift=settings.affine_shift)
    augmenter = Augmenter(names=list(augmentations(settings, card)), size=card.input_shape[1:], padding=settings.padding,
                          seed=seed, samples=len(train), affine=affine)
    return Data(train=train, validation=validation.to(device), augmenter=augmenter, preprocessing=card.preprocessing,
                fingerprint=trained_on(card))


def augmentations(settings: TrainingSettings, card: DatasetCard) -> list[Augmentation]:
    """Return the augmentations that are asked for; without any, crop, and flip unless the card forbids mirroring."""
    if settings.augment is not None:
        return settings.augment
    return ["crop", "flip"] if card.flip else ["crop"]


def check_sizes(settings: TrainingSettings, input_shape: tuple[int, int, int]) -> None:
    """Raise UserError if `size_schedule` asks for images that are larger than the model's inputs (C, H, W)."""
    for side in sorted(set(settings.size_schedule.values())):
        if side > min(input_shape[1:]):
            raise UserError(f"size_schedule: {side} pixels are more than the images have ({input_shape[1]}x"
                            f"{input_shape[2]})")


@contextmanager
def seeded(seed: int, *purpose: object) -> Iterator[None]:
    """Seed torch's global generators inside the context, and restore their states afterwards."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, *purpose))
        yield


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed dropout and mixup by the step, so that a resumed training draws the same numbers."""
    value = derive_seed(seed, "step", step, *([rank] if rank else []))
    # Not torch.manual_seed: where CUDA is built in and not in use, that function keeps every call with its traceback.
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)


def epoch_order(seed: int, epoch: int, samples: int) -> Tensor:
    """Return the indices of all samples in the order of an epoch, (N,) int64."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch)))
