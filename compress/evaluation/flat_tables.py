"""Read FlatBuffers, the form of `.tflite` and `.pte` files, with every offset and length checked before it is followed."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from metadata.errors import VerificationError

MAX_ENTRIES_OF_LIST = 100_000  # tables in one list; a large network has a few thousand tensors


class FlatTable:
    """A table of a FlatBuffer. Its fields are known by their numbers in the schema.

    Args:
        path: the file, for messages.
        content: the whole buffer.
        place: where the table begins.

    Raises:
        VerificationError: the table, or a field that is asked for, does not lie inside the buffer.
    """

    def __init__(self, path: Path, content: bytes, place: int) -> None:
        self.path, self.content, self.place = path, content, place
        self.fields = place - self._read("i", place)
        self.size = self._read("H", self.fields)
        if self.size < 4 or self.size % 2:
            raise self._damaged()
        self._check(self.fields, self.size)

    @classmethod
    def root(cls, path: Path, content: bytes, identifier: bytes) -> FlatTable:
        """Return the table that a buffer begins with. Raise VerificationError for a buffer of another kind."""
        if content[4:8] != identifier:
            raise VerificationError(f"{path}: not a file of its format: it does not bear the mark {identifier.decode()!r}")
        return cls(path, content, struct.unpack_from("<I", content)[0])

    def number(self, field: int, kind: str, default: int = 0) -> int:
        """Return a whole number of the type that `struct` calls `kind`."""
        place = self._field(field)
        return self._read(kind, place) if place else default

    def table(self, field: int) -> FlatTable | None:
        """Return a table, or None where the field is not there."""
        place = self._field(field)
        return FlatTable(self.path, self.content, self._target(place)) if place else None

    def tables(self, field: int) -> list[FlatTable]:
        """Return a list of tables, empty where the field is not there."""
        start, count = self._vector(field, 4)
        if count > MAX_ENTRIES_OF_LIST:
            raise VerificationError(f"{self.path}: a list of {count:,} tables, over the limit of {MAX_ENTRIES_OF_LIST:,}")
        return [FlatTable(self.path, self.content, self._target(start + 4 * index)) for index in range(count)]

    def numbers(self, field: int, kind: str) -> np.ndarray:
        """Return a list of numbers of a NumPy type, empty where the field is not there; a view of the buffer."""
        dtype = np.dtype(kind).newbyteorder("<")
        start, count = self._vector(field, dtype.itemsize)
        return np.frombuffer(self.content, dtype, count, start if count else 0)

    def data(self, field: int) -> tuple[int, int]:
        """Return where a list of bytes begins, and its length; zeros where the field is not there."""
        return self._vector(field, 1)

    def text(self, field: int) -> str:
        """Return a text, cut where it is long, empty where the field is not there."""
        start, count = self._vector(field, 1)
        return self.content[start:start + min(count, 200)].decode(errors="replace")

    def _field(self, field: int) -> int:
        """Return where a field lies, 0 where it is not there."""
        slot = 4 + 2 * field
        offset = self._read("H", self.fields + slot) if slot + 2 <= self.size else 0
        return self.place + offset if offset else 0

    def _target(self, place: int) -> int:
        return place + self._read("I", place)

    def _vector(self, field: int, item_bytes: int) -> tuple[int, int]:
        place = self._field(field)
        if not place:
            return 0, 0
        start = self._target(place)
        count = self._read("I", start)
        self._check(start + 4, count * item_bytes)
        return start + 4, count

    def _read(self, kind: str, place: int) -> int:
        self._check(place, struct.calcsize("<" + kind))
        return struct.unpack_from("<" + kind, self.content, place)[0]  # type: ignore[no-any-return]

    def _check(self, place: int, count: int) -> None:
        if not 0 <= place <= len(self.content) - count:
            raise self._damaged()

    def _damaged(self) -> VerificationError:
        return VerificationError(f"{self.path}: damaged or cut short: a place in it lies outside of its "
                                 f"{len(self.content):,} bytes; copy or download it again")
