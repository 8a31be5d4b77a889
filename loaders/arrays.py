"""Image sets as uint8 tensors: batches by index, on any device; the stream from disk for sets larger than memory."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from metadata.schemas import DatasetCard
from model_loader import Preprocessing, UserError, decode_image, describe_validation_error


@dataclass(frozen=True)
class Request:
    """What a caller asks of `loaders.load`.

    Args:
        name: the data set.
        root: where its files are, for the sets that have files.
        download: fetch a missing set (torchvision's); never done unasked.
        validation_fraction: share of the training split that is held out, class by class.
        seed: decides which images are held out.
        num_classes: refuse a folder with another number of classes.
        preprocessing: replaces keys of the set's own preprocessing.
        skip_unreadable: leave damaged images out and count them, instead of stopping at the first.
        memory_limit_gb: decoded sets above this stream from disk.
        workers: threads that decode.
        on_progress: called with (done, total) while images are decoded.
    """

    name: str
    root: Path | None = None
    download: bool = False
    validation_fraction: float = 0.1
    seed: int = 0
    num_classes: int | None = None
    preprocessing: dict[str, object] = field(default_factory=dict)
    skip_unreadable: bool = False
    memory_limit_gb: float = 4.0
    workers: int = 2
    on_progress: Callable[[int, int], None] | None = None


class Images(Protocol):
    """A sequence of images of one size, fetched by index."""

    def __len__(self) -> int: ...

    def batch(self, ids: Tensor) -> Tensor:
        """(B,) int64 indices -> (B, C, H, W) uint8."""
        ...


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory: (N, C, H, W) uint8, on the device where the tensor is."""

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, ids: Tensor) -> Tensor:
        return self.pixels[ids.to(self.pixels.device)]


@dataclass(frozen=True)
class FileImages:
    """Images on disk, decoded by a pool of threads when they are asked for."""

    paths: list[Path]
    preprocessing: Preprocessing
    workers: int = 2

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, ids: Tensor) -> Tensor:
        with ThreadPoolExecutor(self.workers) as pool:
            arrays = list(pool.map(lambda index: decode_image(self.paths[index], self.preprocessing), ids.tolist()))
        shape = arrays[0].shape
        for index, array in zip(ids.tolist(), arrays, strict=True):
            if array.shape != shape:
                raise UserError(f"{self.paths[index]}: the image is {array.shape}, others are {shape}; set data.resize "
                                "and data.crop")
        return torch.from_numpy(np.stack(arrays))


@dataclass(frozen=True)
class Split:
    """Images and their labels; a sample's id is its index, and keys everything that is remembered of it."""

    images: Images
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """Arrays and labels on the device; images on disk stay there."""
        images = ArrayImages(self.images.pixels.to(device)) if isinstance(self.images, ArrayImages) else self.images
        return Split(images, self.labels.to(device))

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order: (B, C, H, W) uint8 and (B,) int64."""
        for ids, images in prefetched(self.images, torch.arange(len(self)).split(batch_size)):
            yield images, self.labels[ids.to(self.labels.device)]


def prefetched(images: Images, batches_of_ids: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (ids, images); images on disk are decoded one batch ahead of their use."""
    if isinstance(images, ArrayImages):
        for ids in batches_of_ids:
            yield ids, images.batch(ids)
        return
    with ThreadPoolExecutor(1) as ahead:
        waiting = None
        for ids in batches_of_ids:
            upcoming = (ids, ahead.submit(images.batch, ids))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = upcoming
        if waiting is not None:
            yield waiting[0], waiting[1].result()


@dataclass
class Splits:
    """A data set. The test split is behind a function so that only who means to opens it."""

    train: Split
    validation: Split
    open_test: Callable[[], Split]
    card: DatasetCard
    warnings: list[str] = field(default_factory=list)
    test_folder: Path | None = None  # the test split as an image folder, where it lies on disk as one, all readable


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Splits indices into (train, validation), the same share of every class, at least one image each.

    Raises:
        UserError: a class has fewer than two images.
    """
    generator = torch.Generator().manual_seed(seed)
    kept, held = [], []
    for label in range(int(labels.max()) + 1):
        indices = (labels == label).nonzero().view(-1)
        if len(indices) < 2:
            raise UserError(f"class {label} has {len(indices)} training images; holding out a validation split needs "
                            "two or more")
        order = indices[torch.randperm(len(indices), generator=generator)]
        count = min(max(1, round(fraction * len(indices))), len(indices) - 1)
        held.append(order[:count])
        kept.append(order[count:])
    return torch.cat(kept).sort().values, torch.cat(held).sort().values


def array_splits(card: DatasetCard, train_pixels: Tensor, train_labels: Tensor,
                 open_test: Callable[[], Split], request: Request) -> Splits:
    """Splits of a set that is wholly in memory: (N, C, H, W) uint8 and (N,) int64."""
    train, validation = hold_out(train_labels, request.validation_fraction, request.seed)
    card = card.model_copy(update={
        "counts": {"train": len(train), "validation": len(validation)},
        "fingerprint": fingerprint(train_pixels, train_labels)})
    return Splits(Split(ArrayImages(train_pixels[train]), train_labels[train]),
                  Split(ArrayImages(train_pixels[validation]), train_labels[validation]), open_test, card)


def fingerprint(*content: Tensor | bytes) -> str:
    """A short hash that changes when any of the arrays or bytes do."""
    digest = hashlib.sha256()
    for part in content:
        digest.update(part if isinstance(part, bytes) else part.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def preprocessing_for(request: Request, defaults: dict[str, Any], size: int | None = None) -> Preprocessing:
    """A set's preprocessing with what the request changes.

    Args:
        request: its `preprocessing` replaces keys of the defaults.
        defaults: the set's own.
        size: of images that come as arrays, which are neither resized nor cropped.

    Raises:
        UserError: a value out of range, as many means as there are not channels, or another size for arrays.
    """
    try:
        settings = Preprocessing.model_validate({**defaults, **request.preprocessing})
    except ValidationError as error:
        raise UserError(f"data: {describe_validation_error(error)}") from error
    if size is not None and (settings.resize, settings.crop) != (size, size):
        raise UserError(f"data.resize, data.crop: the images of {request.name} are {size}x{size} arrays, which are taken "
                        "as they are; use an image folder to resize")
    return settings


def write_image_folder(split: Split, class_names: list[str], folder: Path) -> None:
    """Writes a split as lossless PNG files, `folder/<class>/<index>.png`; the folder appears when it is complete.

    Raises:
        UserError: the folder is there already.
    """
    from PIL import Image

    if folder.exists():
        raise UserError(f"{folder}: already there; nothing was written")
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)  # of a write that SIGKILL cut short
    try:
        for name in class_names:
            (partial / name).mkdir(parents=True)
        index = 0
        for images, labels in split.batches(256):
            for pixels, label in zip(images.cpu().numpy(), labels.tolist(), strict=True):
                Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(
                    partial / class_names[label] / f"{index:06d}.png")
                index += 1
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
