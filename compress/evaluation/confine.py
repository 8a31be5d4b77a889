"""Take rights away from the current process for good, on Linux: capabilities, files (Landlock), system calls (seccomp).

The file imports only the standard library: the sandbox's child loads it by its path. Both mechanisms need no privileges.
A mechanism that the system does not offer is reported, never silently skipped.
"""

from __future__ import annotations

import ctypes
import os
import platform
import stat
import struct
from collections.abc import Iterable

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
SIGKILL = 9
PATH_ONLY = os.O_PATH | os.O_CLOEXEC if hasattr(os, "O_PATH") else 0

# linux/landlock.h: rights on files, by the ABI version that introduced them.
READ_FILE, READ_DIR, WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
ACCESS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, TRUNCATE = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 14
SCRATCH = READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | MAKE_REG | MAKE_DIR | REMOVE_FILE | REMOVE_DIR
FILE_RIGHTS = WRITE_FILE | READ_FILE | TRUNCATE
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446

CAPSET = {"x86_64": 126, "aarch64": 91}


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, for any reason."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)


def confine(readable: Iterable[tuple[str, bool]], writable: Iterable[str], program: bytes | None) -> dict[str, str]:
    """Restrict this process to reading some paths and writing below others; no network, processes or signals.

    Existing threads would keep their rights, so there must be none.

    Args:
        readable: (path, whether its content may be read, or only the names in it), each with all that lies below.
        writable: folders to read and write.
        program: a seccomp filter; None where there is none for this machine.

    Returns:
        The state of each protection: "files", "system calls", "capabilities" -> "on ..." or "off: why".

    Raises:
        RuntimeError: there is more than one thread.
    """
    names = ("files", "system calls", "capabilities")
    if platform.system() != "Linux":
        return dict.fromkeys(names, f"off: needs Linux, this is {platform.system()}")
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"cannot confine a process of {threads} threads")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return dict.fromkeys(names, "off: no_new_privs was refused")
    dropped = _drop_capabilities(libc)
    files = _landlock(libc, readable, writable)
    return {"files": files, "system calls": _seccomp(libc, program), "capabilities": dropped}


def _drop_capabilities(libc: ctypes.CDLL) -> str:
    """Drop all capabilities, also for root. Return the state. Refusing execve keeps them from coming back."""
    number = CAPSET.get(platform.machine())
    if number is None:
        return f"off: no number of capset for {platform.machine()}"
    if libc.syscall(number, struct.pack("Ii", 0x20080522, 0), bytes(24)):  # version 3, this process; none of 64
        raise RuntimeError(f"cannot drop capabilities: {os.strerror(ctypes.get_errno())}")
    return "on (none)"


def _landlock(libc: ctypes.CDLL, readable: Iterable[tuple[str, bool]], writable: Iterable[str]) -> str:
    """Restrict file access. Return the state.

    Source: Linux kernel documentation, userspace-api/landlock.
    """
    abi = libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if abi < 1:
        return "off: this kernel has no Landlock"
    handled = ACCESS_BY_ABI[max(version for version in ACCESS_BY_ABI if version <= abi)]
    network, scoped = (3 if abi >= 4 else 0), (3 if abi >= 6 else 0)
    attributes = struct.pack("QQQ", handled, network, scoped)[:24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    if ruleset < 0:
        return f"off: Landlock was refused ({os.strerror(ctypes.get_errno())})"
    rules = [(path, READ_FILE | READ_DIR if content else READ_DIR) for path, content in readable]
    for path, rights in [*rules, *((path, SCRATCH) for path in writable)]:
        try:
            handle = os.open(path, PATH_ONLY)
        except FileNotFoundError:
            continue
        allowed = rights if stat.S_ISDIR(os.fstat(handle).st_mode) else rights & FILE_RIGHTS
        rule = struct.pack("=Qi", allowed & handled, handle)
        failed = allowed and libc.syscall(LANDLOCK_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(1), rule,
                                          ctypes.c_uint32(0))
        os.close(handle)
        if failed:
            return f"off: Landlock took no rule for {path}"
    failed = libc.syscall(LANDLOCK_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)
    return "off: Landlock was refused" if failed else f"on (Landlock {abi})"


def _seccomp(libc: ctypes.CDLL, program: bytes | None) -> str:
    if program is None:
        return f"off: no filter for {platform.machine()}"
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    if libc.prctl(22, 2, header, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        return f"off: seccomp was refused ({os.strerror(ctypes.get_errno())})"
    return "on (seccomp, an allow-list)"
