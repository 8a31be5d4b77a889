"""The list of system calls: what the filter answers to each number, and each number against the system's headers."""

from __future__ import annotations

import platform
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.evaluation import confine, system_calls

HEADERS = {"x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm/unistd_64.h")),
           "aarch64": (Path("/usr/include/asm-generic/unistd.h"),)}
# Calls that the list must not allow, by number on (x86-64, arm64); those that once were allowed by mistake come first.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27), "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "fallocate": (285, 47), "semget": (64, 190), "semop": (65, 193), "io_setup": (206, 0), "io_submit": (209, 2),
    "modify_ldt": (154, None), "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "sendto": (44, 206),
    "socketpair": (53, 199), "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "mknod": (133, None), "mknodat": (259, 33), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "swapon": (167, 224), "acct": (163, 89), "fsopen": (430, 430),
    "fsmount": (432, 432), "open_tree": (428, 428), "move_mount": (429, 429), "personality": (135, 92),
    "sched_setparam": (142, 118), "ioprio_set": (251, 30), "mlock": (149, 228), "mlockall": (151, 230),
    "mincore": (27, 232),
    "sethostname": (170, 161), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "capset": (126, 91),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "setrlimit": (160, 164), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "bpf": (321, 280), "seccomp": (317, 277),
    "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "init_module": (175, 105), "finit_module": (313, 273), "reboot": (169, 142),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "ioperm": (173, None), "iopl": (172, None),
    "setsid": (112, 157), "shmget": (29, 194), "msgget": (68, 186), "mq_open": (240, 180), "setuid": (105, 146),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "splice": (275, 76),
    "vmsplice": (278, 75), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "quotactl": (179, 60),
    "landlock_create_ruleset": (444, 444), "kcmp": (312, 272), "timer_create": (222, 107), "timerfd_create": (283, 85),
    "signalfd4": (289, 74),
}
TABLES = ("ALLOWED", "UNCHANGED", "ABSENT", "UNSUPPORTED", "JUDGED")
Verdict = Callable[..., int]


def test_threads_that_exist_already_are_an_error() -> None:
    """They would keep their rights."""
    if platform.system() != "Linux":
        pytest.skip("Landlock and seccomp are Linux's")
    import threading
    ready = threading.Event()
    thread = threading.Thread(target=ready.wait)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="threads"):
            confine.confine([], [], None)
    finally:
        ready.set()
        thread.join()


@pytest.fixture(params=["x86_64", "aarch64"])
def verdict(request: pytest.FixtureRequest) -> Verdict:
    """Runs the BPF program in an interpreter of its six kinds of instruction: number, arguments -> answer."""
    program = list(struct.iter_unpack("HBBI", system_calls.seccomp_program(request.param, 1234)))
    architecture = system_calls.AUDIT_ARCH[request.param][1]

    def run(number: int, *arguments: int, arch: int = architecture) -> int:
        data = struct.pack("=iIQ6Q", number, arch, 0, *(list(arguments) + [0] * 6)[:6])
        accumulator, at = 0, 0
        while True:
            code, yes, no, value = program[at]
            at += 1
            if code == system_calls.RESULT:
                return value
            if code == system_calls.LOAD:
                accumulator = struct.unpack_from("=I", data, value)[0]
            elif code == system_calls.MASK:
                accumulator &= value
            else:
                true = {system_calls.EQUAL: accumulator == value, system_calls.AT_LEAST: accumulator >= value,
                        system_calls.HAS_BITS: bool(accumulator & value)}[code]
                at += yes if true else no

    run.column = system_calls.AUDIT_ARCH[request.param][0]  # type: ignore[attr-defined]
    return run


def test_calls_off_the_list_are_refused(verdict: Verdict) -> None:
    column = verdict.column  # type: ignore[attr-defined]
    refuse, absent = (system_calls.ERRNO | number for number in (system_calls.EPERM, system_calls.ENOSYS))
    for name, numbers in REFUSED.items():
        if (number := numbers[column]) is not None:
            assert verdict(number) == refuse, name
    for table, answer in (("ALLOWED", system_calls.ALLOW), ("UNCHANGED", system_calls.ERRNO), ("ABSENT", absent),
                          ("UNSUPPORTED", system_calls.ERRNO | system_calls.EOPNOTSUPP)):
        for name, numbers in getattr(system_calls, table).items():
            if numbers[column] is not None:
                assert verdict(numbers[column]) == answer, name
    assert verdict(449) == verdict(1000) == absent, "a call that is newer than the list"
    assert verdict(63, arch=7) == system_calls.KILL
    if column == 0:
        assert verdict(0x40000000 + 39) == refuse, "a call by its x32 number"


def test_calls_with_a_condition_are_judged_by_their_arguments(verdict: Verdict) -> None:
    column = verdict.column  # type: ignore[attr-defined]
    call = {name: numbers[column] for name, numbers in system_calls.JUDGED.items()}
    allowed = [("clone", 0x3D0F00), ("prlimit64", 0, 9, 0), ("tgkill", 1234, 7, 6), ("prctl", 15), ("fcntl", 3, 1),
               ("fcntl", 3, 4, 0x800), ("fcntl", 3, 1030, 3), ("ioctl", 1, 0x5401), ("madvise", 0, 4096, 4),
               ("mkdirat", 0, 0, 0o777), ("mkdirat", 0, 0, 0o700), ("umask", 0o77)]
    refused = [("clone", 17), ("clone", 0x3D0F00 | 0x10000000), ("clone", 0x00010000), ("prlimit64", 0, 9, 1),
               ("prlimit64", 0, 9, 1 << 40), ("tgkill", 1, 1, 9), ("prctl", 1), ("prctl", 4), ("prctl", 22),
               *(("fcntl", 3, command, 1) for command in (8, 10, 15, 1024, 1026, 1031, 1033)), ("fcntl", 3, 4, 0x2000),
               ("madvise", 0, 4096, 100), ("madvise", 0, 4096, 12), ("mkdirat", 0, 0, 0o300), ("umask", 0o700)]
    for name, *arguments in allowed:
        assert verdict(call[name], *arguments) == system_calls.ALLOW, (name, arguments)
    for name, *arguments in refused:
        assert verdict(call[name], *arguments) == system_calls.ERRNO | system_calls.EPERM, (name, arguments)
    for request in (0x5452, 0x5412, 0x40049409):  # FIOASYNC, TIOCSTI, FICLONE
        assert verdict(call["ioctl"], 3, request) == system_calls.ERRNO | system_calls.ENOTTY


@pytest.mark.parametrize("machine", HEADERS)
def test_numbers_are_those_of_the_systems_headers(machine: str) -> None:
    header = next((path for path in HEADERS[machine] if path.is_file()), None)
    if header is None:
        pytest.skip(f"none of {[str(path) for path in HEADERS[machine]]} is installed (Debian: linux-libc-dev)")
    text, column = header.read_text(), system_calls.AUDIT_ARCH[machine][0]
    true = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", text)}
    same = re.findall(r"#define __NR_(\w+)\s+__NR3264_(\w+)", text)
    true |= {name: true[other] for name, other in same if other in true}
    for table in (*(getattr(system_calls, name) for name in TABLES), REFUSED):
        for name, numbers in table.items():
            if name in true:  # older headers lack the newest calls
                assert numbers[column] == true[name], name
            else:
                assert numbers[column] is None or numbers[column] >= 424, name


def test_a_call_stands_in_one_table_only() -> None:
    tables = {name: getattr(system_calls, name) for name in TABLES} | {"REFUSED": REFUSED}
    names = [name for table in tables.values() for name in table]
    assert len(names) == len(set(names))
    for column in (0, 1):
        numbers = [entry[column] for table in tables.values() for entry in table.values() if entry[column] is not None]
        assert len(numbers) == len(set(numbers))
