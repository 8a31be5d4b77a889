"""Splits of image files, and of pictures in other files: from what a format lists to decoded images."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from loaders.arrays import FileImages, in_memory
from loaders.content import content_hash, digests, file_content
from loaders.holdout import copies_warnings, hold_out_by_content, without_warnings
from loaders.images import decode_image, is_colour
from loaders.listing import SYSTEM
from loaders.packed import Picture, Pictures
from loaders.request import Request
from loaders.splits import Split, Splits, few_images_warnings, hold_out, preprocessing_for
from metadata.errors import UserError, some_of
from metadata.records import DatasetCard, dataset_cards
from metadata.schemas import Preprocessing

LONGEST_NAME = 200  # bytes of a class name, which becomes the name of a folder


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Pictures with their classes, as a format lists them.

    Args:
        classes: the names of the classes, in the order of their indices.
        train: the pictures to train on, and those to hold out of.
        test: the test split; without it `validation` is the test split, and without both it is held out of train.
        validation: the validation split; None holds it out of train.
        where: the file or folder that lists them, for messages.
        warnings: of the listing.
    """

    classes: list[str]
    train: Pictures
    test: Pictures | None = None
    validation: Pictures | None = None
    where: str
    warnings: list[str] = field(default_factory=list)


def collected_splits(request: Request, name: str, found: Collection) -> Splits:
    """Return the splits of a collection; what it has no split for is held out of train by the hash of the content.

    Raises:
        UserError: fewer than two classes, a class without training images, a class that train lacks, names that cannot be
            folders, a fraction out of range, or a damaged image.
    """
    if found.test is None and found.validation is not None:  # as in a folder of splits
        found = replace(found, test=found.validation, validation=None)
    classes = _folder_names(found.classes, found.where)
    warnings = [*found.warnings, *_missing_classes(found, classes)]
    if not 0 < request.test_fraction < 1:
        raise UserError(f"data.test_fraction {request.test_fraction}: expected a fraction of the images, above 0 and "
                        "below 1")
    if not 0 <= request.validation_fraction < 1:
        raise UserError(f"data.validation_fraction {request.validation_fraction}: expected a fraction of the training "
                        "split, at least 0 and below 1")
    train, test, validation = list(found.train), found.test, found.validation
    wants_validation = validation is None and request.validation_fraction > 0
    if test is None or wants_validation:
        hashes = digests(request, classes, train)
        warnings += copies_warnings(train, hashes, classes)
        # The order by content, so that no name of a file decides anything.
        order = sorted(range(len(train)), key=lambda index: (train[index][1], hashes[index]))
        train, hashes = [train[index] for index in order], [hashes[index] for index in order]
        for purpose, fraction, wanted, keep in (
                ("test", request.test_fraction, test is None, 1 + wants_validation),
                (f"validation {request.seed}", request.validation_fraction, wants_validation, 1)):
            if not wanted:
                continue
            split = purpose.partition(" ")[0]
            parts = hold_out_by_content([label for _, label in train], hashes, fraction, purpose, keep)
            warnings += without_warnings(parts.without, split, classes, train)
            held = [train[index] for index in parts.held]
            train, hashes = [train[index] for index in parts.kept], [hashes[index] for index in parts.kept]
            if split == "test":
                test = held
                warnings.append(f"{found.where}: there is no test split: {len(held)} of {len(held) + len(train)} images "
                                f"are held out for it by the hash of their content (data.test_fraction {fraction:g})")
            else:
                validation = held
    assert test is not None, "held out, if not listed"
    splits = file_splits(request, name, dataset_cards()[name]["preprocessing"], classes, train, test,
                         [] if validation is None else validation)
    splits.warnings[:0] = warnings
    return splits


def _folder_names(classes: Sequence[str], where: str) -> list[str]:
    """Return class names that can be the names of folders, in which a test split is written for the evaluator.

    Raises:
        UserError: a name is empty, hidden, too long or no text, or two names differ only in case or spelling.
    """
    names = [name.strip().replace("/", "-") for name in classes]
    for name in names:
        if not name or name.startswith(".") or name.lower() in SYSTEM or any(
                unicodedata.category(sign) in ("Cc", "Cs") for sign in name) or len(os.fsencode(name)) > LONGEST_NAME:
            raise UserError(f"{where}: the class name {name[:40]!r} cannot be the name of a folder: expected printed text "
                            f"of at most {LONGEST_NAME} bytes that does not begin with a dot")
    plain: dict[str, str] = {}
    for given, name in zip(classes, names, strict=True):
        other = plain.setdefault(unicodedata.normalize("NFKC", name).casefold(), given)
        if other != given:
            raise UserError(f"{where}: the class names {other!r} and {given!r} differ in case or spelling alone; spell a "
                            "class in one way")
    return names


def _missing_classes(found: Collection, classes: Sequence[str]) -> list[str]:
    """Return a warning for each split but train that lacks classes.

    Raises:
        UserError: a split is empty, train lacks a class, or there is one class only.
    """
    counts = {split: Counter(label for _, label in files) for split, files in (
        ("train", found.train), ("test", found.test), ("validation", found.validation)) if files is not None}
    for split, count in counts.items():
        if not count:
            raise UserError(f"{found.where}: no images in {split}")
    lacking = [name for label, name in enumerate(classes) if label not in counts["train"]]
    if lacking:
        raise UserError(f"{found.where}: {len(lacking)} of {len(classes)} classes have no training images: "
                        f"{some_of(lacking, 5)}; add images, or leave the class out")
    if len(classes) < 2:
        raise UserError(f"{found.where}: one class only, {some_of(classes)!r}; expected two or more")
    return [f"{found.where}: no {split} images of {len(lacking)} of the {len(classes)} classes: {some_of(lacking, 5)}; add "
            "images, or the accuracy says nothing about them" for split, count in counts.items()
            if (lacking := [name for label, name in enumerate(classes) if label not in count])]


def file_splits(request: Request, name: str, preprocessing: dict[str, Any], classes: list[str], train: Pictures,
                test: Pictures, validation: Pictures | None = None, test_folder: Path | None = None) -> Splits:
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


def _split(files: Pictures, settings: Preprocessing, request: Request) -> Split:
    paths = [path for path, _ in files]
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return Split(in_memory(FileImages(paths, settings, request.workers), request), labels, paths)


def _usable(files: Pictures, settings: Preprocessing, request: Request, warnings: list[str]) -> Pictures:
    """Return the files that decode; raise UserError for a damaged file unless the request skips it."""
    def problem(file: tuple[Picture, int]) -> str | None:
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
