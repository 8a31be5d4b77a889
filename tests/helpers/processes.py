"""The processes that a process has started."""

from __future__ import annotations

import contextlib
from pathlib import Path

from metadata.machine import stat_fields


def descendants(process: int) -> dict[int, str]:
    """Return the running processes that a process has started, and those that these have: id -> command line.

    Parents come before their children.
    """
    children: dict[int, list[int]] = {}
    commands = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            state, parent, *_ = stat_fields(folder.name)
            if state != b"Z":
                commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                children.setdefault(int(parent), []).append(int(folder.name))
    found = [process]
    for each in found:
        found += children.get(each, [])
    return {each: commands[each] for each in found[1:]}
