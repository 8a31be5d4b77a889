"""Image sets as uint8 tensors: batches by index, on any device; the stream from disk for sets larger than memory."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from loaders.images import decode_image
from loaders.request import Request
from metadata.errors import UserError, describe_validation_error, first_line
from metadata.locks import appearing
from metadata.machine import usable_cores
from metadata.records import DatasetCard
from metadata.schemas import Preprocessing


Arrays = tuple[Tensor, Tensor]  # (N, C, H, W) uint8 pixels and (N,) int64 labels


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
        # `index_select` copies whole images where they lie in one piece; indexing copies single bytes.
        ids = ids.to(self.pixels.device)
        if self.pixels.is_contiguous(memory_format=torch.channels_last):
            return self.pixels.permute(0, 2, 3, 1).index_select(0, ids).permute(0, 3, 1, 2)
        return self.pixels.index_select(0, ids)


@dataclass(frozen=True, kw_only=True)
class ResizedImages:
    """Square images in memory that get their size and channels when they are asked for.

    The pixels are those that `decode_image` makes of the same images' files, to the bit: the resize is PIL's.
    """

    pixels: Tensor  # (N, 1 or 3, S, S) uint8
    channels: int
    size: int
    workers: int = 2

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, ids: Tensor) -> Tensor:
        from PIL import Image

        images = self.pixels[ids.cpu()]  # (B, C, S, S)
        if self.size != images.shape[3]:
            whole = images.permute(0, 2, 3, 1).squeeze(3).contiguous().numpy()  # as PIL has them: (B, S, S[, 3])
            resized = np.empty((len(whole), self.size, self.size, *whole.shape[3:]), np.uint8)
            for image, target in zip(whole, resized, strict=True):
                target[:] = np.asarray(Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BILINEAR))
            images = torch.from_numpy(resized).view(len(whole), self.size, self.size, images.shape[1]).permute(0, 3, 1, 2)
        return images.expand(-1, self.channels, -1, -1).contiguous()  # (B, channels, size, size)


@dataclass(frozen=True)
class FileImages:
    """Images on disk, decoded when they are asked for: by threads here, by processes where `prefetched` has them."""

    paths: list[Path]
    preprocessing: Preprocessing
    workers: int = 2

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, ids: Tensor) -> Tensor:
        if not len(ids):
            side = self.preprocessing.crop or 0  # without a crop the size is the files', and there is none to ask
            return torch.empty((0, len(self.preprocessing.mean), side, side), dtype=torch.uint8)
        if self.workers == 1:
            arrays = [self._decoded(index) for index in ids.tolist()]
        else:
            with ThreadPoolExecutor(self.workers) as pool:
                arrays = list(pool.map(self._decoded, ids.tolist()))
        shape = arrays[0].shape
        for index, array in zip(ids.tolist(), arrays, strict=True):
            if array.shape != shape:
                raise UserError(f"{self.paths[index]}: the image is {array.shape}, others are {shape}; set data.resize "
                                "and data.crop")
        return torch.from_numpy(np.stack(arrays))

    def _decoded(self, index: int) -> np.ndarray:
        return decode_image(self.paths[index], self.preprocessing)


@dataclass(frozen=True)
class _Batches(Dataset[np.ndarray | str]):
    """Batches by number, for the processes of a DataLoader; an error comes as its text, without a traceback."""

    images: Images
    ids: list[Tensor]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> np.ndarray | str:
        try:
            return self.images.batch(self.ids[number]).numpy()
        except UserError as error:
            return str(error)


@dataclass(frozen=True)
class Split:
    """Images and their labels; a sample's id is its index, and keys everything that is remembered of it."""

    images: Images
    labels: Tensor  # (N,) int64
    paths: list[Path] | None = None  # of the images' files, for sets that have them

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """Arrays and labels on the device, channels last in memory, as augmentation takes them; files stay on disk."""
        images = self.images
        if isinstance(images, ArrayImages):
            images = ArrayImages(images.pixels.to(device).contiguous(memory_format=torch.channels_last))
        return Split(images, self.labels.to(device), self.paths)

    def batches(self, batch_size: int, ids: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All images, or those asked for, in order: (B, C, H, W) uint8 and (B,) int64; of none nothing, no empty batch."""
        ids = torch.arange(len(self)) if ids is None else ids
        for part, images in prefetched(self.images, ids.split(batch_size) if len(ids) else ()):
            yield images, self.labels[part.to(self.labels.device)]

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Indices of so many images drawn at random, in order; of all where there are no more."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].sort().values


def prefetched(images: Images, batches_of_ids: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (ids, images); those that are not in memory as they are come ahead of their use, two batches a worker.

    Raises:
        UserError: an image is unreadable, the images differ in size, or a worker process was killed.
    """
    batches = list(batches_of_ids)
    if not isinstance(images, FileImages | ResizedImages) or len(batches) < 2:
        for ids in batches:
            yield ids, images.batch(ids)
        return
    # Arrays, unlike tensors, go through a pipe: containers often have hardly any shared memory. The generator is for the
    # workers' seeds, which would else be drawn from the one that the training's numbers come from.
    workers = min(images.workers, usable_cores())  # a DataLoader warns of more
    decoding = DataLoader(_Batches(replace(images, workers=1), batches), batch_size=None, collate_fn=_as_it_is,
                          num_workers=workers, generator=torch.Generator())
    try:
        for ids, decoded in zip(batches, decoding, strict=True):
            if isinstance(decoded, str):
                raise UserError(decoded)
            yield ids, torch.from_numpy(decoded)
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
            raise
        raise UserError(f"a process that decodes images was killed, perhaps for lack of memory ({first_line(error)}); "
                        "use fewer workers or smaller batches") from error


def _as_it_is(decoded: Any) -> Any:
    return decoded


@dataclass(kw_only=True)
class Splits:
    """A data set. The test split is behind a function so that only who means to opens it."""

    train: Split
    validation: Split
    open_test: Callable[[], Split]
    card: DatasetCard
    warnings: list[str] = field(default_factory=list)
    test_folder: Path | None = None  # the test split as an image folder, where it lies on disk as one, all readable


def in_memory(images: Images, request: Request) -> Images:
    """The images as one array, in chunks; above the request's memory limit they stay as they are, a stream."""
    shape = images.batch(torch.zeros(min(1, len(images)), dtype=torch.int64)).shape[1:]
    if len(images) * shape.numel() > request.memory_limit_gb * 2**30:
        return images
    pixels: Tensor = torch.empty((len(images), *shape), dtype=torch.uint8)
    for ids, chunk in prefetched(images, torch.arange(len(images)).split(1024)):
        pixels[ids] = chunk
        if request.on_progress and len(ids):
            request.on_progress(int(ids[-1]) + 1, len(images))
    return ArrayImages(pixels)


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Splits indices into (train, validation), the same share of every class, at least one image each.

    A fraction of 0 holds nothing out.

    Raises:
        UserError: the fraction is out of range, or a class has fewer than two images.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"data.validation_fraction {fraction}: expected a share of the training split, at least 0 and "
                        "below 1")
    if fraction == 0:
        return torch.arange(len(labels)), torch.arange(0)
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


def array_splits(request: Request, class_names: list[str], preprocessing: dict[str, Any], train: Arrays,
                 open_test: Callable[[], Arrays]) -> Splits:
    """Splits of a set whose files hold arrays of square images, with the request's size and channels.

    Args:
        request: what the caller asks.
        class_names: sorted; labels are their ranks.
        preprocessing: the set's own.
        train: (N, C, S, S) uint8 and (N,) int64.
        open_test: the same of the test split.
    """
    pixels, labels = train
    settings = preprocessing_for(request, preprocessing, size=pixels.shape[3])
    assert settings.crop is not None, "images in arrays have a size"
    shape = (len(settings.mean), settings.crop, settings.crop)

    def split(pixels: Tensor, labels: Tensor) -> Split:
        as_they_are = tuple(pixels.shape[1:]) == shape
        if as_they_are:
            return Split(ArrayImages(pixels), labels)
        resized = ResizedImages(pixels=pixels, channels=shape[0], size=shape[1], workers=request.workers)
        return Split(in_memory(resized, request), labels)

    kept, held = hold_out(labels, request.validation_fraction, request.seed)
    card = DatasetCard(name=request.name, class_names=class_names, input_shape=shape, preprocessing=settings,
                       counts={"train": len(kept), "validation": len(held)}, fingerprint=fingerprint(pixels, labels))
    return Splits(train=split(pixels[kept], labels[kept]), validation=split(pixels[held], labels[held]),
                  open_test=lambda: split(*open_test()), card=card)


def fingerprint(*content: Tensor | bytes) -> str:
    """A short hash that changes when any of the arrays or bytes do."""
    digest = hashlib.sha256()
    for part in content:
        digest.update(part if isinstance(part, bytes) else part.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def preprocessing_for(request: Request, defaults: dict[str, Any], size: int | None = None) -> Preprocessing:
    """A set's preprocessing with what the request changes.

    Args:
        request: its `channels` and `image_size` change the defaults, and then its `preprocessing` replaces keys.
        defaults: the set's own.
        size: of images that come as arrays, which only `image_size` resizes.

    Raises:
        UserError: a value out of range, as many means as there are not channels, another size for arrays, or an RGB set
            that is asked for one channel.
    """
    mode = {**defaults, **request.preprocessing}["mode"]
    if request.channels not in (None, 1, 3) or (request.channels == 1 and mode == "RGB"):
        raise UserError(f"data.channels {request.channels}: the images of {request.name} are "
                        f"{'RGB, expected 3 or none given' if mode == 'RGB' else 'grey, expected 1 or 3'}")
    own = dict(defaults)
    if request.channels == 3 and defaults["mode"] == "L":
        own |= {"mode": "RGB", "mean": defaults["mean"] * 3, "std": defaults["std"] * 3}
    if request.image_size is not None:  # with as much room for the random crop, in proportion, as the set's own
        own |= {"resize": round(request.image_size * defaults["resize"] / defaults["crop"]), "crop": request.image_size}
    try:
        settings = Preprocessing.model_validate({**own, **request.preprocessing})
    except ValidationError as error:
        raise UserError(f"data: {describe_validation_error(error)}") from error
    if request.image_size is not None and settings.crop != request.image_size:
        raise UserError(f"data.image_size {request.image_size}, data.crop {settings.crop}: both say the side of the "
                        "model's input; pass one of them")
    if size is not None and (settings.resize, settings.crop, settings.mode) != (own["crop"], own["crop"], own["mode"]):
        raise UserError(f"data.resize, data.crop: the images of {request.name} are {size}x{size} arrays; pass "
                        "data.image_size to resize them, or use an image folder")
    return settings


def torchvision_root(request: Request, name: str) -> Path:
    """Where torchvision's files of a set, or an image folder of it, are; a UserError if the request does not say."""
    if request.root is None:
        raise UserError(f"data.root is not set: {name} is read from torchvision's files or from an image folder "
                        "(train/<class>/, test/<class>/); pass data.root=DIR, and data.download=true to fetch it")
    return request.root


def write_image_folder(split: Split, class_names: list[str], folder: Path) -> None:
    """Writes a split as an image folder that the set's preprocessing decodes to the same pixels.

    Images that come from files are copied as they are, `folder/<class>/<index><suffix>`: once cropped, they would be
    resized and cropped again by who reads them. Arrays become lossless PNG files. The folder appears when it is complete.

    Raises:
        UserError: the folder is there already.
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
                shutil.copyfile(path, partial / class_names[label] / f"{index:06d}{path.suffix}")


def _write_arrays(split: Split, class_names: list[str], folder: Path) -> None:
    from PIL import Image

    index = 0
    for images, labels in split.batches(256):
        for pixels, label in zip(images.cpu().numpy(), labels.tolist(), strict=True):
            Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(
                folder / class_names[label] / f"{index:06d}.png")
            index += 1
