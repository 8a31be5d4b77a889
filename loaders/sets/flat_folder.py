"""Folders of classes without splits: root/<class>/<image>. A test split is held out by the hash of the images' content."""

from __future__ import annotations

import os
from pathlib import Path

from loaders.files import Collection, collected_splits
from loaders.listing import IMAGE_SUFFIXES, SPLITS, SYSTEM, list_images
from loaders.request import Request
from loaders.sets.image_folder import split_folders
from loaders.splits import Splits
from metadata.errors import UserError, some_of

NAME = "flat_folder"
LOOKED_AT = 1000  # entries of a folder, of which one must be a picture


def flat_folder(request: Request) -> Splits:
    """Open the class folders in a folder. Names and order of the files decide nothing.

    Raises:
        UserError: the folder is missing, a class is empty or the only one, or an image is damaged.
    """
    if request.root is None:
        raise UserError(f"data.root is not set: {NAME} needs a folder with <class>/<image> in it; pass data.root=DIR")
    listing = list_images(request.root)
    found = Collection(classes=listing.classes, train=listing.images, where=str(request.root), warnings=listing.warnings())
    return collected_splits(request, NAME, found)


def _recognize(root: Path) -> str:
    """Return which classes there are, if two folders or more hold pictures, and none could be a split or hold classes."""
    if root.name.lower() in SPLITS and "train" in split_folders(root.parent):
        return ""  # a split itself
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
                         and path.name.lower() not in SYSTEM)
        holding = [path for path in folders if _holds_picture(path)]
        odd = any(path.name.lower() in SPLITS or (path not in holding and any(path.iterdir())) for path in folders)
    except OSError:
        return ""
    if odd or len(holding) < 2:
        return ""
    return f"{len(folders)} folders of pictures are the classes ({some_of([path.name for path in folders], 5)})"


def _holds_picture(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES for entry, _ in zip(entries, range(LOOKED_AT),
                                                                                                  strict=False))


SETS = {NAME: flat_folder}
RECOGNIZED = {NAME: _recognize}
