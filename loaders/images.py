"""Read image files: from disk to uint8 arrays to the input of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metadata.errors import UserError, first_line
from metadata.schemas import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def list_images(folder: str | Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """List an image folder, `<folder>/<class>/<image>`: return the sorted class names, and (path, class index) in order.

    Raises:
        UserError: a missing folder, no classes, or a class without images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such data folder; expected {folder}/<class>/<image>")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{folder}: no class folders in it; expected {folder}/<class>/<image>")
    images: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        paths = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
                       and not path.name.startswith("."))
        if not paths:
            raise UserError(f"{folder / name}: the class has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        images += [(path, label) for path in paths]
    return classes, images


def decode_image(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    """Decode, convert, resize and crop an image file: (C, H, W) uint8, the same pixels as torchvision's transforms.

    Raises:
        UserError: the file is not an image, is truncated, or is smaller than the crop.
    """
    from PIL import Image, UnidentifiedImageError
    try:
        with Image.open(path) as opened:
            image = opened.convert(preprocessing.mode)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image, or cut short: {first_line(error)}") from error
    if preprocessing.resize and min(image.size) != preprocessing.resize:
        width, height = image.size
        side, shorter = preprocessing.resize, min(image.size)
        image = image.resize((side * width // shorter, side * height // shorter), Image.Resampling.BILINEAR)
    if preprocessing.crop:
        width, height = image.size
        crop = preprocessing.crop
        if min(width, height) < crop:
            raise UserError(f"{path}: the image is {width}x{height}, smaller than the crop of {crop}x{crop}")
        left, top = round((width - crop) / 2), round((height - crop) / 2)
        image = image.crop((left, top, left + crop, top + crop))
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Scale to [0, 1], subtract the mean, divide by std: (N, C, H, W) uint8 -> float32."""
    import torch
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1).expand(1, *images.shape[1:])
                 .contiguous(memory_format=layout) for values in (preprocessing.mean, preprocessing.std))
    # Expanded to the size of an image, because broadcasting over channels that lie last in memory is ten times slower.
    return images.float().div_(255).sub_(mean).div_(std)


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
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return (np.stack(arrays).astype(np.float32) / np.float32(255) - mean) / std
