"""Check the archives that `torch.save` writes (zip files): no two readers may find different things in one file."""

from __future__ import annotations

import dataclasses
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from metadata.errors import VerificationError, first_line

# What Python's zipfile raises for an archive that is damaged, encrypted, or compressed in an unknown way.
UNREADABLE_ARCHIVE = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, OSError, EOFError, ValueError,
                      LookupError)
MAX_MEMBERS = 100_000
MAX_DIRECTORY_BYTES = 2**25
# The records of the format, https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, without the names behind them.
END = struct.Struct("<4sHHHHIIH")
LOCATOR = struct.Struct("<4sIQI")
END_64 = struct.Struct("<4sQHHIIQQQQ")
ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
LOCAL = struct.Struct("<4sHHHHHIIIHH")
DESCRIPTORS = {16: struct.Struct("<4sIII"), 24: struct.Struct("<4sIQQ")}
FULL, FULL_64 = 2**16 - 1, 2**32 - 1  # what a field holds whose value lies in a record of 64 bits
BEHIND, UTF8 = 8, 2048  # flags: crc and sizes lie behind the member; the name is UTF-8


class _OddArchiveError(Exception):
    """Two readers could read an archive differently, or none at all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """What the directory at the end says of a member of an archive. `start` is where its own header begins."""

    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    start: int


def is_archive(path: Path) -> bool:
    """Return whether a file begins as an archive, or any reader would take its end for that of one."""
    with path.open("rb") as file:
        begins = file.read(4) == b"PK\x03\x04"
    return begins or _ends_as_archive(path)


def _ends_as_archive(path: Path) -> bool:
    """Return whether zipfile sees an end record, be it one that it refuses, such as that of one part of several."""
    try:
        return zipfile.is_zipfile(path)
    except UNREADABLE_ARCHIVE:
        return True


def check_archive(path: Path) -> None:
    """Refuse an archive that is cut short or damaged, or that two readers could read differently.

    There is one record at the very end, before it the directory, before that one member after another from the first byte
    on; each member's own header says what the directory says of it; no name occurs twice. All that torch writes is like
    that. Files that are no archives, such as those of torch before 1.6, pass.

    Raises:
        VerificationError: the archive is cut short, damaged, encrypted or ambiguous.
    """
    if not is_archive(path):
        return
    if not _ends_as_archive(path):
        raise VerificationError(f"{path}: the file is cut short: its end is missing; copy or download it again")
    try:
        with path.open("rb") as file:
            archive_members(file)
    except (_OddArchiveError, *UNREADABLE_ARCHIVE) as error:
        raise VerificationError(f"{path}: a damaged or encrypted archive, or one that torch did not write: "
                                f"{first_line(error)}; copy or download it again") from error


def archive_members(file: BinaryIO) -> list[Member]:
    """Return the members of an archive in the order of the file, after checking that there is one way to read them."""
    directory, count, ends = _directory(file)
    if not count:
        raise _OddArchiveError("it has no members")
    members = sorted(_directory_entries(directory, count), key=lambda member: member.start)
    # torch finds names without regard to case
    names = [member.name.lower() for member in members]
    if len(set(names)) < count:
        raise _OddArchiveError("a name occurs twice")
    position = 0
    for member, following in zip(members, [*(other.start for other in members[1:]), ends], strict=True):
        if member.start != position:
            raise _OddArchiveError(f"bytes {position:,} to {member.start:,} belong to no member")
        _check_member(file, member, following)
        position = following
    if position != ends:
        raise _OddArchiveError("bytes before the directory belong to no member")
    return members


def _directory(file: BinaryIO) -> tuple[bytes, int, int]:
    """Return the directory, the number of its entries, and the place in the file where it begins."""
    total = file.seek(0, os.SEEK_END)
    at = total - END.size
    magic, disk, first, here, count, size, start, comment = _unpack(file, END, at)
    if magic != b"PK\x05\x06" or comment:
        raise _OddArchiveError("the end record is not at the very end")
    numbers: tuple[int, ...] = (disk, first, here, count, size, start)
    wide = False
    if at >= LOCATOR.size and (locator := _unpack(file, LOCATOR, at - LOCATOR.size))[0] == b"PK\x06\x07":
        at -= LOCATOR.size + END_64.size
        magic, length, _, _, *numbers_64 = _unpack(file, END_64, at)
        if magic != b"PK\x06\x06" or locator[1:] != (0, at, 1) or length != END_64.size - 12:
            raise _OddArchiveError("the records at its end contradict each other")
        for narrow, value, full in zip(numbers, numbers_64, (FULL,) * 4 + (FULL_64,) * 2, strict=True):
            if narrow not in (value, full):
                raise _OddArchiveError("the records at its end contradict each other")
        numbers, wide = tuple(numbers_64), True
    disk, first, here, count, size, start = numbers
    if disk or first or here != count or (not wide and (count == FULL or FULL_64 in (size, start))):
        raise _OddArchiveError("it is one part of several, or lacks a record")
    if count > MAX_MEMBERS or size > MAX_DIRECTORY_BYTES:
        raise _OddArchiveError(f"{count:,} members are over the limit of {MAX_MEMBERS:,}")
    if start + size != at:
        raise _OddArchiveError("its directory is not where the end record says")
    file.seek(start)
    return file.read(size), count, start


def _directory_entries(directory: bytes, count: int) -> Iterator[Member]:
    """Yield what a directory says of the members."""
    at = 0
    for _ in range(count):
        (magic, _, _, flags, method, _, _, crc, packed, size, named, extra, comment, disk, _, _,
         start) = ENTRY.unpack_from(directory, at)
        at += ENTRY.size
        name, more = directory[at:at + named], directory[at + named:at + named + extra]
        at += named + extra
        if magic != b"PK\x01\x02" or comment or disk or at > len(directory):
            raise _OddArchiveError("its directory is damaged")
        size, packed, start = _widened([size, packed, start], more)
        if not name or b"\0" in name or b"\\" in name or flags & ~(BEHIND | UTF8):
            raise _OddArchiveError(f"member {name[:60]!r} is encrypted, or has an odd name")
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or (method == zipfile.ZIP_STORED and size != packed):
            raise _OddArchiveError(f"member {name[:60]!r} is stored in an unknown way")
        yield Member(name=name, flags=flags, method=method, crc=crc, packed=packed, size=size, start=start)
    if at != len(directory):
        raise _OddArchiveError("its directory is longer than its entries")


def _widened(values: list[int], extra: bytes) -> list[int]:
    """Return the sizes and places of a header, those that do not fit taken from its record of 64 bits."""
    wide, at = b"", 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            if wide or length % 8 or not length:
                raise _OddArchiveError("a header has two records of its sizes")
            wide = extra[at + 4:at + 4 + length]
        at += 4 + length
    numbers = iter(struct.unpack(f"<{len(wide) // 8}Q", wide[:len(wide) // 8 * 8]))
    return [next(numbers, value) if value == FULL_64 else value for value in values]


def _check_member(file: BinaryIO, member: Member, following: int) -> None:
    """Check a member's own header, and what follows its bytes up to the next member or the directory."""
    shown = member.name[:60]
    magic, _, flags, method, _, _, crc, packed, size, named, extra = _unpack(file, LOCAL, member.start)
    name, more = file.read(named), file.read(extra)
    size, packed = _widened([size, packed], more)
    if (magic, flags, method, name) != (b"PK\x03\x04", member.flags, member.method, member.name):
        raise _OddArchiveError(f"the header of member {shown!r} is not what the directory says")
    stated: tuple[int, ...] = (crc, packed, size)
    after = following - (member.start + LOCAL.size + named + extra + member.packed)
    if flags & BEHIND and stated in ((0, 0, 0), (0, FULL_64, FULL_64)):
        if after not in DESCRIPTORS:
            raise _OddArchiveError(f"member {shown!r} is not as long as the directory says")
        magic, *behind = _unpack(file, DESCRIPTORS[after], following - after)
        stated, after = tuple(behind), 0
        if magic != b"PK\x07\x08":
            raise _OddArchiveError(f"member {shown!r} is not as long as the directory says")
    elif flags & BEHIND and after in DESCRIPTORS:
        after = 0
    if after or stated != (member.crc, member.packed, member.size):
        raise _OddArchiveError(f"the header of member {shown!r} is not what the directory says")


def _unpack(file: BinaryIO, record: struct.Struct, at: int) -> tuple[Any, ...]:
    """Return the fields of a record at a place in the file. Raise struct.error where the file ends before."""
    file.seek(max(at, 0))
    return record.unpack(file.read(record.size) if at >= 0 else b"")
