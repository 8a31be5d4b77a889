"""What a data set holds, as hashes. Other images, labels or another order are other content; places and times are not.

A set is listed as {split: {class: "20 images 5f0c..."}}: the number of images that are used, and a hash of their bytes in
order. A training or a run keeps the list, and compares it when it continues.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence, Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from loaders.packed import Picture, stored_bytes, stored_state
from loaders.request import FileHashes, Request
from metadata.errors import UserError, first_line, some_of
from metadata.files import write_json
from metadata.records import DatasetCard

Content = dict[str, dict[str, str]]
Files = Sequence[tuple[Picture, int]]  # with the index of the class
HASHES = ".hashes.json"  # what `read_hashes` reads, in the folder of a run or a training
READERS = 4  # threads that read files: on a disk of the network most of their time is waiting


def file_content(request: Request, classes: Sequence[str], splits: Mapping[str, Files],
                 used: AbstractSet[Picture]) -> Content:
    """Return the content of image files, class by class. Names of files and folders count only by the order they give.

    A class whose files have the path, size, inode and times that `request.hashes` knows is not read again.

    Args:
        request: takes the progress, and has the hashes of an earlier sitting.
        classes: their names, by index.
        splits: all files of each split, in order.
        used: the files among them that are not left out as unreadable.
    """
    groups: dict[tuple[str, str], list[tuple[Picture, bool]]] = {}
    for split, files in splits.items():
        for path, label in files:
            groups.setdefault((split, classes[label]), []).append((path, path in used))
    total, done = sum(map(len, groups.values())), 0
    found: Content = {split: {} for split in splits}
    with ThreadPoolExecutor(max(READERS, request.workers)) as pool:
        hashed = pool.map(lambda name: _hash_of_files("/".join(name), groups[name], request.hashes), groups)
        for ((split, name), files), text in zip(groups.items(), hashed, strict=True):
            found[split][name] = f"{sum(is_used for _, is_used in files)} images {text}"
            done += len(files)
            if request.on_progress:
                request.on_progress(done, total)
    return found


def _hash_of_files(group: str, files: list[tuple[Picture, bool]], hashes: FileHashes) -> str:
    states = hashlib.sha256()
    for path, is_used in files:
        states.update(f"{path} {is_used} {stored_state(path)}\n".encode(errors="surrogateescape"))
    state = states.hexdigest()[:16]
    if (before := hashes.known.get(group)) is not None and before[0] == state:
        return before[1]
    digest = hashlib.sha256()
    for path, is_used in files:
        try:
            digest.update(hashlib.sha256(stored_bytes(path)).digest())
        except (OSError, UserError):
            digest.update(b"unreadable")
        digest.update(b"used" if is_used else b"left out")
    hashes.known[group] = state, digest.hexdigest()[:16]
    hashes.changed = True
    return hashes.known[group][1]


def digests(request: Request, classes: Sequence[str], files: Files) -> list[str]:
    """Return a hash of each file's bytes, in order; classes that `request.hashes` knows are not read again.

    Raises:
        UserError: a file cannot be read.
    """
    places: dict[int, list[int]] = {}
    for place, (_, label) in enumerate(files):
        places.setdefault(label, []).append(place)
    found, done = [""] * len(files), 0
    with ThreadPoolExecutor(max(READERS, request.workers)) as pool:
        hashed = pool.map(lambda label: _digests(f"/{classes[label]}", [files[place][0] for place in places[label]],
                                                 request.hashes), places)
        for label, texts in zip(places, hashed, strict=True):
            for place, text in zip(places[label], texts, strict=True):
                found[place] = text
            done += len(places[label])
            if request.on_progress:
                request.on_progress(done, len(files))
    return found


def _digests(group: str, pictures: list[Picture], hashes: FileHashes) -> list[str]:
    state = hashlib.sha256("".join(f"{picture} {stored_state(picture)}\n" for picture in pictures).encode(
        errors="surrogateescape")).hexdigest()[:16]
    if (before := hashes.known.get(group)) is not None and before[0] == state:
        return before[1].split()
    found = []
    for picture in pictures:
        try:
            found.append(hashlib.sha256(stored_bytes(picture)).hexdigest()[:24])
        except OSError as error:
            raise UserError(f"{picture}: cannot be read: {first_line(error)}") from error
    hashes.known[group] = state, " ".join(found)
    hashes.changed = True
    return found


def array_content(class_names: Sequence[str], splits: Mapping[str, tuple[Tensor, Tensor]]) -> Content:
    """Return the content of arrays of images, class by class.

    Args:
        class_names: their names, by label.
        splits: (N, C, H, W) uint8 pixels and (N,) int64 labels of each split.
    """
    found: Content = {}
    for split, (pixels, labels) in splits.items():
        found[split] = {}
        for label, name in enumerate(class_names):
            places = (labels == label).nonzero().view(-1)
            digest = hashlib.sha256(places.numpy().data)  # the order of the classes counts too
            digest.update(pixels[places].numpy().data)
            found[split][name] = f"{len(places)} images {digest.hexdigest()[:16]}"
    return found


def content_hash(content: Content) -> str:
    """Return one short hash of a content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode(errors="surrogateescape")).hexdigest()[:16]


def trained_on(card: DatasetCard) -> str:
    """Return a hash of what a training sees: the training and validation images, not those of the test split."""
    return content_hash({split: classes for split, classes in card.content.items() if split != "test"}) if card.content \
        else card.fingerprint


def content_changes(before: Content, now: Content) -> list[str]:
    """Return how a content differs from an earlier one, a text for each split, such as `8 images more in train (alpha)`."""
    found = []
    for split in dict.fromkeys([*before, *now]):
        earlier, later = before.get(split, {}), now.get(split, {})
        changed = [name for name in dict.fromkeys([*earlier, *later]) if earlier.get(name) != later.get(name)]
        if changed:
            more = sum(_count(later.get(name)) - _count(earlier.get(name)) for name in changed)
            what = f"{abs(more)} image{'s' * (abs(more) > 1)} {'more' if more > 0 else 'fewer'}" if more else "other images"
            found.append(f"{what} in {split} ({some_of(changed, 3)})")
    return found


def _count(text: str | None) -> int:
    return int(text.partition(" ")[0]) if text else 0


# --------------------------------------------------------------------------------------------- hashes of an earlier start


def read_hashes(folder: Path) -> FileHashes:
    """Return the hashes that an earlier start left in a folder; none where there are none, or they cannot be read."""
    try:
        content = json.loads((folder / HASHES).read_text())
        return FileHashes({str(group): (str(state), str(text)) for group, (state, text) in content.items()})
    except (OSError, ValueError, TypeError, AttributeError):
        return FileHashes()


def write_hashes(folder: Path, hashes: FileHashes) -> None:
    """Write the hashes into a folder if they are new."""
    if hashes.changed:
        write_json(folder / HASHES, hashes.known)
        hashes.changed = False
