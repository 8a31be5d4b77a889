"""Data sets for a machine that cannot fetch them: a folder, or an archive in parts that travel one by one.

`find` looks below a folder for a set by its name: as a folder `NAME` (an image folder or torchvision's files), or as an
archive `NAME.tar`, `NAME.tar.xz`, ..., whole or in parts `NAME.tar.xz.part00`, `NAME.tar.xz.part01`, ..., which these shell
commands make of a set's folder:

    tar -C FOLDER -cJf - . | split -b 50MB -d - cifar10.tar.xz.part

`unpacked` unpacks an archive once. Nothing of an archive lands outside its folder, and no network is used.
"""

from __future__ import annotations

import gzip
import io
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from metadata.errors import UserError, first_line
from metadata.locks import appearing

# Of each set: the name of its archive at torchvision's source, and of the folder that it unpacks to.
SETS = {"cifar10": ("cifar-10-python", "cifar-10-batches-py"), "cifar100": ("cifar-100-python", "cifar-100-python")}
LARGEST_BYTES = 20 * 10**9  # of an unpacked set; an archive that holds more is refused


@dataclass(frozen=True)
class FoundSet:
    """Where a data set is: a folder that can be read, or the parts of an archive, in order."""

    folder: Path | None = None
    parts: tuple[Path, ...] = ()


def find(data: Path, name: str) -> FoundSet | None:
    """Return where a set is below `data`, a folder before an archive, or None.

    Raises:
        UserError: a folder of that name holds no set, there are two archives of it, or a part of one is missing.
    """
    for folder in (data / name, data / SETS[name][1]):
        if folder.is_dir():
            return FoundSet(root_of(folder if folder.name == name else data, name))
    archives = {archive: parts for stem in (name, SETS[name][0]) for suffix in ("", ".gz", ".xz", ".bz2")
                if (parts := parts_of(data, archive := f"{stem}.tar{suffix}"))}
    if len(archives) > 1:
        raise UserError(f"{data}: {' and '.join(sorted(archives))} are archives of one set; leave one of them there")
    return FoundSet(parts=archives.popitem()[1]) if archives else None


def parts_of(data: Path, name: str) -> tuple[Path, ...]:
    """Return a file below `data` as its parts in order: itself, or NAME.part00, NAME.part01, ...; () where there is none.

    Raises:
        UserError: a part is missing, or there are a whole file and parts.
    """
    whole = [data / name] if (data / name).is_file() else []
    parts = sorted(path for path in data.glob(f"{name}.part*") if re.fullmatch(r"\d+", path.name.rpartition(".part")[2]))
    numbers = [int(path.name.rpartition(".part")[2]) for path in parts]
    if numbers != list(range(len(parts))) or (whole and parts):
        raise UserError(f"{data / name}: expected the whole file, or its parts .part00, .part01, ... without a gap; got "
                        f"{', '.join(path.name for path in (*whole, *parts))}")
    return (*whole, *parts)


def root_of(folder: Path, name: str) -> Path:
    """Return the folder of a set that lies in `folder` itself, or one folder deeper.

    Raises:
        UserError: there is none.
    """
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    for place in (folder, *inside):
        if (place / "train").is_dir() or (place / SETS[name][1]).is_dir():
            return place
    raise UserError(f"{folder}: expected {name} as an image folder (train/<class>/ and test/<class>/) or as torchvision's "
                    f"files ({SETS[name][1]}/); there is neither")


def unpacked(found: FoundSet, name: str, folder: Path) -> Path:
    """Return the folder of a set that `loaders` reads, after unpacking its archive to `folder` unless that was done.

    Raises:
        UserError: the archive is damaged, cut short or too large, holds a path that leads out of the folder, or no set.
    """
    if found.folder:
        return found.folder
    if not folder.is_dir():
        with appearing(folder) as partial:
            _extract(found.parts, partial)
            root_of(partial, name)  # refuse another archive before the folder appears
    return root_of(folder, name)


def write_joined(parts: tuple[Path, ...], path: Path) -> None:
    """Write the parts of a file as one file, unless it is there; it appears when it is complete."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.part")
        with joined(parts) as stream, partial.open("wb") as file:
            shutil.copyfileobj(stream, file)
        partial.replace(path)


def _extract(parts: tuple[Path, ...], folder: Path) -> None:
    total = 0

    def checked(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        nonlocal total
        total += member.size
        if total > LARGEST_BYTES:
            raise UserError(f"{parts[0]}: the archive holds more than {LARGEST_BYTES:,} bytes")
        return tarfile.data_filter(member, path)

    try:
        with joined(parts) as stream, _decompressed(stream) as plain:
            with tarfile.open(fileobj=plain, mode="r|*", tarinfo=_Member) as archive:
                archive.extractall(folder, filter=checked)
            while plain.read(2**20):  # up to the checksum
                pass
    except tarfile.FilterError as error:
        raise UserError(f"{parts[0]}: the archive is refused: {first_line(error)}") from error
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, KeyError) as error:  # KeyError: a link to nothing
        raise UserError(f"{parts[0]}: damaged, or more parts belong to it than the {len(parts)} that are there "
                        f"({first_line(error)}); copy it again") from error


def _decompressed(stream: io.BufferedReader[_Parts]) -> io.BufferedIOBase:
    """Return a stream, decompressed if it is gzip's: tarfile ignores gzip's checksum, and checks those of xz and bzip2."""
    return gzip.GzipFile(fileobj=stream) if stream.peek(2)[:2] == b"\x1f\x8b" else stream


class _Member(tarfile.TarInfo):
    """A member of an archive that must have an end: tarfile takes one that was cut between two files as whole."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]  # typeshed leaves it out
            raise tarfile.ReadError("its end is not there") from error


class _Parts(io.RawIOBase):
    """Files read one after the other as one."""

    def __init__(self, parts: tuple[Path, ...]) -> None:
        self.rest = list(parts)
        self.file: IO[bytes] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while self.file or self.rest:
            self.file = self.file or self.rest.pop(0).open("rb")
            if content := self.file.read(len(buffer)):
                buffer[:len(content)] = content
                return len(content)
            self.file.close()
            self.file = None
        return 0

    def close(self) -> None:
        if self.file:
            self.file.close()
        super().close()


@contextmanager
def joined(parts: tuple[Path, ...]) -> Iterator[io.BufferedReader[_Parts]]:
    """Open the parts of a file as one stream."""
    with io.BufferedReader(_Parts(parts), 2**20) as stream:
        yield stream
