"""Zip archives that two readers read differently."""

from __future__ import annotations

import io
import struct
import zipfile


def rewritten(content: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive of Python's with the same members."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return written.getvalue()


def end_record(archive: bytes) -> tuple[int, int]:
    """Return the size and the offset of an archive's central directory, by its end record."""
    return struct.unpack("<II", archive[-10:-2])  # type: ignore[return-value]


def entries_of(directory: bytes) -> list[bytes]:
    """Cut a central directory into its entries."""
    entries, at = [], 0
    while at < len(directory):
        length = 46 + sum(struct.unpack("<HHH", directory[at + 28:at + 34]))
        entries.append(directory[at:at + length])
        at += length
    return entries


def two_directories(content: bytes) -> bytes:
    """Return a deflated archive in which Python's zipfile sees stored members.

    Zipfile reads the directory that ends where the end record begins, torch the one at the stated offset.
    """
    archive = rewritten(content, zipfile.ZIP_DEFLATED)
    size, offset = end_record(archive)
    directory = archive[offset:offset + size]
    stored = b"".join(entry[:10] + b"\0\0" + entry[12:] for entry in entries_of(directory))
    return archive[:offset] + directory + stored + archive[-22:]


def end_record_in_the_comment(content: bytes) -> bytes:
    """Return an archive whose comment is another archive's end: two end records, and two readers may take one each."""
    archive, other = bytearray(rewritten(content, zipfile.ZIP_DEFLATED)), content[-22:]
    archive[-2:] = struct.pack("<H", len(other))
    return bytes(archive) + other


def local_headers_that_disagree(content: bytes) -> bytes:
    """Return a deflated archive whose central directory calls the members stored."""
    archive = rewritten(content, zipfile.ZIP_DEFLATED)
    size, offset = end_record(archive)
    entries = entries_of(archive[offset:offset + size])
    return archive[:offset] + b"".join(entry[:10] + b"\0\0" + entry[12:] for entry in entries) + archive[-22:]


def member_twice(content: bytes) -> bytes:
    """Return an archive that holds its largest member twice, first as zeros: two readers may take one each."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as new:
        largest = max(old.infolist(), key=lambda item: item.file_size).filename
        stand_in = largest[:-1] + "\1"  # of the same length: zipfile warns of a name that is written twice
        new.writestr(stand_in, bytes(old.getinfo(largest).file_size))
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return written.getvalue().replace(stand_in.encode(), largest.encode())


def behind_other_bytes(content: bytes) -> bytes:
    """Return an archive behind bytes that are none of its members."""
    return b"\x7fELF" + bytes(4092) + content
