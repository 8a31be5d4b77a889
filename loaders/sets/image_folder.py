"""Image folders: root/train/<class>/<image>, with root/test or root/val; with both, root/val is the validation split."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from loaders.arrays import FileImages, in_memory
from loaders.content import file_content, content_hash
from loaders.images import decode_image, is_colour
from loaders.listing import Listing, SPLIT_FOLDERS, list_images
from loaders.request import Request
from loaders.splits import Split, Splits, few_images_warnings, hold_out, preprocessing_for
from metadata.errors import UserError
from metadata.records import DatasetCard, dataset_cards
from metadata.schemas import Preprocessing


Files = list[tuple[Path, int]]  # with the index of the class


def image_folder(request: Request) -> Splits:
    """Open an image folder, with ImageNet preprocessing unless the request changes it."""
    return folder_splits(request, "image_folder", dataset_cards()["image_folder"]["preprocessing"])


def folder_splits(request: Request, name: str, preprocessing: dict[str, Any], numbering: Sequence[str] = ()) -> Splits:
    """Return the splits of root/train and root/test or root/val; hold validation out of train unless both exist.

    Args:
        request: the request of the caller.
        name: the name of the data set.
        preprocessing: the preprocessing of the data set.
        numbering: the class names in the data set's own order, which counts if the folders have these names. Otherwise a
            class has the rank of its name.

    Raises:
        UserError: a missing or empty folder, a class without training images, a class that train lacks, or a damaged image.
    """
    root = request.root
    if root is None:
        raise UserError(f"data.root is not set: {name} needs a folder with train/<class>/<image> and test/ or val/ "
                        "beside it; pass data.root=DIR")
    if not (root / "train").is_dir():
        raise UserError(f"data.root {root}: expected {root}/train/<class>/<image>; {_found_instead(root)}")
    test_folder, validation_folder = _test_and_validation(root)
    listing = list_images(root / "train")
    classes = list(numbering) if set(numbering) == set(listing.classes) else listing.classes
    warnings = [*_check_training_classes(listing), *listing.warnings()]
    train = _numbered(listing, classes)
    test = _numbered(_held_against(listing, test_folder, warnings), classes)
    validation = _numbered(_held_against(listing, validation_folder, warnings), classes) if validation_folder else None
    splits = file_splits(request, name, preprocessing, classes, train, test, validation, test_folder)
    splits.warnings[:0] = warnings
    return splits


def file_splits(request: Request, name: str, preprocessing: dict[str, Any], classes: list[str], train: Files, test: Files,
                validation: Files | None = None, test_folder: Path | None = None) -> Splits:
    """Return the splits of image files below `request.root`.

    Args:
        request: the request of the caller.
        name: the name of the data set.
        preprocessing: the preprocessing of the data set.
        classes: the names of the classes, in the order of their indices.
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
    if settings.covered and settings.window and all(
            side >= least for side, least in zip(settings.covered, settings.window, strict=True)):
        train_settings = settings.model_copy(update={"crop": settings.resize})
    if settings.mode == "L":
        firsts = {label: path for path, label in reversed(train)}
        colour = next((path for _, path in sorted(firsts.items()) if is_colour(path)), None)
        if colour:
            warnings.append(f"the input has one channel: colour pictures such as {colour} become grey")
    listed = {"train": train, "validation": validation or [], "test": test}
    if validation is None:
        labels = torch.tensor([label for _, label in train])
        kept, held = hold_out(labels, request.validation_fraction, request.seed)
        if request.validation_fraction:
            warnings += few_images_warnings(labels, classes, [path for path, _ in train])
        train, validation = [train[i] for i in kept.tolist()], [train[i] for i in held.tolist()]
    # Decode the test images now, though they are not used: a damaged one must not stop the run after hours of training.
    test = _usable(test, settings, request, warnings)
    if request.skip_unreadable:
        train = _usable(train, train_settings, request, warnings)
        validation = _usable(validation, settings, request, warnings)
    train_split, validation_split = _split(train, train_settings, request), _split(validation, settings, request)
    content = file_content(request, classes, listed, {path for path, _ in [*train, *validation, *test]})
    channels, height, width = decode_image(test[0][0], settings).shape
    card = DatasetCard(name=name, class_names=classes, input_shape=(channels, height, width), preprocessing=settings,
                       counts={"train": len(train), "validation": len(validation)},
                       fingerprint=content_hash(content), content=content)
    return Splits(train=train_split, validation=validation_split, open_test=lambda: _split(test, settings, request),
                  card=card, warnings=warnings, test_folder=test_folder if len(test) == len(listed["test"]) else None)


def _test_and_validation(root: Path) -> tuple[Path, Path | None]:
    validation = next((root / name for name in ("val", "validation", "valid") if (root / name).is_dir()), None)
    if (root / "test").is_dir():
        return root / "test", validation
    if validation is None:
        raise UserError(f"data.root {root}: expected a test split in {root}/test or {root}/val; there is neither")
    return validation, None  # root/val is the test split; validation is held out of train


def _found_instead(root: Path) -> str:
    """Return what is in place of root/train, and what to do about it."""
    if not root.is_dir():
        return "there is no such folder" if not root.exists() else f"{root} is a file"
    if root.name in SPLIT_FOLDERS and (root.parent / "train").is_dir():
        return f"this is a split itself; pass data.root={root.parent}"
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    for folder in folders:
        if (folder / "train").is_dir():
            return f"found {folder}/train; pass data.root={folder}"
        if folder.name.lower().startswith("train"):
            return f"found {folder}; rename it to {root}/train"
    try:
        listing = list_images(root)
    except UserError:
        return f"found {', '.join(folder.name for folder in folders[:5]) or 'no folders'}"
    return (f"found {len(listing.classes)} class folders with {len(listing.images)} images directly in it "
            f"({', '.join(listing.classes[:5])}); move them into {root}/train, and images for testing into {root}/test")


def _check_training_classes(listing: Listing) -> list[str]:
    """Return a warning where the class folders hold folders of classes, perhaps.

    Raises:
        UserError: a class without images, or one class only.
    """
    if listing.empty:
        raise UserError(f"{listing.folder / listing.empty[0]}: the class has no images ({len(listing.empty)} such classes: "
                        f"{', '.join(listing.empty[:5])}); put images there, or remove the folder"
                        + "".join(f"; {text}" for text in listing.warnings()))
    below: dict[str, set[str]] = {name: set() for name in listing.classes}
    for path, label in listing.images:
        name = listing.classes[label]
        below[name].add(path.relative_to(listing.folder / name).parts[0] if path.parent.name != name else "")
    nested = sorted({name for names in below.values() for name in names})
    deeper = "" not in nested and len(nested) > len(listing.classes)
    if len(listing.classes) == 1:
        found = f"; if the {len(nested)} folders in it are ({', '.join(nested[:5])}), move them up" if deeper else ""
        raise UserError(f"{listing.folder}: one class only, {listing.classes[0]!r}; expected two or more{found}")
    if not deeper:
        return []
    return [f"{listing.folder}: the classes are its {len(listing.classes)} folders ({', '.join(listing.classes[:5])}), not "
            f"the {len(nested)} folders in these ({', '.join(nested[:5])})"]


def _held_against(train: Listing, folder: Path, warnings: list[str]) -> Listing:
    """Return the listing of another split; add to `warnings` what it left out and which classes it lacks.

    Raises:
        UserError: the split has images of a class that train does not have.
    """
    listing = list_images(folder)
    present = set(listing.classes) - set(listing.empty)
    unknown, lacking = sorted(present - set(train.classes)), sorted(set(train.classes) - present)
    if unknown:
        raise UserError(f"{folder}: {len(unknown)} of its classes are not in {train.folder}: {', '.join(unknown[:5])}"
                        + (f"; {len(lacking)} of those in train have no images here: {', '.join(lacking[:5])}" if lacking
                           else ""))
    warnings += listing.warnings()
    if lacking:
        warnings.append(f"{folder}: no images of {len(lacking)} of the {len(train.classes)} classes: "
                        f"{', '.join(lacking[:5])}{' and others' if len(lacking) > 5 else ''}; put images there, or the "
                        "accuracy says nothing about them")
    return listing


def _numbered(listing: Listing, classes: Sequence[str]) -> Files:
    """Return the files with the indices of their classes in `classes`."""
    number = {name: index for index, name in enumerate(classes)}
    return [(path, number[listing.classes[label]]) for path, label in listing.images]


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
