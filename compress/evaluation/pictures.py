"""The test images: all are decoded before a submission's model is opened; nothing is read while foreign code lives."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compress.evaluation.channel import Clock, OutOfTimeError
from compress.evaluation.measure import Progress
from loaders.images import decode_image, is_deep_grey, is_turned
from loaders.listing import Listing, list_images
from metadata.errors import UserError
from metadata.schemas import Preprocessing

IN_MEMORY_BYTES = 2**28  # larger sets of pixels lie in a temporary file without a name


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestData:
    """The test images: (N,) paths and class indices, in the order of the folder.

    `listing.classes` are the classes of the folder, and those of the labels.
    """

    listing: Listing
    paths: list[Path]
    labels: np.ndarray


def list_test_data(folder: str | Path) -> TestData:
    """List the test images. Raise UserError as `list_images` does."""
    listing = list_images(folder)
    return TestData(listing=listing, paths=[path for path, _ in listing.images],
                    labels=np.array([label for _, label in listing.images]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pictures:
    """Test images as a submission's preprocessing makes them.

    Args:
        paths: (N,) the files, for messages.
        pixels: (N, C, H, W) uint8.
        preprocessing: how these numbers become the model's input.
        warnings: how many of them the submission may have seen in another way while it was trained.
    """

    paths: Sequence[Path]
    pixels: np.ndarray
    preprocessing: Preprocessing
    warnings: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def some(self, images: np.ndarray) -> Pictures:
        """Return some of the images, in the order of their indices here."""
        return dataclasses.replace(self, paths=[self.paths[index] for index in images], pixels=self.pixels[images])

    def inputs(self, images: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the model's input for some images: (n, C, H, W) float32."""
        mean, std = (np.array(values, np.float32)[:, None, None]
                     for values in (self.preprocessing.mean, self.preprocessing.std))
        normalized: np.ndarray = (self.pixels[np.asarray(images)].astype(np.float32) / np.float32(255) - mean) / std
        return normalized


def decode_pictures(paths: Sequence[Path], preprocessing: Preprocessing, shape: tuple[int, int, int], packaged: bool,
                    clock: Clock, progress: Progress | None = None) -> Pictures:
    """Decode all test images for a submission.

    Args:
        paths: the image files.
        preprocessing: the submission's.
        shape: (C, H, W) that the submission states.
        packaged: whether the preprocessing was stated in the toolkit's own format.
        clock: the submission's, because its preprocessing decides how long this takes.
        progress: called with the number of images done and their total.

    Raises:
        UserError: an image is unreadable or smaller than the crop, or images differ in size and nothing is cropped.
        OutOfTimeError: the clock has run out.
    """
    pixels: np.ndarray | None = None
    turned, deep = [], []
    for index, path in enumerate(paths):
        if clock.left <= 0:
            raise OutOfTimeError(f"{index} of {len(paths)} test images were read within --time_limit_s {clock.seconds:g}; "
                                 "the preprocessing is the submission's")
        with clock.running():
            image = decode_image(path, preprocessing)
            if pixels is None:
                pixels = _room((len(paths), *image.shape))
            if image.shape != pixels.shape[1:]:
                raise UserError(f"{path}: the image is {image.shape[1:]}, others are {pixels.shape[2:]}, and the "
                                "preprocessing has neither resize nor crop")
            pixels[index] = image
            turned += [path] * (not preprocessing.exif_orientation and is_turned(path))
            deep += [path] * (not packaged and is_deep_grey(path))
        if progress:
            progress(index + 1, len(paths))
    assert pixels is not None
    warnings = [f"{len(found)} of {len(paths)} test images {what}, such as {found[0]}" for found, what in (
        (turned, "carry an EXIF orientation that the submission's preprocessing does not apply"),
        (deep, "are grey with more than 8 bits: they are scaled to 8 bits here, Pillow alone would clip them")) if found]
    return Pictures(paths=paths, pixels=pixels, preprocessing=preprocessing, warnings=warnings)


def _room(shape: tuple[int, ...]) -> np.ndarray:
    """Return an array of uint8 in memory, or in a temporary file that vanishes with it."""
    if math.prod(shape) <= IN_MEMORY_BYTES:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:
        file.truncate(math.prod(shape))
        return np.memmap(file, np.uint8, "r+", shape=shape)
