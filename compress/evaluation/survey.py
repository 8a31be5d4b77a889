"""Survey a submission's folder: the names, kinds and sizes of all that lies in it, before any file of it is opened."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import posixpath
import stat
from pathlib import Path

from metadata.errors import UserError, VerificationError
from metadata.files import inside, sha256

MAX_ENTRIES = 10_000  # files and folders; the toolkit's own package has eight
MAX_DEPTH = 32  # folders inside one another
MAX_FILE_BYTES = 2**32
MAX_TOTAL_BYTES = 2**32  # of all files; holes in sparse files count, because whoever reads the file reads them


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundFile:
    """A file of a submission: its path and bytes, its device and inode (which other names of it share), and its stamp."""

    path: Path
    size: int
    identity: tuple[int, int]
    stamp: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """What a submission's folder holds.

    Args:
        folder: the submission.
        files: plain files and links to such, by the name relative to the folder; sorted.
        name_bytes: the bytes of the names of all files and folders, and of the places that links name.
        stamp: a hash over the kernel's account of every entry: device, inode, size, and the times of its last changes. No
            program can set the time of the last change of an inode, so that an equal stamp later means that nothing was
            written, renamed or replaced in between.
    """

    folder: Path
    files: dict[str, FoundFile]
    name_bytes: int
    stamp: str
    _known: dict[tuple[int, int], str] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def total_bytes(self) -> int:
        """The bytes of all files."""
        return sum(file.size for file in self.files.values())

    def paths(self) -> list[Path]:
        """Return the path of every file."""
        return [file.path for file in self.files.values()]

    def find(self, name: str, named_by: str) -> FoundFile:
        """Return the file that a submission names.

        Args:
            name: relative to the folder.
            named_by: the file that holds the name, for the message.

        Raises:
            VerificationError: the name has another spelling that is shorter, or no file has it.
        """
        plain = posixpath.normpath(name)
        if name in self.files:
            return self.files[name]
        path = inside(self.folder, name)
        if name != plain:
            raise VerificationError(f"{self.folder}: {named_by} names {shortened(name)}; write {shortened(plain)}, the "
                                    "plain name of that file")
        behind = next((above for above in path.parents if above != self.folder and above.is_symlink()), None)
        if behind:
            raise VerificationError(f"{path}: {named_by} names this file, which lies behind the link {behind.name}; name "
                                    "the file itself")
        raise VerificationError(f"{path}: {named_by} lists this file, but it is not there")

    def hash_of(self, name: str) -> str:
        """Return the SHA-256 of a file; a file with several names is read once.

        Raises:
            VerificationError: the file cannot be read.
        """
        file = self.files[name]
        if file.identity not in self._known:
            try:
                self._known[file.identity] = sha256(file.path)
            except OSError as error:
                raise VerificationError(f"{file.path}: cannot be read: {error.strerror}") from error
        return self._known[file.identity]

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of every file, by its name. Raise VerificationError for a file that cannot be read."""
        return {name: self.hash_of(name) for name in self.files}


def survey_folder(folder: str | Path) -> Survey:
    """Look at the names, kinds and sizes of everything in a submission's folder. Open no file.

    Raises:
        UserError: there is no such folder, or it cannot be read.
        VerificationError: a link leaves the folder or leads nowhere, an entry is neither a file nor a folder, a folder
            below cannot be read, or there are too many entries, levels or bytes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--submission_dir {folder}: there is no such folder")
    found: dict[str, FoundFile] = {}
    stamps = {"": _stamp(os.stat(folder))}
    entries = name_bytes = total = 0
    waiting = [("", 1)]  # folders that are not looked at yet, by their names in the submission, and their depth
    while waiting:
        above, depth = waiting.pop()
        for entry in _entries(folder, above):
            entries += 1
            if entries > MAX_ENTRIES:
                raise VerificationError(f"{folder}: over {MAX_ENTRIES:,} files and folders, the limit for a submission")
            name = f"{above}/{entry.name}" if above else entry.name
            name_bytes += len(os.fsencode(entry.name))
            stamps[name] = _stamp(os.lstat(entry.path))
            if entry.is_dir(follow_symlinks=False):
                if depth == MAX_DEPTH:
                    raise VerificationError(f"{folder}: folders lie over {MAX_DEPTH} levels deep: {shortened(name)}")
                waiting.append((name, depth + 1))
                continue
            file = _found(folder, name, entry)
            if entry.is_symlink():
                name_bytes += len(os.fsencode(os.readlink(entry.path)))
            if file is None:
                continue
            stamps[f"{name}\0"] = file.stamp
            total += file.size
            if total > MAX_TOTAL_BYTES:
                raise VerificationError(f"{file.path}: {file.size:,} bytes, {total:,} with the files before, are over the "
                                        f"limit of {MAX_TOTAL_BYTES:,} for a submission")
            found[name] = file
    in_order = sorted(found, key=lambda name: name.split("/"))
    return Survey(folder=folder, files={name: found[name] for name in in_order}, name_bytes=name_bytes,
                  stamp=hashlib.sha256(repr(sorted(stamps.items())).encode(errors="surrogateescape")).hexdigest())


def _stamp(state: os.stat_result) -> str:
    """Return what tells a changed file, folder or link from an unchanged one."""
    return f"{state.st_dev} {state.st_ino} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"


def _entries(folder: Path, name: str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder of a submission, in any order, and not many more than a submission may have."""
    path = folder / name
    try:
        with os.scandir(path) as entries:
            return list(itertools.islice(entries, MAX_ENTRIES + 1))
    except OSError as error:
        kind = VerificationError if name else UserError
        raise kind(f"{path if len(name) < 200 else folder}: this folder cannot be read: {error.strerror}") from error


def _found(folder: Path, name: str, entry: os.DirEntry[str]) -> FoundFile | None:
    """Return a file or the file behind a link; None for a link to a folder, whose files are found under their own names.

    Raises:
        VerificationError: a link that leaves the folder or leads nowhere, or neither a file nor a folder.
    """
    path = folder / name
    if entry.is_symlink():
        inside(folder, name)
    try:
        state = entry.stat()
    except OSError as error:
        raise VerificationError(f"{path}: a link that leads nowhere, or a file that cannot be looked at: "
                                f"{error.strerror}") from error
    if stat.S_ISDIR(state.st_mode):
        return None
    if not stat.S_ISREG(state.st_mode):
        raise VerificationError(f"{path}: not a plain file: this is neither a file nor a folder")
    if state.st_size > MAX_FILE_BYTES:
        raise VerificationError(f"{path}: {state.st_size:,} bytes are over the limit of {MAX_FILE_BYTES:,}")
    return FoundFile(path=path, size=state.st_size, identity=(state.st_dev, state.st_ino), stamp=_stamp(state))


def shortened(name: str) -> str:
    """Return a name in quotation marks, cut in its middle where it is long."""
    return repr(name if len(name) <= 80 else f"{name[:40]}...{name[-30:]}")
