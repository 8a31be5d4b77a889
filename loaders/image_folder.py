"""Any image folder: root/train/<class>/<image>, with root/test or root/val (and both, if validation is given apart)."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loaders.arrays import ArrayImages, FileImages, Images, Request, Split, Splits, hold_out
from metadata.schemas import DatasetCard, Preprocessing, dataset_cards
from model_loader import UserError, decode_image, list_images


def image_folder(request: Request) -> Splits:
    """Opens an image folder with ImageNet preprocessing unless the request says otherwise."""
    return folder_splits(request, "image_folder", dataset_cards()["image_folder"]["preprocessing"])


def folder_splits(request: Request, name: str, preprocessing: dict[str, Any]) -> Splits:
    """Splits of root/train and root/test (or root/val); validation is held out of train unless both are there.

    Raises:
        UserError: a folder is missing or empty, a class has no images, class lists differ, or an image is damaged.
    """
    root = request.root
    if root is None:
        raise UserError(f"data.root is not set: {name} needs a folder with train/<class>/<image> and test/ or val/ "
                        "beside it; pass data.root=DIR")
    if not (root / "train").is_dir():
        raise UserError(f"data.root {root}: expected {root}/train/<class>/<image>, there is no such folder")
    test_folder, validation_folder = _test_and_validation(root)
    classes, train_files = list_images(root / "train")
    for folder in filter(None, (test_folder, validation_folder)):
        _same_classes(root / "train", classes, folder)
    settings = Preprocessing(**{**preprocessing, **request.preprocessing})
    warnings: list[str] = []
    train_settings = settings  # room for the random crop, where the resized image is larger than the crop
    if settings.resize and settings.crop and settings.resize > settings.crop:
        train_settings = settings.model_copy(update={"crop": settings.resize})

    if validation_folder is None:
        labels = torch.tensor([label for _, label in train_files])
        kept, held = hold_out(labels, request.validation_fraction, request.seed)
        files = {"train": [train_files[i] for i in kept.tolist()], "validation": [train_files[i] for i in held.tolist()]}
    else:
        files = {"train": train_files, "validation": list_images(validation_folder)[1]}
    train = _split(files["train"], train_settings, request, warnings)
    validation = _split(files["validation"], settings, request, warnings)
    shape = _input_shape(validation.images)
    listing = "\n".join(f"{path.relative_to(root)} {path.stat().st_size}" for path, _ in train_files)
    card = DatasetCard(name=name, class_names=classes, input_shape=shape, preprocessing=settings,
                       counts={"train": len(train), "validation": len(validation)},
                       fingerprint=hashlib.sha256(listing.encode()).hexdigest()[:16])
    return Splits(train, validation, lambda: _split(list_images(test_folder)[1], settings, request, warnings), card,
                  warnings, test_folder)


def _test_and_validation(root: Path) -> tuple[Path, Path | None]:
    validation = next((root / name for name in ("val", "validation", "valid") if (root / name).is_dir()), None)
    if (root / "test").is_dir():
        return root / "test", validation
    if validation is None:
        raise UserError(f"data.root {root}: expected a test split in {root}/test or {root}/val, there is neither")
    return validation, None  # the only other split is the test split; validation comes out of train


def _same_classes(train: Path, classes: list[str], folder: Path) -> None:
    other, _ = list_images(folder)
    if other != classes:
        odd = sorted(set(classes) ^ set(other))
        raise UserError(f"{folder}: its classes are not those of {train} ({len(other)} and {len(classes)}); not in "
                        f"both: {', '.join(odd[:5])}")


def _input_shape(images: Images) -> tuple[int, int, int]:
    _, channels, height, width = images.batch(torch.zeros(1, dtype=torch.int64)).shape
    return channels, height, width


def _split(files: list[tuple[Path, int]], settings: Preprocessing, request: Request, warnings: list[str]) -> Split:
    if request.skip_unreadable:
        files = _readable(files, settings, request, warnings)
    labels = torch.tensor([label for _, label in files])
    paths = [path for path, _ in files]
    streamed = FileImages(paths, settings, request.workers)
    shape = _input_shape(streamed)
    if len(paths) * int(np.prod(shape)) > request.memory_limit_gb * 2**30:
        return Split(streamed, labels)
    return Split(_decode_all(streamed, shape, request), labels)


def _decode_all(images: FileImages, shape: tuple[int, int, int], request: Request) -> Images:
    pixels: Tensor = torch.empty((len(images), *shape), dtype=torch.uint8)
    for ids in torch.arange(len(images)).split(1024):
        pixels[ids] = images.batch(ids)
        if request.on_progress:
            request.on_progress(int(ids[-1]) + 1, len(images))
    return ArrayImages(pixels)


def _readable(files: list[tuple[Path, int]], settings: Preprocessing, request: Request,
              warnings: list[str]) -> list[tuple[Path, int]]:
    def problem(file: tuple[Path, int]) -> str | None:
        try:
            decode_image(file[0], settings)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(request.workers) as pool:
        problems = list(pool.map(problem, files))
    damaged = [text for text in problems if text]
    if damaged:
        warnings.append(f"{len(damaged)} unreadable images were skipped, the first: {damaged[0]}")
    kept = [file for file, text in zip(files, problems, strict=True) if not text]
    missing = {label for _, label in files} - {label for _, label in kept}
    if missing:
        raise UserError(f"{files[0][0].parent.parent}: skipping unreadable images leaves class number {min(missing)} "
                        "without any")
    return kept


SETS = {"image_folder": image_folder}
