"""The shared libraries that programs and extension modules need, read from their ELF headers; nothing is loaded or run.

The sandbox opens the files of this list one by one: whole library folders may hold other packages and their data.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import struct
from collections.abc import Iterable
from pathlib import Path

CACHE = Path("/etc/ld.so.cache")
CACHE_MAGIC = b"glibc-ld.so.cache1.1"
PLACES = ("/lib64", "/usr/lib64", "/lib", "/usr/lib")
LOAD, DYNAMIC, LOADER = 1, 2, 3  # program headers
NEEDED, STRING_TABLE, RPATH, RUNPATH = 1, 5, 15, 29  # entries of the dynamic section
# What libraries open by name while they run.
BY_NAME = ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libutil.so.1", "libgcc_s.so.1",
           "libstdc++.so.6", "libgomp.so.1")


def needed_libraries(programs: Iterable[str]) -> list[str]:
    """Return the paths of the libraries that programs and libraries need, directly or not, as the loader names them.

    Args:
        programs: ELF files; others are passed over. 64-bit, little-endian.
    """
    cached, found = library_cache(), dict[str, str | None]()
    waiting = [(path, name) for path in programs for name in read_needs(path)]
    waiting += [("", name) for name in BY_NAME]
    while waiting:
        asker, wanted = waiting.pop()
        if wanted.startswith("/"):  # the loader itself, or a folder to search
            place = wanted if os.path.isfile(wanted) else None
        elif wanted in found:
            continue
        else:
            places = [Path(folder, wanted) for folder in search_folders(asker)] if asker else []
            places += [Path(path) for path in cached.get(wanted, ()) if is_elf64(path)]
            places += [Path(folder, wanted) for folder in PLACES]
            place = next((str(path) for path in places if path.is_file()), None)
        if wanted not in found:
            found[wanted] = place
            if place:
                waiting += [(place, name) for name in read_needs(place)]
    return sorted({path for path in found.values() if path})


def library_cache() -> dict[str, list[str]]:
    """Return name -> paths of the libraries in the loader's cache; none where the system has no such cache."""
    try:
        content = CACHE.read_bytes()
    except OSError:
        return {}
    content = content[max(0, content.find(CACHE_MAGIC)):]  # an older format may stand before
    found: dict[str, list[str]] = {}
    if content.startswith(CACHE_MAGIC):
        count, = struct.unpack_from("<I", content, 20)
        for number in range(count):
            _, name, path, _, _ = struct.unpack_from("<iIIIQ", content, 48 + 24 * number)
            key, value = (content[start:content.index(b"\0", start)].decode() for start in (name, path))
            found.setdefault(key, []).append(value)
    return found


def is_elf64(path: str) -> bool:
    """Tell whether a file is a 64-bit little-endian ELF file."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(6) == b"\x7fELF\x02\x01"
    return False


def read_needs(path: str) -> list[str]:
    """Return the names of the libraries that an ELF file needs, and the path of its loader."""
    return [text for kind, text in dynamic_texts(path) if kind in (NEEDED, LOADER)]


def search_folders(path: str) -> list[str]:
    """Return the folders that an ELF file names for the search of its libraries."""
    origin = str(Path(path).resolve().parent)
    return [folder.replace("$ORIGIN", origin).replace("${ORIGIN}", origin) for kind, text in dynamic_texts(path)
            if kind in (RPATH, RUNPATH) for folder in text.split(":") if folder]


@functools.cache
def dynamic_texts(path: str) -> list[tuple[int, str]]:
    """Return (kind, text) of an ELF file's dynamic section and loader; nothing for a file of another kind."""
    found: list[tuple[int, str]] = []
    with contextlib.suppress(OSError, ValueError, struct.error), open(path, "rb") as file, \
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:6] != b"\x7fELF\x02\x01":
            return []
        start, = struct.unpack_from("<Q", content, 32)
        size, count = struct.unpack_from("<HH", content, 54)
        headers = [struct.unpack_from("<IIQQQQ", content, start + size * number) for number in range(count)]
        loads = [(address, offset, length) for kind, _, offset, address, _, length in headers if kind == LOAD]
        entries: list[tuple[int, int]] = []
        for kind, _, offset, _, _, length in headers:
            if kind == LOADER:
                found.append((LOADER, content[offset:offset + length].rstrip(b"\0").decode()))
            elif kind == DYNAMIC:
                entries = list(struct.iter_unpack("<qQ", content[offset:offset + length // 16 * 16]))
        table = next((value for kind, value in entries if kind == STRING_TABLE), -1)
        base = next((offset + table - address for address, offset, length in loads if address <= table < address + length),
                    None)
        for kind, value in entries:
            if base is not None and kind in (NEEDED, RPATH, RUNPATH):
                found.append((kind, content[base + value:content.find(b"\0", base + value)].decode()))
    return found
