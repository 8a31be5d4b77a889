"""List an image folder: which files are images of which class, and what is left out."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from metadata.errors import UserError, first_line

# What Pillow reads and people have. Where a Pillow cannot decode one of them, the image is refused by name, not left out.
IMAGE_SUFFIXES = frozenset({".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
                            ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"})
# What systems and tools leave in folders, in lower case. It is passed over without a word.
SYSTEM = frozenset({"$recycle.bin", ".ds_store", ".git", ".ipynb_checkpoints", "@eadir", "__macosx", "__pycache__",
                    "desktop.ini", "lost+found", "system volume information", "thumbs.db"})
SPLITS = {"test": "test", "testing": "test", "train": "train", "training": "train", "val": "validation",
          "valid": "validation", "validation": "validation"}  # by the name of a folder, in lower case
ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet as it is distributed
TABLES = frozenset({".csv", ".parquet", ".tar", ".tsv"})  # formats of whole data sets
EXPORT = "`python -m compress export_data` writes the test split of a CSV, of tars or of Parquet files as a folder"
MOST_REASONS = 6  # that a warning names one by one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of a folder `<folder>/<class>/<image>`.

    Args:
        folder: the folder of the classes.
        classes: the sorted names of the class folders, also of those without images.
        images: (path, index of the class), by class, then by path.
        left_out: the number of entries that are not listed, by the reason.
        example: the first of these entries.
    """

    folder: Path
    classes: list[str]
    images: list[tuple[Path, int]]
    left_out: dict[str, int]
    example: Path | None

    @property
    def empty(self) -> list[str]:
        """The classes without images, sorted."""
        filled = {label for _, label in self.images}
        return [name for label, name in enumerate(self.classes) if label not in filled]

    def warnings(self) -> list[str]:
        """Return what was left out, in one line or none."""
        if not self.left_out:
            return []
        reasons = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        rest = sum(count for _, count in reasons[MOST_REASONS:])
        counted = [f"{reason} ({count})" for reason, count in reasons[:MOST_REASONS]]
        return [f"{self.folder}: left out: {', '.join(counted + [f'others ({rest})'] * bool(rest))}; the first is "
                f"{self.example}"]


def list_images(folder: str | Path) -> Listing:
    """List an image folder, `<folder>/<class>/<image>`. Images may lie deeper in a class folder, and links are followed.

    A folder with Tiny ImageNet's list of images and classes is read by that list.

    Within a class, a folder that links reach twice is listed once, and a link to a folder above is left out. Hidden entries
    and files of other kinds are left out and counted.

    Raises:
        UserError: the folder is missing or cannot be read, or has no class folders or no images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        there = "is a file; " + EXPORT if folder.is_file() else "there is no such data folder"
        raise UserError(f"{folder}: {there}; expected {folder}/<class>/<image>")
    if (folder / ANNOTATIONS).is_file():
        return _annotated(folder)
    walk = _Walk(folder)
    entries = walk.entries(folder)
    classes = [entry.name for entry in entries if _holds(entry.is_dir)]
    for entry in entries:
        if entry.name not in classes:
            suffix = _suffix(entry.name)
            walk.leave_out(entry, "image outside a class folder" if suffix in IMAGE_SUFFIXES else suffix or "no suffix")
    if not classes:
        loose = walk.left_out["image outside a class folder"]
        found = f", {loose} images directly in it" if loose else ""
        raise UserError(f"{folder}: no class folders in it{found}; expected {folder}/<class>/<image>"
                        + (f"; {EXPORT}" if TABLES & walk.left_out.keys() else ""))
    if SPLITS.keys() >= {name.lower() for name in classes}:
        raise UserError(f"{folder}: its folders are splits ({', '.join(classes)}), expected classes; pass one of them, "
                        f"such as {folder / classes[0]}")
    images: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        images += [(path, label) for path in walk.images(folder / name, set(walk.above))]
    listing = Listing(folder=folder, classes=classes, images=images, left_out=dict(walk.left_out), example=walk.example)
    if not images:
        raise UserError("; ".join([f"{folder}: {len(classes)} class folders, and no images in them",
                                   *listing.warnings(), *[EXPORT] * bool(TABLES & walk.left_out.keys())]))
    return listing


def _annotated(folder: Path) -> Listing:
    """List the validation images of Tiny ImageNet: `<image> TAB <class> TAB ...` in a file, the images in `images`.

    Raises:
        UserError: the list is damaged, or names an image that is not there.
    """
    path, found = folder / ANNOTATIONS, dict[str, str]()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
    for number, line in enumerate(lines, start=1):
        name, *rest = line.split("\t")
        if not rest or not rest[0].isalnum() or Path(name).name != name or name in found:
            raise UserError(f"{path}:{number}: expected the name of one image, once, a tab and its class, got "
                            f"{line[:60]!r}")
        found[name] = rest[0]
    missing = [name for name in found if not (folder / "images" / name).is_file()]
    if missing or not found:
        raise UserError(f"{path}: {len(missing)} of {len(found)} images are not in {folder / 'images'}: "
                        f"{', '.join(missing[:5])}; unpack the set again")
    classes = sorted(set(found.values()))
    number_of = {name: number for number, name in enumerate(classes)}
    images = sorted(((folder / "images" / name, number_of[wnid]) for name, wnid in found.items()),
                    key=lambda image: (image[1], image[0]))
    return Listing(folder=folder, classes=classes, images=images, left_out={}, example=None)


class _Walk:
    """A walk through one image folder, in sorted order, that counts what it leaves out.

    Attributes:
        above: the real paths of the folder and of all folders above it.
    """

    def __init__(self, folder: Path) -> None:
        self.left_out: Counter[str] = Counter()
        self.example: Path | None = None
        self.above = frozenset({folder.resolve(), *folder.resolve().parents})

    def entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """Return the entries of a folder by name, without hidden ones and those of the system."""
        try:
            with os.scandir(folder) as found:
                entries = [entry for entry in found if entry.name.lower() not in SYSTEM]
        except OSError as error:
            raise UserError(f"{folder}: the folder cannot be read: {first_line(error)}") from error
        entries.sort(key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.startswith("."):
                self.leave_out(entry, "hidden")
        return [entry for entry in entries if not entry.name.startswith(".")]

    def images(self, folder: Path, seen: set[Path]) -> Iterator[Path]:
        """Yield the images below a folder, sorted, and add its real path and those below it to `seen`."""
        seen.add(folder.resolve())
        for entry in self.entries(folder):
            suffix = _suffix(entry.name)
            if _holds(entry.is_dir):
                real = Path(entry.path).resolve()
                if real in seen:
                    self.leave_out(entry, "link to a folder above" if real in self.above else "folder listed already")
                else:
                    yield from self.images(Path(entry.path), seen)
            elif not _holds(entry.is_file):
                self.leave_out(entry, "broken link" if entry.is_symlink() else "special file")
            elif suffix in IMAGE_SUFFIXES:
                yield Path(entry.path)
            else:
                self.leave_out(entry, suffix or "no suffix")

    def leave_out(self, entry: os.DirEntry[str], reason: str) -> None:
        """Count an entry that is not listed."""
        self.left_out[reason] += 1
        self.example = self.example or Path(entry.path)


def _holds(check: Callable[[], bool]) -> bool:
    """Return the answer of a `DirEntry`; no for a link that leads to itself."""
    try:
        return check()
    except OSError:
        return False


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
