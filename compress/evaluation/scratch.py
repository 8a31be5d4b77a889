"""The one folder that foreign code may write to, in memory or on disk, and the watch on what the folder holds."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from compress.evaluation.walls import SCRATCH, bounds_memory
from metadata.machine import stat_fields

MAX_SCRATCH_BYTES = 2**28
MAX_SCRATCH_ENTRIES = 10_000
MAX_FILE_BYTES = 2**24  # RLIMIT_FSIZE, see child.py
PAGE = 4096
FOLDERS = "foreign-code-"  # how the names of temporary folders begin
ON_DISK = ", scratch folder on disk: bubblewrap before 0.7"


class MemoryScratch:
    """A tmpfs that only the process inside bubblewrap sees. It vanishes with that process, whatever ends the evaluator.

    Unlinked files and reserved bytes count there, as the kernel refuses what is over the size.

    Args:
        sizes: bytes of each file of the submission, which do not count as written by the code.
    """

    def __init__(self, sizes: list[int]) -> None:
        self.inside, self.state = SCRATCH, ""
        self.bytes = sum(-(-size // PAGE) * PAGE for size in sizes) + MAX_SCRATCH_BYTES
        self.at_first: int | None = None

    def begin(self, process: int) -> None:
        """Take what lies in the folder now as not written by the code."""
        self.at_first = self._entries(process)

    def mount(self) -> list[str]:
        """Return bubblewrap's arguments that make the folder."""
        return ["--size", str(self.bytes), "--tmpfs", SCRATCH]

    def _entries(self, process: int) -> int | None:
        with contextlib.suppress(OSError):  # the process has ended
            state = os.statvfs(f"/proc/{process}/root{SCRATCH}")
            return state.f_files - state.f_ffree
        return None

    def excess(self, process: int) -> str:
        """Return what the code has done beyond its limits, in words that follow "the code"; or an empty text."""
        used = self._entries(process)
        if used is None or self.at_first is None or used - self.at_first <= MAX_SCRATCH_ENTRIES:
            return ""
        return f"made more than {MAX_SCRATCH_ENTRIES:,} files in its folder"

    def close(self) -> None:
        """There is nothing to remove."""


class DiskScratch:
    """A temporary folder on the disk. The code is ended when the folder holds too much, a moment later.

    The folder is locked while its evaluator lives. What an evaluator that was killed has left is removed by the next one.

    Args:
        walled: the folder is bound into bubblewrap.
    """

    def __init__(self, walled: bool) -> None:
        remove_stale()
        folder = tempfile.mkdtemp(prefix=f".{FOLDERS}")
        self._lock = os.open(folder, os.O_RDONLY)
        lock_folder(self._lock)
        self.outside = os.path.join(os.path.dirname(folder), os.path.basename(folder).removeprefix("."))
        os.rename(folder, self.outside)  # only now do others look for the lock
        self.inside, self.state = (SCRATCH, ON_DISK) if walled else (self.outside, "")
        self.at_first: tuple[int, int] | None = None

    def mount(self) -> list[str]:
        """Return bubblewrap's arguments that bind the folder."""
        return ["--bind", self.outside, SCRATCH]

    def begin(self, process: int) -> None:
        """Take what lies in the folder now as not written by the code."""
        self.at_first = folder_size(Path(self.outside))

    def excess(self, process: int) -> str:
        """Return what the code has done beyond its limits, in words that follow "the code"; or an empty text."""
        if self.at_first is None:
            return ""
        first = self.at_first
        size, entries = folder_size(Path(self.outside), first[1] + MAX_SCRATCH_ENTRIES)
        if size + held_bytes(process, self.inside) - first[0] > MAX_SCRATCH_BYTES:
            return f"wrote more than {MAX_SCRATCH_BYTES:,} bytes to its folder"
        if entries - first[1] > MAX_SCRATCH_ENTRIES:
            return f"made more than {MAX_SCRATCH_ENTRIES:,} files in its folder"
        return ""

    def close(self) -> None:
        """Remove the folder."""
        remove(Path(self.outside))
        os.close(self._lock)


def make_scratch(walled: bool, sizes: list[int]) -> MemoryScratch | DiskScratch:
    """Return the folder for foreign code: in memory where bubblewrap is the wall and can bound the folder's size.

    Args:
        walled: bubblewrap is the wall.
        sizes: bytes of each file of the submission.
    """
    in_memory = walled and bounds_memory(str(shutil.which("bwrap")))
    return MemoryScratch(sizes) if in_memory else DiskScratch(walled)


def lock_folder(handle: int) -> bool:
    """Lock an open folder until it is closed, by whatever end of the process. Return whether that was possible."""
    import fcntl  # Windows has none, nor a sandbox
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another holds the lock, or the file system has no locks
        return False
    return True


def remove_stale() -> None:
    """Remove the folders that evaluators of this user have left in the temporary folder when they were killed."""
    with os.scandir(tempfile.gettempdir()) as entries:
        left = [entry.path for entry in entries if entry.name.startswith(FOLDERS)]
    for path in left:
        with contextlib.suppress(OSError):  # no folder, a link, another user's, or another evaluator has removed it
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(handle).st_uid == os.geteuid() and lock_folder(handle):
                    remove(Path(path))
            finally:
                os.close(handle)


def remove(folder: Path) -> None:
    """Delete a folder that foreign code has filled, of any depth; Python's own function is recursive."""
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwx"], ["rm", "-rf"]):  # code may have closed its folders
        if os.path.lexists(folder):
            subprocess.run([*command, "--", str(folder)], stderr=subprocess.DEVNULL, check=False, env={"PATH": os.defpath})


def folder_size(folder: Path, most: int = 2**62) -> tuple[int, int]:
    """Return the bytes and the entries below a folder that is being written to. Vanished files count as 0 bytes.

    Args:
        folder: where to count.
        most: stop at more entries than this.
    """
    total, waiting, entries = 0, [str(folder)], 0
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as found:
            for entry in found:
                entries += 1
                with contextlib.suppress(OSError):
                    total += file_bytes(entry.stat(follow_symlinks=False))
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                if entries > most:
                    return total, entries
    return total, entries


def file_bytes(state: os.stat_result) -> int:
    """Return the bytes of a file: what it shows, or what it takes of the disk where that is more."""
    return max(state.st_size, state.st_blocks * 512) if stat.S_ISREG(state.st_mode) else 0


def held_bytes(process: int, folder: str) -> int:
    """Return at most how many bytes a process keeps in deleted files of a folder: open ones, and mapped ones."""
    found: dict[tuple[str, str], int] = {}
    with contextlib.suppress(OSError), open(f"/proc/{process}/maps", errors="replace") as lines:
        for line in lines:
            if line.endswith(" (deleted)\n") and f" {folder}/" in line:
                _, _, _, device, inode, *_ = line.split(None, 5)
                found[device, inode] = MAX_FILE_BYTES  # the mapping may show less than the file holds
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{process}/fd"):
            with contextlib.suppress(OSError):
                handle = f"/proc/{process}/fd/{name}"
                if os.readlink(handle).startswith(f"{folder}/") and os.readlink(handle).endswith(" (deleted)"):
                    state = os.stat(handle)
                    device = f"{os.major(state.st_dev):02x}:{os.minor(state.st_dev):02x}"
                    found[device, str(state.st_ino)] = file_bytes(state)
    return sum(found.values())


def user_threads() -> int:
    """Return the number of threads of this user's processes, as RLIMIT_NPROC counts them."""
    count = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                count += thread_count(int(name)) or 0
    return count


def thread_count(process: int) -> int | None:
    """Return the number of a process's threads; None when it has ended."""
    with contextlib.suppress(OSError):
        return int(stat_fields(process)[17])
    return None
