"""The test images: all are decoded before a submission's model is opened; nothing is read while foreign code lives."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from compress.evaluation.channel import Clock, OutOfTimeError
from compress.evaluation.measure import Progress
from loaders.images import is_deep_grey, is_turned, read_pixels, scale_pixels
from loaders.listing import Listing, list_images
from metadata.errors import VerificationError
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
        return scale_pixels(self.pixels[np.asarray(images)], self.preprocessing)


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
        UserError: an image is unreadable or smaller than the crop.
        VerificationError: the preprocessing does not give images of the shape.
        OutOfTimeError: the clock has run out.
    """
    turned, deep = [], []
    with _Room((len(paths), *shape)) as room:
        for index, path in enumerate(paths):
            if clock.left <= 0:
                raise OutOfTimeError(f"{index} of {len(paths)} test images were read within --time_limit_s "
                                     f"{clock.seconds:g}; the preprocessing is the submission's")
            with clock.running():
                room.put(index, read_pixels(path, preprocessing, shape))
                turned += [path] * (not preprocessing.exif_orientation and is_turned(path))
                deep += [path] * (not packaged and is_deep_grey(path))
            if progress:
                progress(index + 1, len(paths))
        pixels = room.pixels()
    warnings = [f"{len(found)} of {len(paths)} test images {what}, such as {found[0]}" for found, what in (
        (turned, "carry an EXIF orientation that the submission's preprocessing does not apply"),
        (deep, "are grey with more than 8 bits: they are scaled to 8 bits here, Pillow alone would clip them")) if found]
    return Pictures(paths=paths, pixels=pixels, preprocessing=preprocessing, warnings=warnings)


class _Room:
    """Room for images of one shape: in memory, or for many in a temporary file that vanishes with its last user.

    The file is written, not mapped, while it grows: a full disk must be an error, and kills a process that writes to a map.

    Raises:
        VerificationError: the images of a submission's size do not fit on the disk.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.file = shape, None
        needed, where = math.prod(shape), tempfile.gettempdir()
        if needed <= IN_MEMORY_BYTES:
            self.array = np.empty(shape, np.uint8)
        elif needed > (free := shutil.disk_usage(where).free) // 2:
            raise VerificationError(f"{shape[0]:,} test images of the submission's shape {list(shape[1:])} take {needed:,} "
                                    f"bytes, and {where} has {free:,}: state a smaller crop, or set TMPDIR")
        else:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115 - `__exit__` closes it

    def put(self, index: int, image: np.ndarray) -> None:
        """Add an image. Images come in order."""
        if self.file:
            self.file.write(image.data)
        else:
            self.array[index] = image

    def pixels(self) -> np.ndarray:
        """Return all images."""
        if not self.file:
            return self.array
        self.file.flush()
        return np.memmap(self.file, np.uint8, "r", shape=self.shape)  # which holds the file open by itself

    def __enter__(self) -> _Room:
        return self

    def __exit__(self, *error: object) -> None:
        if self.file:
            self.file.close()
