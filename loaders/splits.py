"""A data set: its splits, how validation is held out, and how a split is written as an image folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from loaders.arrays import ArrayImages, Images, ResizedImages, in_memory, prefetched
from loaders.content import array_content, content_hash
from loaders.images import MAX_SIDE, oversized, sides_text
from loaders.packed import Packed, Picture
from loaders.request import Request
from metadata.errors import UserError, describe_validation_error
from metadata.locks import appearing
from metadata.records import DatasetCard
from metadata.schemas import Preprocessing, height_and_width

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in Pillow's grey (ITU-R 601-2)
LabelledPixels = tuple[Tensor, Tensor]  # (N, C, H, W) uint8 pixels and (N,) int64 labels


@dataclass(frozen=True)
class Split:
    """Images and their labels. The index of a sample is its id, which caches and augmentation use as the key."""

    images: Images
    labels: Tensor  # (N,) int64
    paths: list[Picture] | None = None  # the files of the images, if the data set has files

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """Return the split with arrays and labels on the device, channels last in memory; files stay on disk."""
        images = self.images
        if isinstance(images, ArrayImages):
            images = ArrayImages(images.pixels.to(device).contiguous(memory_format=torch.channels_last))
        return Split(images, self.labels.to(device), self.paths)

    def batches(self, batch_size: int, ids: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images, or those with the ids, in order: (B, C, H, W) uint8 and (B,) int64; never an empty batch."""
        ids = torch.arange(len(self)) if ids is None else ids
        for part, images in prefetched(self.images, ids.split(batch_size) if len(ids) else ()):
            yield images, self.labels[part.to(self.labels.device)]

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Return the sorted indices of `count` images drawn at random, or of all images if the split has fewer."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].sort().values


@dataclass(kw_only=True)
class Splits:
    """A data set. The test split is behind a function, so that nothing opens it by accident."""

    train: Split
    validation: Split
    open_test: Callable[[], Split]
    card: DatasetCard
    warnings: list[str] = field(default_factory=list)
    test_folder: Path | None = None  # the test split, if it is an image folder without unreadable files


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of (train, validation): the same fraction of every class is held out, at least one image.

    A fraction of 0 holds nothing out, and the only image of a class stays in train.

    Raises:
        UserError: the fraction is out of range, or no class has two images.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"data.validation_fraction {fraction}: expected a fraction of the training split, at least 0 "
                        "and below 1")
    if fraction == 0:
        return torch.arange(len(labels)), torch.arange(0)
    generator = torch.Generator().manual_seed(seed)
    kept, held = [], []
    for label in range(int(labels.max()) + 1):
        indices = (labels == label).nonzero().view(-1)
        if len(indices) < 2:
            kept.append(indices)
            continue
        order = indices[torch.randperm(len(indices), generator=generator)]
        count = min(max(1, round(fraction * len(indices))), len(indices) - 1)
        held.append(order[:count])
        kept.append(order[count:])
    if not held:
        raise UserError("no class has two training images, so none can be held out for validation; add images, or a folder "
                        "val/<class>/ beside train/ and test/")
    return torch.cat(kept).sort().values, torch.cat(held).sort().values


def few_images_warnings(labels: Tensor, class_names: Sequence[str], paths: Sequence[Picture] | None = None) -> list[str]:
    """Return which classes have no training image, or a single one, which `hold_out` leaves in train.

    Args:
        labels: (N,) of the training images before a part was held out.
        class_names: the names of the classes, by label.
        paths: the files of the images, if there are files.
    """
    counts = labels.bincount(minlength=len(class_names))
    none, single = ((counts == count).nonzero().view(-1).tolist() for count in (0, 1))
    warnings = []
    for few, said in ((none, "no training image"),
                      (single, "a single training image, which stays in train, so validation has none of them")):
        if few:
            names = ", ".join(class_names[label] for label in few[:5]) + (" and others" if len(few) > 5 else "")
            folder = f" ({paths[int((labels == few[0]).nonzero()[0])].parent})" if paths and counts[few[0]] else ""
            warnings.append(f"{len(few)} of {len(class_names)} classes have {said}: {names}{folder}")
    return warnings


def array_splits(request: Request, class_names: list[str], preprocessing: dict[str, Any], train: LabelledPixels,
                 open_test: Callable[[], LabelledPixels]) -> Splits:
    """Return the splits of a data set whose files hold arrays of square images, at the requested size and channels.

    Args:
        request: the request of the caller.
        class_names: the names by label, in the data set's own numbering.
        preprocessing: the preprocessing of the data set.
        train: (N, C, S, S) uint8 and (N,) int64.
        open_test: returns the same for the test split.
    """
    pixels, labels = train
    settings = preprocessing_for(request, preprocessing, size=pixels.shape[3])
    assert settings.window is not None, "arrays have a size"
    shape = (len(settings.mean), *settings.window)

    def split(pixels: Tensor, labels: Tensor) -> Split:
        as_they_are = tuple(pixels.shape[1:]) == shape
        if as_they_are:
            return Split(ArrayImages(pixels), labels)
        resized = ResizedImages(pixels=pixels, channels=shape[0], size=shape[1:], interpolation=settings.interpolation,
                                workers=request.workers)
        return Split(in_memory(resized, request), labels)

    kept, held = hold_out(labels, request.validation_fraction, request.seed)
    content = array_content(class_names, {"train": (pixels, labels), "test": open_test()})
    card = DatasetCard(name=request.name, class_names=class_names, input_shape=shape, preprocessing=settings,
                       counts={"train": len(kept), "validation": len(held)}, fingerprint=content_hash(content),
                       content=content)
    warnings = few_images_warnings(labels, class_names) if request.validation_fraction else []
    return Splits(train=split(pixels[kept], labels[kept]), validation=split(pixels[held], labels[held]),
                  open_test=lambda: split(*open_test()), card=card, warnings=warnings)


def fingerprint(*content: Tensor | bytes) -> str:
    """Return a short hash of arrays and bytes."""
    digest = hashlib.sha256()
    for part in content:
        digest.update(part if isinstance(part, bytes) else part.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def preprocessing_for(request: Request, defaults: dict[str, Any], size: int | None = None) -> Preprocessing:
    """Return the preprocessing of a data set with the changes of the request.

    Args:
        request: `channels` and `image_size` change the defaults, then `preprocessing` replaces single keys.
        defaults: the preprocessing of the data set.
        size: the side of square images that come as arrays; only `image_size` resizes them.

    Raises:
        UserError: a value out of range, a number of means other than that of the channels, a size over the limit, or
            another size for arrays.
    """
    if request.channels not in (None, 1, 3):
        raise UserError(f"data.channels {request.channels}: expected 1 or 3")
    own = dict(defaults)
    if request.channels == 3 and defaults["mode"] == "L":
        own |= {"mode": "RGB", "mean": defaults["mean"] * 3, "std": defaults["std"] * 3}
    if request.channels == 1 and defaults["mode"] == "RGB":
        # Exact for the mean of grey pictures, and close for the deviation, as the channels of photographs rise together.
        own |= {"mode": "L"} | {key: [round(float(np.dot(LUMA, defaults[key])), 4)] for key in ("mean", "std")}
    if request.image_size is not None:  # keeps the proportion of resize to crop
        sides = height_and_width(request.image_size)
        own |= {"resize": [round(side * defaults["resize"] / defaults["crop"]) for side in sides], "crop": list(sides)}
    try:
        settings = Preprocessing.model_validate({**own, **request.preprocessing})
    except ValidationError as error:
        raise UserError(f"data: {describe_validation_error(error)}") from error
    # The evaluator has these limits too, so that a run does not end with a model that it refuses.
    if over := oversized(settings.covered, settings.window):
        raise UserError(f"data.image_size, data.resize, data.crop: {over}; state smaller ones")
    if settings.window and max(settings.window) > MAX_SIDE:
        raise UserError(f"data.image_size, data.crop: a crop of {sides_text(settings.window)} pixels is over the limit, "
                        f"{MAX_SIDE:,} pixels; state a smaller one")
    if request.image_size is not None and settings.window != height_and_width(request.image_size):
        raise UserError(f"data.image_size {_spelled(request.image_size)}, data.crop {_spelled(settings.crop)}: both set "
                        "the size of the input of the model; pass one of them")
    if size is not None and (settings.resize, settings.crop, settings.mode) != (side := Preprocessing.model_validate(
            own).crop, side, own["mode"]):
        raise UserError(f"data.resize, data.crop: the images of {request.name} are {size}x{size} arrays; pass "
                        "data.image_size to resize them, or use an image folder")
    return settings


def _spelled(sides: int | tuple[int, int] | None) -> str:
    """Return a size as a recipe writes it."""
    return "null" if sides is None else str(list(sides) if isinstance(sides, tuple) else sides)


def torchvision_root(request: Request, name: str) -> Path:
    """Return the folder of torchvision's files, or of an image folder; raise UserError if the request has none."""
    if request.root is None:
        raise UserError(f"data.root is not set: {name} is read from torchvision's files or from an image folder "
                        "(train/<class>/, test/<class>/); pass data.root=DIR, and data.download=true to download it")
    return request.root


def write_image_folder(split: Split, class_names: list[str], folder: Path) -> None:
    """Write a split as an image folder that the preprocessing of the data set decodes to the same pixels.

    Image files are copied unchanged to `folder/<class>/<index><suffix>`, because a reader would resize and crop cropped
    images again. Arrays become lossless PNG files. The folder appears when it is complete.

    Raises:
        UserError: the folder exists already.
    """
    if folder.exists():
        raise UserError(f"{folder}: already there; nothing was written")
    with appearing(folder) as partial:
        for name in class_names:
            (partial / name).mkdir()
        if split.paths is None:
            _write_arrays(split, class_names, partial)
        else:
            for index, (path, label) in enumerate(zip(split.paths, split.labels.tolist(), strict=True)):
                copy = partial / class_names[label] / f"{index:06d}{path.suffix}"
                if isinstance(path, Packed):
                    copy.write_bytes(path.read())
                else:
                    shutil.copyfile(path, copy)


def _write_arrays(split: Split, class_names: list[str], folder: Path) -> None:
    from PIL import Image

    index = 0
    for images, labels in split.batches(256):
        for pixels, label in zip(images.cpu().numpy(), labels.tolist(), strict=True):
            Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(
                folder / class_names[label] / f"{index:06d}.png")
            index += 1
