"""Images as uint8 tensors: batches by index from memory, or streamed from disk for data sets larger than memory."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from loaders.images import center_crop, decode_image
from loaders.packed import Picture
from loaders.request import Request
from metadata.errors import UserError, first_line
from metadata.machine import usable_cores
from metadata.schemas import Preprocessing


class Images(Protocol):
    """A sequence of images of one size, fetched by index."""

    def __len__(self) -> int: ...

    def batch(self, ids: Tensor) -> Tensor:
        """(B,) int64 indices -> (B, C, H, W) uint8."""
        ...


SMALL = 2**20  # numbers of an array that is resized sooner than a worker process starts


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory: (N, C, H, W) uint8, on the device of the tensor."""

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, ids: Tensor) -> Tensor:
        # `index_select` copies whole images if they are contiguous; indexing copies single bytes.
        ids = ids.to(self.pixels.device)
        if self.pixels.is_contiguous(memory_format=torch.channels_last):
            return self.pixels.permute(0, 2, 3, 1).index_select(0, ids).permute(0, 3, 1, 2)
        return self.pixels.index_select(0, ids)


@dataclass(frozen=True, kw_only=True)
class ResizedImages:
    """Square images in memory that are resized, repeated over channels or made grey, when a batch is fetched.

    The pixels equal those that `decode_image` reads from files of the same images, to the bit, because PIL resizes both.
    """

    pixels: Tensor  # (N, 1 or 3, S, S) uint8
    channels: int
    size: tuple[int, int]  # (H, W) of the result: the smallest square that covers it, cropped at the centre
    interpolation: str = "bilinear"
    workers: int = 2

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, ids: Tensor) -> Tensor:
        from PIL import Image

        images = self.pixels[ids.cpu()]  # (B, C, S, S)
        if self.channels < images.shape[1]:
            colours = images.permute(0, 2, 3, 1).contiguous().numpy()
            grey = [np.asarray(Image.fromarray(image).convert("L")) for image in colours]
            images = torch.from_numpy(np.stack(grey))[:, None]
        side = max(self.size)
        if side != images.shape[3]:
            whole = images.permute(0, 2, 3, 1).squeeze(3).contiguous().numpy()  # the layout of PIL: (B, S, S[, 3])
            resized = np.empty((len(whole), side, side, *whole.shape[3:]), np.uint8)
            resample = Image.Resampling[self.interpolation.upper()]
            for image, target in zip(whole, resized, strict=True):
                target[:] = np.asarray(Image.fromarray(image).resize((side, side), resample))
            images = torch.from_numpy(resized).view(len(whole), side, side, images.shape[1]).permute(0, 3, 1, 2)
        return center_crop(images, self.size).expand(-1, self.channels, -1, -1).contiguous()  # (B, channels, H, W)


@dataclass(frozen=True)
class FileImages:
    """Images on disk, decoded when a batch is fetched: by threads, or by the processes of `prefetched`."""

    paths: Sequence[Picture]
    preprocessing: Preprocessing
    workers: int = 2

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, ids: Tensor) -> Tensor:
        if not len(ids):
            window = self.preprocessing.window or (0, 0)  # without a crop, only a file could tell the size
            return torch.empty((0, len(self.preprocessing.mean), *window), dtype=torch.uint8)
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
    """Batches by number, for the processes of a DataLoader; a UserError is returned as its text."""

    images: Images
    ids: list[Tensor]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> np.ndarray | str:
        try:
            return self.images.batch(self.ids[number]).numpy()
        except UserError as error:
            return str(error)


def prefetched(images: Images, batches_of_ids: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids, images); decode or resize images ahead of their use, two batches a worker process.

    Raises:
        UserError: an unreadable image, images of different sizes, or a killed worker process.
    """
    batches = list(batches_of_ids)
    few = isinstance(images, ResizedImages) and images.pixels.numel() < SMALL
    if not isinstance(images, FileImages | ResizedImages) or few or len(batches) < 2:
        for ids in batches:
            yield ids, images.batch(ids)
        return
    # NumPy arrays go through a pipe, tensors through shared memory, of which containers often have little. Without its own
    # generator, the DataLoader would draw the seeds of its workers from the global generator, which training uses.
    workers = min(images.workers, usable_cores())  # a DataLoader warns about more
    decoding = DataLoader(_Batches(replace(images, workers=1), batches), batch_size=None, collate_fn=_as_it_is,
                          num_workers=workers, generator=torch.Generator())
    try:
        for ids, decoded in zip(batches, decoding, strict=True):
            if isinstance(decoded, str):
                raise UserError(decoded)
            yield ids, torch.from_numpy(decoded)
    except RuntimeError as error:
        traceback.clear_frames(error.__traceback__)  # they hold the worker processes, which end with the last reference
        if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
            raise
        raise UserError(f"a process that decodes images was killed, perhaps for lack of memory ({first_line(error)}); "
                        "use fewer workers or smaller batches") from error


def _as_it_is(decoded: Any) -> Any:
    return decoded


def in_memory(images: Images, request: Request) -> Images:
    """Decode the images into one array, in chunks; return them unchanged if the array would exceed the memory limit."""
    shape = images.batch(torch.zeros(min(1, len(images)), dtype=torch.int64)).shape[1:]
    if len(images) * shape.numel() > request.memory_limit_gb * 2**30:
        return images
    pixels: Tensor = torch.empty((len(images), *shape), dtype=torch.uint8)
    for ids, chunk in prefetched(images, torch.arange(len(images)).split(1024)):
        pixels[ids] = chunk
        if request.on_progress and len(ids):
            request.on_progress(int(ids[-1]) + 1, len(images))
    return ArrayImages(pixels)
