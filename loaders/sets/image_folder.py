"""Image folders: root/train/<class>/<image>, with root/test or root/val; with both, root/val is the validation split."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from loaders.arrays import FileImages, in_memory
from loaders.images import decode_image, list_images
from loaders.request import Request
from loaders.splits import Split, Splits, fingerprint, hold_out, preprocessing_for
from metadata.errors import UserError
from metadata.records import DatasetCard, dataset_cards
from metadata.schemas import Preprocessing


Files = list[tuple[Path, int]]  # with the index of the class


def image_folder(request: Request) -> Splits:
    """Open an image folder, with ImageNet preprocessing unless the request changes it."""
    return folder_splits(request, "image_folder", dataset_cards()["image_folder"]["preprocessing"])


def folder_splits(request: Request, name: str, preprocessing: dict[str, Any]) -> Splits:
    """Return the splits of root/train and root/test or root/val; hold validation out of train unless both exist.

    Raises:
        UserError: a missing or empty folder, a class without images, different class lists, or a damaged image.
    """
    root = request.root
    if root is None:
        raise UserError(f"data.root is not set: {name} needs a folder with train/<class>/<image> and test/ or val/ "
                        "beside it; pass data.root=DIR")
    if not (root / "train").is_dir():
        raise UserError(f"data.root {root}: expected {root}/train/<class>/<image>; there is no such folder")
    test_folder, validation_folder = _test_and_validation(root)
    classes, train = list_images(root / "train")
    for folder in filter(None, (test_folder, validation_folder)):
        _same_classes(root / "train", classes, folder)
    test = list_images(test_folder)[1]
    validation = list_images(validation_folder)[1] if validation_folder else None
    return file_splits(request, name, preprocessing, classes, train, test, validation, test_folder)


def file_splits(request: Request, name: str, preprocessing: dict[str, Any], classes: list[str], train: Files, test: Files,
                validation: Files | None = None, test_folder: Path | None = None) -> Splits:
    """Return the splits of image files below `request.root`.

    Args:
        request: the request of the caller.
        name: the name of the data set.
        preprocessing: the preprocessing of the data set.
        classes: sorted names.
        train: files and the indices of their classes.
        test: the same for the test split.
        validation: the same for the validation split; None holds it out of train.
        test_folder: an image folder that holds exactly the files of `test`, if there is one.

    Raises:
        UserError: a damaged image, or a class that has only damaged images.
    """
    assert request.root is not None, "files have a folder"
    settings = preprocessing_for(request, preprocessing)
    warnings: list[str] = []
    train_settings = settings  # leaves room for the random crop if the resized image is larger
    if settings.resize and settings.crop and settings.resize > settings.crop:
        train_settings = settings.model_copy(update={"crop": settings.resize})
    if validation is None:
        kept, held = hold_out(torch.tensor([label for _, label in train]), request.validation_fraction, request.seed)
        train, validation = [train[i] for i in kept.tolist()], [train[i] for i in held.tolist()]
    # Decode the test images now, though they are not used: a damaged one must not stop the run after hours of training.
    listed, test = len(test), _usable(test, settings, request, warnings)
    if request.skip_unreadable:
        train = _usable(train, train_settings, request, warnings)
        validation = _usable(validation, settings, request, warnings)
    train_split, validation_split = _split(train, train_settings, request), _split(validation, settings, request)
    listing = "\n".join(f"{path.relative_to(request.root)} {(stat := path.stat()).st_size} {stat.st_mtime_ns}"
                        for path, _ in [*train, *validation, *test])
    channels, height, width = decode_image(test[0][0], settings).shape
    card = DatasetCard(name=name, class_names=classes, input_shape=(channels, height, width), preprocessing=settings,
                       counts={"train": len(train), "validation": len(validation)},
                       fingerprint=fingerprint(listing.encode()))
    return Splits(train=train_split, validation=validation_split, open_test=lambda: _split(test, settings, request),
                  card=card, warnings=warnings, test_folder=test_folder if len(test) == listed else None)


def _test_and_validation(root: Path) -> tuple[Path, Path | None]:
    validation = next((root / name for name in ("val", "validation", "valid") if (root / name).is_dir()), None)
    if (root / "test").is_dir():
        return root / "test", validation
    if validation is None:
        raise UserError(f"data.root {root}: expected a test split in {root}/test or {root}/val; there is neither")
    return validation, None  # root/val is the test split; validation is held out of train


def _same_classes(train: Path, classes: list[str], folder: Path) -> None:
    other, _ = list_images(folder)
    if other != classes:
        odd = sorted(set(classes) ^ set(other))
        raise UserError(f"{folder}: its classes differ from those of {train} ({len(other)} and {len(classes)}); not in "
                        f"both: {', '.join(odd[:5])}")


def _split(files: Files, settings: Preprocessing, request: Request) -> Split:
    paths = [path for path, _ in files]
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return Split(in_memory(FileImages(paths, settings, request.workers), request), labels, paths)


def _usable(files: Files, settings: Preprocessing, request: Request, warnings: list[str]) -> Files:
    """Return the files that decode; raise UserError for a damaged file unless the request skips it."""
    def problem(file: tuple[Path, int]) -> str | None:
        try:
            decode_image(file[0], settings)
        except UserError as error:
            return str(error)
        return None

    problems: list[str | None] = []
    with ThreadPoolExecutor(request.workers) as pool:
        for text in pool.map(problem, files):
            if text and not request.skip_unreadable:
                pool.shutdown(cancel_futures=True)
                raise UserError(f"{text}; data.skip_unreadable=true skips such images")
            problems.append(text)
            if request.on_progress and len(problems) % 256 == 0:
                request.on_progress(len(problems), len(files))
    damaged = [text for text in problems if text]
    if damaged:
        warnings.append(f"{len(damaged)} unreadable images were skipped, the first: {damaged[0]}")
    kept = [file for file, text in zip(files, problems, strict=True) if not text]
    emptied = {label for _, label in files} - {label for _, label in kept}
    if emptied:
        example = next(path for path, label in files if label in emptied)
        raise UserError(f"{example}: skipping unreadable images like this one leaves its class without images")
    return kept


SETS = {"image_folder": image_folder}
