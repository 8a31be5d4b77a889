"""Tiny ImageNet as it is distributed: train/<class>/images, val/val_annotations.txt, wnids.txt, words.txt.

Source: Stanford CS231N 2015, http://cs231n.stanford.edu/tiny-imagenet-200.zip. The labels of its `test` were never
published, so `val` is the test split, and validation is held out of train.
"""

from __future__ import annotations

from pathlib import Path

from loaders.listing import ANNOTATIONS
from loaders.request import Request
from loaders.sets.image_folder import folder_splits
from loaders.splits import Splits
from metadata.errors import UserError, first_line, some_of
from metadata.records import dataset_cards

NAME = "tiny_imagenet"
WORDS, WNIDS = "words.txt", "wnids.txt"


def tiny_imagenet(request: Request) -> Splits:
    """Open the set. Its classes are the WordNet ids, in the order of the alphabet, as other readers number them.

    Raises:
        UserError: a missing or damaged file, or classes that are not those of wnids.txt.
    """
    root = request.root
    if root is None:
        raise UserError(f"data.root is not set: {NAME} needs the unpacked folder with train, val and {WNIDS}; pass "
                        "data.root=DIR")
    if not (root / "train").is_dir() or not (root / "val" / ANNOTATIONS).is_file():
        raise UserError(f"data.root {root}: expected {root}/train/<class>/images and {root}/val/{ANNOTATIONS}; pass the "
                        "unpacked folder, or data.name=image_folder for folders of classes")
    stated = {line.strip() for line in _lines(root / WNIDS)} - {""}
    there = {path.name for path in (root / "train").iterdir() if path.is_dir() and not path.name.startswith(".")}
    if stated and stated != there:
        odd = sorted(stated ^ there)
        raise UserError(f"{root / WNIDS}: {len(stated)} classes, {len(there)} folders in {root / 'train'}; not in both: "
                        f"{some_of(odd, 5)}; unpack the set again, or remove {WNIDS}")
    splits = folder_splits(request, NAME, dataset_cards()[NAME]["preprocessing"],
                           folders={"train": root / "train", "test": root / "val"})
    boxes = f"{root / 'train'}: left out: .txt ("  # the bounding boxes of each class
    splits.warnings = [text for text in splits.warnings if not text.startswith(boxes)]
    return splits


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}; unpack the set again") from error


def _recognize(root: Path) -> str:
    """Return what there is, with the words of the first class, if there are words."""
    if not (root / "val" / ANNOTATIONS).is_file():
        return ""
    words = dict(line.split("\t", 1) for line in _lines(root / WORDS) if "\t" in line)
    first = next((line.strip() for line in sorted(_lines(root / WNIDS)) if line.strip() in words), None)
    named = f"; the first class is {first}, {words[first].split(',')[0]}" if first else ""
    return f"val/{ANNOTATIONS} has the classes of the test split{named}"


SETS = {NAME: tiny_imagenet}
RECOGNIZED = {NAME: _recognize}
