"""Image folders: root/train/<class>/<image>, with root/test or root/val; with both, root/val is the validation split.

`Training`, `testing`, `valid` and the like are read as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loaders.files import file_splits
from loaders.listing import Listing, SPLITS, list_images
from loaders.packed import Pictures
from loaders.request import Request
from loaders.splits import Splits
from metadata.errors import UserError
from metadata.records import dataset_cards

OWN_NAMES = ("train", "test", "val", "validation", "valid")  # the first that is there counts


def image_folder(request: Request) -> Splits:
    """Open an image folder, with ImageNet preprocessing unless the request changes it."""
    return folder_splits(request, "image_folder", dataset_cards()["image_folder"]["preprocessing"])


def folder_splits(request: Request, name: str, preprocessing: dict[str, Any], numbering: Sequence[str] = (),
                  folders: dict[str, Path] | None = None) -> Splits:
    """Return the splits of root/train and root/test or root/val; hold validation out of train unless both exist.

    Args:
        request: the request of the caller.
        name: the name of the data set.
        preprocessing: the preprocessing of the data set.
        numbering: the class names in the data set's own order, which counts if the folders have these names. Otherwise a
            class has the rank of its name.
        folders: of the splits, if their names do not say it.

    Raises:
        UserError: a missing or empty folder, a class without training images, a class that train lacks, or a damaged image.
    """
    root = request.root
    if root is None:
        raise UserError(f"data.root is not set: {name} needs a folder with train/<class>/<image> and test/ or val/ "
                        "beside it; pass data.root=DIR")
    found_by_name = folders is None
    folders = folders or split_folders(root)
    if "train" not in folders:
        raise UserError(f"data.root {root}: expected {root}/train/<class>/<image>; {_found_instead(root)}")
    test_folder, validation_folder = _test_and_validation(root, folders)
    listing = list_images(folders["train"])
    classes = list(numbering) if set(numbering) == set(listing.classes) else listing.classes
    warnings = [*_spelling_warnings(root, folders), *(_passed_over(root, folders) if found_by_name else []),
                *_check_training_classes(listing), *listing.warnings()]
    train = _numbered(listing, classes)
    test = _numbered(_held_against(listing, test_folder, warnings), classes)
    validation = _numbered(_held_against(listing, validation_folder, warnings), classes) if validation_folder else None
    splits = file_splits(request, name, preprocessing, classes, train, test, validation, test_folder)
    splits.warnings[:0] = warnings
    return splits


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folders of the splits train, test and validation that are in a folder.

    Raises:
        UserError: two folders may be one split.
    """
    found: dict[str, list[Path]] = {}
    try:
        entries = sorted(path for path in root.iterdir() if path.name.lower() in SPLITS and path.is_dir())
    except OSError:
        return {}  # the caller says what is there instead
    for path in entries:
        found.setdefault(SPLITS[path.name.lower()], []).append(path)
    chosen = {}
    for split, paths in found.items():
        own = sorted((path for path in paths if path.name in OWN_NAMES), key=lambda path: OWN_NAMES.index(path.name))
        if not own and len(paths) > 1:
            raise UserError(f"data.root {root}: {paths[0].name} and {paths[1].name} may both be the {split} split; rename "
                            f"one to {'val' if split == 'validation' else split}")
        chosen[split] = (own or paths)[0]
    return chosen


def _passed_over(root: Path, folders: dict[str, Path]) -> list[str]:
    """Return a line on the folders that may be a split, too, beside the one that counts."""
    rest = [path.name for path in sorted(root.iterdir()) if path.name.lower() in SPLITS and path.is_dir()
            and SPLITS[path.name.lower()] in folders and not any(path.samefile(taken) for taken in folders.values())]
    return [f"data.root {root}: left out: {', '.join(rest)}, beside {', '.join(path.name for path in folders.values())}; "
            "put the images together if they belong to one set"] if rest else []


def _spelling_warnings(root: Path, folders: dict[str, Path]) -> list[str]:
    spelled = [f"{path.name} for {split}" for split, path in folders.items() if path.name not in OWN_NAMES]
    return [f"data.root {root}: {', '.join(spelled)}"] if spelled else []


def _test_and_validation(root: Path, folders: dict[str, Path]) -> tuple[Path, Path | None]:
    if "test" in folders:
        return folders["test"], folders.get("validation")
    if "validation" not in folders:
        raise UserError(f"data.root {root}: expected a test split in {root}/test or {root}/val; there is neither")
    return folders["validation"], None  # root/val is the test split; validation is held out of train


def _found_instead(root: Path) -> str:
    """Return what is in place of root/train, and what to do about it."""
    if not root.is_dir():
        return "there is no such folder" if not root.exists() else f"{root} is a file"
    if root.name.lower() in SPLITS and "train" in split_folders(root.parent):
        return f"this is a split itself; pass data.root={root.parent}"
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if arrow := next((path for place in (root, *folders) for path in sorted(place.glob("*.arrow"))), None):
        return f"found {arrow}; write the set of `datasets` as Parquet files (`to_parquet`)"
    for folder in folders:
        if "train" in split_folders(folder):
            return f"found {split_folders(folder)['train']}; pass data.root={folder}"
        if folder.name.lower().startswith("train"):
            return f"found {folder}; rename it to {root}/train"
    try:
        listing = list_images(root)
    except UserError:
        return f"found {', '.join(folder.name for folder in folders[:5]) or 'no folders'}"
    return (f"found {len(listing.classes)} folders with {len(listing.images)} images in it "
            f"({', '.join(listing.classes[:5])}); if these are the classes, pass data.name=flat_folder, or move them into "
            f"{root}/train, and images for testing into {root}/test")


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


def _numbered(listing: Listing, classes: Sequence[str]) -> Pictures:
    """Return the files with the indices of their classes in `classes`."""
    number = {name: index for index, name in enumerate(classes)}
    return [(path, number[listing.classes[label]]) for path, label in listing.images]


def _recognize(root: Path) -> str:
    """Return the folders of splits, if the one to train on has folders of classes."""
    folders = split_folders(root)
    train = folders.get("train")
    has_classes = train is not None and any(path.is_dir() and not path.name.startswith(".") for path in train.iterdir())
    return ", ".join(sorted(path.name for path in folders.values())) if has_classes and len(folders) > 1 else ""


SETS = {"image_folder": image_folder}
RECOGNIZED = {"image_folder": _recognize}
