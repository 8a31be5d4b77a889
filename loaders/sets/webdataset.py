"""WebDataset: tars whose members with one name are one sample, such as 000001.jpg and 000001.cls, or 000001.json.

The pictures are read where they lie in the tars; nothing is unpacked.
Source: https://github.com/webdataset/webdataset and its description of the format.
"""

from __future__ import annotations

import glob
import json
import math
import re
import tarfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from loaders.files import Collection, collected_splits
from loaders.labels import numbered, splits_of
from loaders.listing import IMAGE_SUFFIXES, SYSTEM
from loaders.packed import MOST_BYTES, Packed
from loaders.request import Request
from loaders.splits import Splits
from metadata.errors import UserError, first_line, some_of

NAME = "webdataset"
LABEL_SUFFIXES = (".cls", ".json", ".txt")  # the first that is there counts
KEYS = ("label", "cls", "class", "class_name", "category", "target")
MOST_LABEL_BYTES = 2**20
MOST_SHARDS = 100_000
MOST_PADDING = 2**21  # zeros at the end of a tar: its programs fill up 10 kB, or a megabyte
RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


def webdataset(request: Request) -> Splits:
    """Open the tars of a folder, one tar, or those of a pattern such as `shards/{train,test}-{0000..0015}.tar` or `*.tar`.

    Raises:
        UserError: no tar, a tar that is compressed, damaged or cut short, a member that is a link or leads out of the tar,
            a sample without a picture or a label, or a label out of range.
    """
    if request.root is None:
        raise UserError("data.root is not set: webdataset needs tars, as a folder or a pattern; pass "
                        "data.root=DIR/train-{0000..0009}.tar")
    root = request.root
    shards = _shards(root)
    base = root if root.is_dir() else Path(*root.parts[:next(
        (place for place, part in enumerate(root.parts) if any(sign in part for sign in "*?[{")), len(root.parts) - 1)])
    splits: dict[str, list[tuple[Packed, str]]] = {}
    for shard, split in zip(shards, splits_of(shards, base, "tar"), strict=True):
        splits.setdefault(split, []).extend(_samples(shard))
    classes = numbered((label for samples in splits.values() for _, label in samples), str(root))
    index = {name: number for number, name in enumerate(classes)}
    found = {split: [(picture, index[label]) for picture, label in samples] for split, samples in splits.items()}
    return collected_splits(request, NAME, Collection(classes=classes, train=found["train"], test=found.get("test"),
                                                      validation=found.get("validation"), where=str(root)))


def expanded(pattern: str) -> list[str]:
    """Return a pattern with its braces written out: `{000..002}` counts, `{train,test}` lists.

    Raises:
        UserError: more files than a data set has.
    """
    too_many = UserError(f"data.root {pattern}: more than {MOST_SHARDS:,} files")
    if math.prod(match[1].count(",") + 1 for match in CHOICE.finditer(pattern)) > MOST_SHARDS:
        raise too_many
    found, waiting = list[str](), deque([pattern])
    while waiting:
        text = waiting.popleft()
        if match := RANGE.search(text):
            first, last = int(match[1]), int(match[2])
            if not 0 <= last - first < MOST_SHARDS:
                raise UserError(f"data.root {pattern}: {match[0]} counts {last - first + 1} files, expected 1 to "
                                f"{MOST_SHARDS:,}")
            texts = [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
        elif match := CHOICE.search(text):
            texts = match[1].split(",")
        else:
            found.append(text)
            continue
        waiting += [text[:match.start()] + part + text[match.end():] for part in texts]
        if len(waiting) + len(found) > MOST_SHARDS:
            raise too_many
    return found


def _shards(root: Path) -> list[Path]:
    """Return the tars of a folder or a pattern, sorted."""
    if root.is_dir():
        found = _tars(root)
        if not found:
            packed = next((path for path in sorted(root.iterdir()) if path.name.endswith((".tar.gz", ".tgz"))), None)
            raise UserError(f"data.root {root}: expected tars in it, such as train-000000.tar; " + (
                f"unpack {packed.name} with gunzip, which gains nothing on pictures" if packed else "there are none"))
        return found
    if root.is_file():
        return [root]
    found = []
    for text in expanded(str(root)):
        matches = [path for path in (sorted(glob.glob(text)) if glob.has_magic(text) else [text]) if Path(path).is_file()]
        if not matches:
            raise UserError(f"data.root {root}: there is no file {text}")
        found += map(Path, matches)
    return sorted(set(found))


def _tars(folder: Path) -> list[Path]:
    """Return the tars in a folder and those below it, sorted. What is no file, such as a named pipe, is left out."""
    return sorted(path for path in {*folder.glob("*.tar"), *folder.glob("*/*.tar")} if path.is_file())


def _samples(shard: Path) -> Iterator[tuple[Packed, str]]:
    """Yield the pictures of a tar with their labels. Only headers and labels are read."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        length = shard.stat().st_size
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                hidden = name.startswith(".") or name.lower() in SYSTEM  # what macOS packs beside the files
                if not member.isdir() and not (hidden and member.isreg()):
                    key, suffix = _checked(member, shard, length)
                    parts = samples.setdefault(key, {})
                    if suffix in parts:
                        raise UserError(f"{shard}: {member.name[:80]}: the tar has two members of this name")
                    parts[suffix] = member
            _check_end(shard, tar.offset, length)
            for key, parts in samples.items():
                pictures = [suffix for suffix in parts if suffix in IMAGE_SUFFIXES]
                labels = [suffix for suffix in LABEL_SUFFIXES if suffix in parts]
                if not pictures and not labels:
                    continue  # such as a README
                if len(pictures) != 1 or not labels:
                    raise UserError(f"{shard}: {key[:80]}: expected one picture and a label ({', '.join(LABEL_SUFFIXES)}), "
                                    f"got {some_of(sorted(parts), 5)}")
                picture = parts[pictures[0]]
                yield Packed(file=shard, name=picture.name, offset=picture.offset_data, size=picture.size), _label(
                    tar, parts[labels[0]], labels[0], f"{shard}: {parts[labels[0]].name[:80]}")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        advice = "; fetch or pack the tar again" if samples else (
            "; if it is compressed, unpack it with gunzip: compression gains nothing on pictures")
        raise UserError(f"{shard}: not a readable tar: {first_line(error)}{advice}") from error
    if not samples:
        raise UserError(f"{shard}: the tar is empty, or no tar")


def _checked(member: tarfile.TarInfo, shard: Path, length: int) -> tuple[str, str]:
    """Return the name of a member's sample and its last suffix.

    Raises:
        UserError: a link or a device, a path that leads out, a size over the limit, or a member that is cut short.
    """
    where = f"{shard}: {member.name[:80]!r}"
    path = PurePosixPath(member.name)
    if not member.isreg() or member.issparse():
        kind = "link" if member.issym() or member.islnk() else "special file"
        raise UserError(f"{where}: a {kind}, expected files only; pack the tar again with --dereference")
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{where}: a path that leads out of the tar; pack it again with relative paths")
    if member.size > MOST_BYTES:
        raise UserError(f"{where}: {member.size:,} bytes are over the limit of {MOST_BYTES:,}")
    if member.offset_data + member.size > length:
        raise UserError(f"{where}: the tar is cut short: {length:,} bytes, the member ends at "
                        f"{member.offset_data + member.size:,}")
    stem, _, _ = path.name.partition(".")
    return str(path.parent / (stem or path.name)), path.suffix.lower()


def _check_end(shard: Path, end: int, length: int) -> None:
    """Check that nothing but zeros follows the last member; `tarfile` takes any block that is no header for the end.

    Args:
        shard: the tar.
        end: the byte behind its last member.
        length: the bytes of the file.

    Raises:
        UserError: a damaged header, a file that is cut short, or other bytes behind the zeros.
    """
    with shard.open("rb") as file:
        file.seek(end)
        tail = file.read(MOST_PADDING)
    block = tail[:tarfile.BLOCKSIZE]
    if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
        raise UserError(f"damaged or cut short at byte {end:,} of {shard}: expected a member, or zeros at the end, got "
                        f"{'no header' if len(block) == tarfile.BLOCKSIZE else f'{len(block)} bytes'}; fetch or pack the "
                        "tar again")
    if tail.strip(b"\0"):
        after = end + len(tail) - len(tail.lstrip(b"\0"))
        raise UserError(f"damaged or joined at byte {end:,} of {shard}: zeros, which end a tar, and other bytes from byte "
                        f"{after:,} on; tars that were joined with `cat` must be packed again as one")
    if length - end > MOST_PADDING:
        raise UserError(f"damaged or cut short at byte {end:,} of {shard}: {length - end:,} bytes behind the last member, "
                        f"expected at most {MOST_PADDING:,} zeros; fetch or pack the tar again")


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, where: str) -> str:
    if member.size > MOST_LABEL_BYTES:
        raise UserError(f"{where}: a label of {member.size:,} bytes")
    file = tar.extractfile(member)
    assert file is not None, "a regular file"
    try:
        text = file.read().decode("utf-8-sig").strip()
        value: Any = text
        if suffix == ".json":
            content = json.loads(text)
            value = next((content[key] for key in KEYS if key in content), None) if isinstance(content, dict) else content
            value = int(value) if isinstance(value, float) and value.is_integer() else value
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a label: {first_line(error)}") from error
    if type(value) not in (str, int) or not str(value).strip() or "\n" in str(value):
        under = f" under one of {some_of(KEYS, 6)}" if suffix == ".json" else ""
        raise UserError(f"{where}: expected a number or a name{under}, got {str(value)[:60]!r}")
    return str(value).strip()


def _recognize(root: Path) -> str:
    if root.is_dir():
        found = _tars(root)
        return f"{len(found)} tar{'s' * (len(found) > 1)}, such as {found[0].relative_to(root)}" if found else ""
    if root.suffix.lower() != ".tar":
        return ""
    return "a tar" if root.is_file() else "a pattern of tars" if any(sign in str(root) for sign in "*?[{") else ""


SETS = {NAME: webdataset}
RECOGNIZED = {NAME: _recognize}
