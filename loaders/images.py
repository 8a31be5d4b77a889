"""Read image files: from disk to uint8 arrays to the input of a model."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TYPE_CHECKING

import numpy as np

from metadata.errors import UserError, VerificationError, first_line
from metadata.schemas import Preprocessing

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

# Where Pillow keeps an orientation in `Image.info`; a TIFF has none there, because Pillow turns it while it reads.
_TAGGED = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})
_ORIENTATION = 0x0112
# Of a resize. Networks for photos take 224 to 1,024 pixels, and crop 7/8 or all of the resize.
MAX_SIDE = 4096
MAX_RESIZE_TO_CROP = 8
MAX_PIXELS = 2**28  # of a resized picture; one of 60,000 x 1 pixels would grow to 15 million x 256


class PackedPicture(Protocol):
    """A picture that is no file of its own; its text names it in messages."""

    def open(self) -> io.BytesIO: ...


def decode_image(path: Path | PackedPicture, preprocessing: Preprocessing) -> np.ndarray:
    """Decode, turn, convert, resize and crop a picture: (C, H, W) uint8, the same pixels as torchvision's transforms.

    Of an animation the first frame counts, and transparency is dropped, as torchvision does. Grey images of more than 8
    bits are scaled to 8 (see `_eight_bits`).

    Raises:
        UserError: the file is not an image, is truncated, has values out of range, is smaller than the crop, or too long to
            resize.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError
    try:
        with Image.open(path if isinstance(path, Path) else path.open()) as opened:
            opened.load()  # a PNG may state its orientation after its pixels
            turned = preprocessing.exif_orientation and _orientation(opened) in range(2, 9)
            image = ImageOps.exif_transpose(opened) if turned else opened
            image = _eight_bits(image, path) if image.mode.startswith(("I", "F")) else image
            image = image if image.mode == preprocessing.mode else image.convert(preprocessing.mode)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = "no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise UserError(f"{path}: not a readable image, or cut short: {why}") from error
    if preprocessing.covered and (size := size_covering(image.size, preprocessing.covered)) != image.size:
        if size[0] * size[1] > MAX_PIXELS:
            raise UserError(f"{path}: the image is {image.width}x{image.height}, so the resize would give {size[0]:,} x "
                            f"{size[1]:,} pixels, over the limit of {MAX_PIXELS:,}; cut it, or leave it out")
        image = image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])
    if preprocessing.window:
        (width, height), (high, wide) = image.size, preprocessing.window
        if width < wide or height < high:
            raise UserError(f"{path}: the image is {width}x{height}, smaller than the crop of {wide}x{high}")
        left, top = round((width - wide) / 2), round((height - high) / 2)
        image = image.crop((left, top, left + wide, top + high))
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def size_covering(size: tuple[int, int], covered: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (width, height) in the proportions of a picture that covers a window of (height, width)."""
    (width, height), (high, wide) = size, covered
    if high * width >= wide * height:
        return high * width // height, high
    return wide, wide * height // width


def oversized(resize: tuple[int, int] | None, crop: tuple[int, int] | None) -> str:
    """Return in which way a resize to cover (height, width) is over the limits, or "" where it is not."""
    if not resize or all(side <= min(MAX_SIDE, MAX_RESIZE_TO_CROP * least)
                         for side, least in zip(resize, crop or resize, strict=True)):
        return ""
    return (f"a resize to {sides_text(resize)} pixels is over the limit, {MAX_SIDE:,} pixels and {MAX_RESIZE_TO_CROP} "
            f"times the crop ({sides_text(crop) if crop else None})")


def sides_text(sides: tuple[int, int]) -> str:
    """Return (height, width) as messages write it: one number where both are the same."""
    return f"{sides[0]:,}" if sides[0] == sides[1] else f"{sides[0]:,}x{sides[1]:,}"


def is_colour(path: Path | PackedPicture) -> bool:
    """Return whether a picture holds colours, by its header; no for what is no picture."""
    from PIL import Image
    try:
        with Image.open(path if isinstance(path, Path) else path.open()) as image:
            return image.mode not in ("1", "L", "LA", "La") and not image.mode.startswith(("I", "F"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def is_turned(path: Path) -> bool:
    """Return whether the EXIF data of an image file turn the picture, by its header; no for a file that is no image."""
    from PIL import Image
    try:
        with Image.open(path) as image:
            return _orientation(image) in range(2, 9)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def is_deep_grey(path: Path) -> bool:
    """Return whether a file is grey with more than 8 bits a pixel, by its header; no for a file that is no image."""
    from PIL import Image
    try:
        with Image.open(path) as image:
            return image.mode.startswith(("I", "F"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _orientation(image: Image.Image) -> object:
    """Return the orientation in an image's EXIF data, 1 to 8, or 1 where they are missing or damaged."""
    if _TAGGED.isdisjoint(image.info):
        return 1
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except (ArithmeticError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error):
        return 1


def _eight_bits(image: Image.Image, path: Path | PackedPicture) -> Image.Image:
    """Scale a grey image of more than 8 bits to 8 bits; Pillow alone would clip it to white, or to black.

    16 bits stand for 0 to 65535, floats for 0 to 1. 32-bit integers are read as 16 bits, or as 8 where none exceeds 255.

    Raises:
        UserError: values outside these ranges.
    """
    from PIL import Image
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        if not (low >= -0.5 / 255 and high <= 1 + 0.5 / 255):  # also where a value is not a number
            raise UserError(f"{path}: float values from {low:g} to {high:g}, expected 0 to 1; scale them, or save the "
                            "image as 8 or 16 bits")
        return Image.fromarray(np.rint(values * np.float32(255)).clip(0, 255).astype(np.uint8))
    if not 0 <= low <= high <= 65535:
        raise UserError(f"{path}: integer values from {low:.0f} to {high:.0f}, expected 0 to 65535; scale them, or save "
                        "the image as 8 or 16 bits")
    if image.mode == "I" and image.format == "TIFF" and high <= 255:
        return Image.fromarray(values.astype(np.uint8))
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))  # 65535 / 255 = 257


def center_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the central window, the same as `decode_image` takes."""
    top, left = round((images.shape[2] - size[0]) / 2), round((images.shape[3] - size[1]) / 2)
    return images[:, :, top:top + size[0], left:left + size[1]]


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Scale to [0, 1], subtract the mean, divide by std: (N, C, H, W) uint8 -> float32."""
    import torch
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1).expand(1, *images.shape[1:])
                 .contiguous(memory_format=layout) for values in (preprocessing.mean, preprocessing.std))
    # Expanded to the size of an image, because broadcasting over channels that lie last in memory is ten times slower.
    return images.float().div_(255).sub_(mean).div_(std)


def read_pixels(path: Path, preprocessing: Preprocessing, shape: Sequence[int]) -> np.ndarray:
    """Decode an image file to the (C, H, W) that a submission declares: uint8.

    Raises:
        UserError: see `decode_image`.
        VerificationError: the preprocessing gives another shape.
    """
    pixels = decode_image(path, preprocessing)
    if pixels.shape != tuple(shape):
        raise VerificationError(f"{path}: the preprocessing gives an image of shape {list(pixels.shape)}, the submission "
                                f"declares an input_shape of {list(shape)}; state a resize and a crop")
    return pixels


def scale_pixels(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Scale to [0, 1], subtract the mean, divide by std: (N, C, H, W) uint8 -> float32, as `normalize` does for tensors."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def read_images(paths: Sequence[Path], preprocessing: Preprocessing) -> np.ndarray:
    """Decode and normalize image files: (N, C, H, W) float32.

    Raises:
        UserError: an unreadable image, or images of different sizes.
    """
    arrays = [decode_image(path, preprocessing) for path in paths]
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise UserError(f"{path}: the image is {array.shape[1:]}, others are {arrays[0].shape[1:]}, and the "
                            "preprocessing has neither resize nor crop")
    return scale_pixels(np.stack(arrays), preprocessing)
