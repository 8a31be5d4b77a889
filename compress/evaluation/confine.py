"""Take rights away from the current process for good: file access (Landlock) and system calls (seccomp), on Linux.

The file imports only the standard library: the sandbox's child loads it by its path. Both mechanisms need no privileges.
A mechanism that the system does not offer is reported, never silently skipped.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterable
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
SIGKILL = 9
AT_FDCWD_FLAGS = os.O_PATH | os.O_CLOEXEC if hasattr(os, "O_PATH") else 0

# linux/landlock.h: rights on files, by the ABI version that introduced them.
READ_FILE, READ_DIR, WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
ACCESS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, TRUNCATE = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 14
SCRATCH = READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | MAKE_REG | MAKE_DIR | REMOVE_FILE | REMOVE_DIR
FILE_RIGHTS = WRITE_FILE | READ_FILE | TRUNCATE
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446

# System calls that a model never needs, by number on (x86-64, arm64).
REFUSED = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "sendto": (44, 206), "socketpair": (53, 199),
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "mknod": (133, None), "mknodat": (259, 33), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "swapon": (167, 224), "acct": (163, 89), "fsopen": (430, 430),
    "fsmount": (432, 432), "open_tree": (428, 428), "move_mount": (429, 429), "personality": (135, 92),
    "sched_setparam": (142, 118), "ioprio_set": (251, 30), "mlockall": (151, 230), "sethostname": (170, 161),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "setpriority": (141, 140), "setrlimit": (160, 164), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "bpf": (321, 280),
    "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "init_module": (175, 105), "finit_module": (313, 273), "reboot": (169, 142),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "ioperm": (173, None), "iopl": (172, None),
    "setsid": (112, 157), "shmget": (29, 194), "msgget": (68, 186), "mq_open": (240, 180),
}
CLONE, CLONE3, PRLIMIT, TGKILL, PRCTL, CAPSET = (56, 220), (435, 435), (302, 261), (234, 131), (157, 167), (126, 91)
AUDIT_ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
CLONE_THREAD = 0x00010000
EPERM, ENOSYS = 1, 38
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, for any reason."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)


def confine(readable: Iterable[Path], writable: Iterable[Path]) -> dict[str, str]:
    """Restrict this process to reading below some paths and writing below others; no network, processes or signals.

    Existing threads would keep their rights, so there must be none.

    Returns:
        The state of each protection: "files", "network", "processes" -> "on ..." or "off: why".

    Raises:
        RuntimeError: there is more than one thread.
    """
    if platform.system() != "Linux":
        why = f"off: needs Linux, this is {platform.system()}"
        return {"files": why, "network": why, "processes": why}
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"cannot confine a process of {threads} threads")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        why = "off: no_new_privs was refused"
        return {"files": why, "network": why, "processes": why}
    _drop_capabilities(libc)
    files = _landlock(libc, readable, writable)
    calls = _seccomp(libc)
    return {"files": files, "network": calls, "processes": calls}


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Drop all capabilities, also for root. Refusing execve keeps them from coming back."""
    if platform.machine() in AUDIT_ARCH:
        number = CAPSET[AUDIT_ARCH[platform.machine()][0]]
        if libc.syscall(number, struct.pack("Ii", 0x20080522, 0), bytes(24)):  # version 3, this process; none of 64
            raise RuntimeError(f"cannot drop capabilities: {os.strerror(ctypes.get_errno())}")


def _landlock(libc: ctypes.CDLL, readable: Iterable[Path], writable: Iterable[Path]) -> str:
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
    for paths, rights in ((readable, READ_FILE | READ_DIR), (writable, SCRATCH)):
        for path in paths:
            if not path.exists():
                continue
            handle = os.open(path, AT_FDCWD_FLAGS)
            allowed = rights if path.is_dir() else rights & FILE_RIGHTS
            rule = struct.pack("=Qi", allowed & handled, handle)
            failed = libc.syscall(LANDLOCK_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
            os.close(handle)
            if failed:
                return f"off: Landlock took no rule for {path}"
    failed = libc.syscall(LANDLOCK_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)
    return "off: Landlock was refused" if failed else f"on (Landlock {abi})"


def _statement(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, value)


def seccomp_program(machine: str, process: int) -> bytes:
    """Return the filter of a process, as classic BPF over `struct seccomp_data` (nr at 0, arch at 4, args from 16).

    Source: Linux kernel documentation, userspace-api/seccomp_filter.
    """
    load, equal, at_least, has_bits, result = 0x20, 0x15, 0x35, 0x45, 0x06
    column, architecture = AUDIT_ARCH[machine]
    refuse, allow = _statement(result, ERRNO | EPERM), _statement(result, ALLOW)

    def only_if(number: int, argument: int, test: int, value: int) -> list[bytes]:
        """Allow a call if the low word of an argument passes a test, and refuse the call otherwise."""
        check = [_statement(load, 16 + 8 * argument), _statement(test, value, 0, 1), allow, refuse]
        return [_statement(equal, number, 0, len(check)), *check]

    program = [_statement(load, 4), _statement(equal, architecture, 1, 0), _statement(result, KILL), _statement(load, 0)]
    if column == 0:  # the x32 numbers of the same calls
        program += [_statement(at_least, 0x40000000, 0, 1), refuse]
    numbers: set[int] = {call[column] for call in REFUSED.values() if call[column] is not None}  # type: ignore[misc]
    for number in sorted(numbers):
        program += [_statement(equal, number, 0, 1), refuse]
    # clone3 hides its flags behind a pointer. Without clone3, libraries fall back to clone, which may make threads only.
    program += [_statement(equal, CLONE3[column], 0, 1), _statement(result, ERRNO | ENOSYS)]
    program += only_if(CLONE[column], 0, has_bits, CLONE_THREAD)
    program += only_if(TGKILL[column], 0, equal, process)  # abort() signals its own process
    # prctl must not undo that this process dies with its parent
    program += [_statement(equal, PRCTL[column], 0, 4), _statement(load, 16), _statement(equal, PR_SET_PDEATHSIG, 0, 1),
                refuse, allow]
    # prlimit may read limits (its third argument, two words of 32 bits, is null) but not set them
    program += [_statement(equal, PRLIMIT[column], 0, 5), _statement(load, 32), _statement(equal, 0, 0, 2),
                _statement(load, 36), _statement(equal, 0, 1, 0), refuse]
    return b"".join([*program, allow])


def _seccomp(libc: ctypes.CDLL) -> str:
    machine = platform.machine()
    if machine not in AUDIT_ARCH:
        return f"off: no filter for {machine}"
    program = ctypes.create_string_buffer(seccomp_program(machine, os.getpid()))
    header = struct.pack("HxxxxxxP", (len(program) - 1) // 8, ctypes.addressof(program))
    if libc.prctl(22, 2, header, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        return f"off: seccomp was refused ({os.strerror(ctypes.get_errno())})"
    return "on (seccomp)"
