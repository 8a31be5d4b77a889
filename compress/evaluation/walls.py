"""The outer wall around foreign code: bubblewrap's own namespaces, and a view of the disk that holds only what is needed.

Inside, the process is alone: no network, no other processes, no files but those of `distributions.reach()` for reading, and
one folder of limited size for writing (scratch.py). What the process does to itself there (confine.py) is the second wall.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from compress.evaluation.distributions import DEVICES, Reach
from metadata.errors import UserError
from metadata.machine import stat_fields

SCRATCH = "/scratch"  # the writable folder, as the process inside sees it
MISSING = "bubblewrap is not installed"
REMEDIES = {True: "Install the package bubblewrap (Debian, Ubuntu, Fedora, Arch and openSUSE call it so)",
            False: "Let the evaluator make user namespaces and mount /proc (containers and AppArmor may forbid that)"}
UNHIDDEN = "the code can learn sizes and times of files whose paths it guesses"  # Landlock does not govern stat
WEAK = f"or give --weak_sandbox: then Landlock and seccomp are the only walls, and {UNHIDDEN}"
APART = ("--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
         "--die-with-parent", "--new-session", "--cap-drop", "ALL")


@functools.cache
def bubblewrap_fault() -> str:
    """Return why bubblewrap cannot be the wall here, or an empty text."""
    program = shutil.which("bwrap")
    if program is None:
        return MISSING
    return try_bubblewrap(program, bounds_memory(program))


@functools.cache
def bounds_memory(program: str) -> bool:
    """Tell whether bubblewrap can bound the size of a folder in memory. Versions before 0.7 do not know the option."""
    return "--size" not in try_bubblewrap(program, True)


def try_bubblewrap(program: str, size: bool) -> str:
    """Return why bubblewrap does not do what a sandbox needs, or an empty text."""
    bound = ["--size", "4096"] if size else []
    trial = [program, *APART, "--ro-bind", "/", "/", "--proc", "/proc", *bound, "--tmpfs", "/tmp", "true"]
    try:
        done = subprocess.run(trial, capture_output=True, text=True, timeout=20, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} does not start: {error}"
    said = " ".join(done.stderr.split())[:200] or f"exit code {done.returncode}"
    return f"{program} does not work here: {said}" if done.returncode else ""


def check_walls(weak: bool, where: str) -> bool:
    """Return whether bubblewrap is to be used.

    Args:
        weak: the user does without it where it is missing.
        where: for messages.

    Raises:
        UserError: bubblewrap cannot be used, and the user has not said that the sandbox may be weak.
    """
    fault = bubblewrap_fault()
    if fault and not weak:
        raise UserError(f"{where}: foreign code runs in bubblewrap, and {fault}. {REMEDIES[fault == MISSING]}, {WEAK}")
    return not fault


def wall_arguments(reach: Reach, files: Iterable[Path], scratch: Iterable[str]) -> list[str]:
    """Return bubblewrap's arguments that build the view of the disk.

    Args:
        reach: what may be read.
        files: more files that may be read, such as the program inside.
        scratch: the arguments that mount the writable folder.
    """
    inner = [hole for hole in reach.holes if any(hole.startswith(tree + "/") for tree in reach.trees)]
    mounts = [(path, ["--ro-bind", path, path]) for path in (*reach.trees, *map(str, files))]
    folders = [hole for hole in inner if os.path.isdir(hole)]
    mounts += [(path, ["--tmpfs", path]) for path in folders]  # empty, and read-only in the end
    # A device on a mount without devices: it cannot be opened.
    mounts += [(path, ["--ro-bind", "/dev/null", path]) for path in {*inner} - {*folders}]
    mounts += [(path, ["--dir", path]) for path in {*reach.holes, *reach.search} - {*inner}]
    arguments = [*APART]
    for _, words in sorted(mounts):  # what lies above comes first
        arguments += words
    for link, target in reach.links:
        arguments += ["--symlink", target, link]
    for device in DEVICES:
        arguments += ["--dev-bind-try", device, device]
    arguments += ["--proc", "/proc", *scratch, "--chdir", SCRATCH]
    for path in (*folders, "/"):
        arguments += ["--remount-ro", path]
    return arguments


def packed_arguments(arguments: Iterable[str]) -> int:
    """Return a file in memory from which bubblewrap reads arguments (`--args FD`); there may be hundreds."""
    handle = os.memfd_create("arguments", 0)
    os.write(handle, b"".join(argument.encode() + b"\0" for argument in arguments))
    os.lseek(handle, 0, os.SEEK_SET)
    return handle


def inner_process(told: bytes) -> tuple[int, int] | None:
    """Return two process ids, as seen from outside: bubblewrap's own inside, and its program's. None when they have ended.

    Args:
        told: what bubblewrap wrote to its `--info-fd`: its own process inside, which is the parent of the program.
    """
    try:
        reaper = int(json.loads(told)["child-pid"])
    except (ValueError, KeyError, TypeError):
        return None
    end = time.monotonic() + 5
    while time.monotonic() < end:
        with contextlib.suppress(OSError, IndexError):
            return reaper, int(Path(f"/proc/{reaper}/task/{reaper}/children").read_text().split()[0])
        for status in Path("/proc").glob("[0-9]*/stat"):  # a kernel without lists of children
            with contextlib.suppress(OSError):
                if int(stat_fields(status.parent.name)[1]) == reaper:
                    return reaper, int(status.parent.name)
        if not os.path.exists(f"/proc/{reaper}"):
            return None
        time.sleep(0.001)
    return None
