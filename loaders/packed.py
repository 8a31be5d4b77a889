"""Pictures inside other files: the members of a tar, and rows of tables, which are cut out into a temporary file."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from metadata.errors import UserError, first_line

MOST_BYTES = 2**28  # of one picture as it is stored
# Suffixes by the format that Pillow names. Pictures of other formats keep the suffix of their name.
SUFFIXES = {"AVIF": ".avif", "BMP": ".bmp", "GIF": ".gif", "JPEG": ".jpg", "JPEG2000": ".jp2", "MPO": ".jpg", "PNG": ".png",
            "PPM": ".ppm", "TIFF": ".tif", "WEBP": ".webp"}


class Spool:
    """A temporary file without a name, which vanishes with the last process that reads it, however that process ends.

    It holds pictures as they are stored, not decoded, one after the other, and at most twice what their files state (and
    `MOST_BYTES` more): a file of some hundred bytes can state little and hold a disk full of pictures.
    """

    def __init__(self, needed: int) -> None:
        """Open the file. Raise UserError if the disk has no room for `needed` bytes."""
        where = tempfile.gettempdir()
        if needed > (free := shutil.disk_usage(where).free) - 2**26:
            raise UserError(f"{where}: the pictures take {needed:,} bytes, and {free:,} are free; set TMPDIR to a folder "
                            "of a larger disk")
        with tempfile.TemporaryFile() as file:
            self.descriptor = os.dup(file.fileno())
        self.length, self.limit = 0, 2 * needed + MOST_BYTES

    def add(self, content: bytes) -> int:
        """Append a picture and return its place. Raise UserError if the pictures exceed the limit, or the disk is full."""
        place = self.length
        if place + len(content) > self.limit:
            raise UserError(f"the pictures take over {self.limit:,} bytes, far more than their files state; write the set "
                            "again, without compression")
        try:
            written = 0
            while written < len(content):
                written += os.write(self.descriptor, memoryview(content)[written:])
        except OSError as error:
            raise UserError(f"{tempfile.gettempdir()}: {first_line(error)}; set TMPDIR to a folder of a larger "
                            "disk") from error
        self.length += len(content)
        return place

    def read(self, place: int, size: int) -> bytes:
        return os.pread(self.descriptor, size, place)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # not where the disk had no room
            os.close(self.descriptor)

    def __reduce__(self) -> Any:  # for the processes of a DataLoader that are not forked
        return _reopened, (reduction.DupFd(self.descriptor), self.length, self.limit)


def _reopened(descriptor: Any, length: int, limit: int) -> Spool:
    spool = Spool.__new__(Spool)
    spool.descriptor, spool.length, spool.limit = descriptor.detach(), length, limit
    return spool


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A picture inside another file. It answers what loaders ask of a path: its text, its suffix, the file above it.

    Args:
        file: the file that the user has, for messages and to notice a change.
        name: of the picture in that file.
        offset: its first byte.
        size: its bytes.
        spool: where the bytes are; None: in `file`.
    """

    file: Path
    name: str
    offset: int
    size: int
    spool: Spool | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"

    @property
    def parent(self) -> Path:
        return self.file

    def read(self) -> bytes:
        """Return the picture's bytes. Raise UserError if the file was cut short since it was listed."""
        if self.spool:
            content = self.spool.read(self.offset, self.size)
        else:
            try:
                with self.file.open("rb", buffering=0) as file:
                    file.seek(self.offset)
                    content = file.read(self.size)
            except OSError as error:
                raise UserError(f"{self}: cannot be read: {first_line(error)}") from error
        if len(content) != self.size:
            raise UserError(f"{self}: {self.size:,} bytes expected, {len(content):,} found; the file was changed, or cut "
                            "short")
        return content

    def open(self) -> io.BytesIO:
        """Return the picture's bytes as a file."""
        return io.BytesIO(self.read())

    @property
    def suffix(self) -> str:
        """Return the suffix that the picture's own bytes call for, or that of its name."""
        from PIL import Image
        try:
            with Image.open(self.open()) as image:
                return SUFFIXES.get(image.format or "", os.path.splitext(self.name)[1].lower())
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return os.path.splitext(self.name)[1].lower()


Picture = Path | Packed
Pictures = Sequence[tuple[Picture, int]]  # with the index of the class


def stored_bytes(picture: Picture) -> bytes:
    """Return a picture's bytes as they are stored. Raise OSError or UserError if they cannot be read."""
    return picture.read() if isinstance(picture, Packed) else picture.read_bytes()


def stored_state(picture: Picture) -> str:
    """Return what changes with a picture's bytes. The time of the last change cannot be set, as that of writing can."""
    inside = f" {picture.name} {picture.offset} {picture.size}" if isinstance(picture, Packed) else ""
    try:
        stat = os.stat(picture.file if isinstance(picture, Packed) else picture)
    except OSError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}{inside}"
