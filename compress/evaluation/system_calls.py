"""The system calls that foreign code may make: a seccomp filter that allows what is on its list and refuses all else.

The file imports only the standard library: the child loads it by its path. The list holds what Python, torch (with
OpenMP and oneDNN), numpy, Pillow and timm call while they load and run models. Some calls are answered without being made:
`chmod` and its like succeed and change nothing, because `shutil.copy` needs them and Landlock does not govern them. So do
the calls that choose cores or a priority, which people make for a steady latency.
"""

from __future__ import annotations

import struct

AUDIT_ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # machine -> (column of the tables, its number)
EPERM, ENOTTY, ENOSYS, EOPNOTSUPP = 1, 25, 38, 95
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
Numbers = dict[str, tuple[int | None, int | None]]  # name -> number on (x86-64, arm64); None where there is no such call

# fmt: off
ALLOWED: Numbers = {
    # files, which Landlock and the mounts govern
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287), "lseek": (8, 62),
    "open": (2, None), "openat": (257, 56), "close": (3, 57), "close_range": (436, 436), "stat": (4, None),
    "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78),
    "getdents": (78, None), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "ftruncate": (77, 46), "truncate": (76, 45), "fsync": (74, 82), "fdatasync": (75, 83),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "fadvise64": (221, 223), "sendfile": (40, 71), "statfs": (137, 43), "fstatfs": (138, 44), "flock": (73, 32),
    # waiting
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create": (213, None),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441), "eventfd2": (290, 19),
    # memory
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "brk": (12, 214), "msync": (26, 227),
    # the process's own signals and timers
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigsuspend": (130, 133),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132), "pause": (34, None),
    "restart_syscall": (219, 128), "alarm": (37, None), "setitimer": (38, 103), "getitimer": (36, 102),
    # clocks and facts about the machine and the process
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165), "sysinfo": (99, 179),
    "uname": (63, 160), "getcpu": (309, 168), "sched_getaffinity": (204, 123), "sched_yield": (24, 124),
    "sched_getparam": (143, 121), "sched_getscheduler": (145, 120), "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126), "getpriority": (140, 141), "getrlimit": (97, 163), "capget": (125, 90),
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158), "getresuid": (118, 148),
    "getresgid": (120, 150), "getpgid": (121, 155), "getpgrp": (111, None), "getsid": (124, 156),
    # threads, and the end
    "membarrier": (324, 283), "rseq": (334, 293), "futex": (202, 98), "set_robust_list": (273, 99),
    "set_tid_address": (218, 96), "arch_prctl": (158, None), "getrandom": (318, 278), "wait4": (61, 260),
    "exit": (60, 93), "exit_group": (231, 94),
}
# Answered with success, and not made: modes and times of files stay as they are, and so do cores and priority.
UNCHANGED: Numbers = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "sched_setaffinity": (203, 122), "setpriority": (141, 140),
}
# Libraries fall back on other calls, or do without. clone3 hides its flags behind a pointer, openat2 its mode.
ABSENT: Numbers = {"clone3": (435, 435), "openat2": (437, 437), "copy_file_range": (326, 285), "fchmodat2": (452, 452)}
NEWER = 448  # from this number on there are calls that this list does not know
UNSUPPORTED: Numbers = {
    "getxattr": (191, 8), "lgetxattr": (192, 9), "fgetxattr": (193, 10), "listxattr": (194, 11), "llistxattr": (195, 12),
    "flistxattr": (196, 13), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}
# Allowed with certain arguments only, see `seccomp_program`.
JUDGED: Numbers = {
    "clone": (56, 220), "tgkill": (234, 131), "prctl": (157, 167), "prlimit64": (302, 261), "fcntl": (72, 25),
    "ioctl": (16, 29), "madvise": (28, 233), "mkdir": (83, None), "mkdirat": (258, 34), "umask": (95, 166),
}
# fmt: on
THREADS = (0x3D0F00, 0x7D0F00)  # the flags by which glibc and musl make a thread
PRCTL_OPTIONS = (15, 16, 3, 23, 0x53564D41)  # names of threads and of memory; reading dumpable and the bounding set
FCNTL_COMMANDS = (0, 1, 2, 3, 5, 6, 7, 36, 37, 38, 1030, 1032, 1034)  # copies, flags, locks, sizes of pipes, seals
F_SETFL, O_ASYNC = 4, 0x2000
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
ADVICE = (0, 1, 2, 3, 4, 8, 10, 11, 14, 15, 16, 17, 18, 19, 22, 23)  # of madvise; sharing and poisoning are not among them
OWNER = 0o700  # a folder that its owner cannot enter could be neither looked into nor removed

LOAD, EQUAL, AT_LEAST, HAS_BITS, MASK, RESULT = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06  # instructions of classic BPF


def _statement(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, value)


def _answer(number: int) -> bytes:
    return _statement(RESULT, ERRNO | number)


def seccomp_program(machine: str, process: int) -> bytes:
    """Return the filter of a process, as classic BPF over `struct seccomp_data` (nr at 0, arch at 4, args from 16).

    Args:
        machine: a key of `AUDIT_ARCH`.
        process: the id of the process, which may signal itself.

    Source: Linux kernel documentation, userspace-api/seccomp_filter.
    """
    column, architecture = AUDIT_ARCH[machine]
    allow, refuse = _statement(RESULT, ALLOW), _answer(EPERM)

    def argument(index: int, high: bool = False) -> bytes:
        return _statement(LOAD, 16 + 8 * index + 4 * high)

    def one_of(index: int, values: tuple[int, ...], otherwise: bytes = refuse) -> list[bytes]:
        """Allow a call whose argument's low word, which is all that the kernel reads, is one of some values."""
        tests = [_statement(EQUAL, value, len(values) - place) for place, value in enumerate(values)]
        return [argument(index), *tests, otherwise, allow]

    owners = [_statement(MASK, OWNER), _statement(EQUAL, OWNER, 0, 1), allow, refuse]
    judged = {
        "clone": one_of(0, THREADS),
        "tgkill": one_of(0, (process,)),  # abort() signals its own process
        "prctl": one_of(0, PRCTL_OPTIONS),
        # The third argument, two words of 32 bits, points at limits to set.
        "prlimit64": [argument(2), _statement(EQUAL, 0, 0, 2), argument(2, high=True), _statement(EQUAL, 0, 1, 0), refuse,
                      allow],
        "fcntl": [argument(1), _statement(EQUAL, F_SETFL, 0, 4), argument(2), _statement(HAS_BITS, O_ASYNC, 0, 1), refuse,
                  allow, *one_of(1, FCNTL_COMMANDS)],
        "ioctl": one_of(1, IOCTLS, _answer(ENOTTY)),
        "madvise": one_of(2, ADVICE),
        "mkdir": [argument(1), *owners],
        "mkdirat": [argument(2), *owners],
        "umask": [argument(0), _statement(HAS_BITS, OWNER, 0, 1), refuse, allow],
    }
    program = [_statement(LOAD, 4), _statement(EQUAL, architecture, 1, 0), _statement(RESULT, KILL), _statement(LOAD, 0)]
    if column == 0:  # the x32 numbers of the same calls
        program += [_statement(AT_LEAST, 0x40000000, 0, 1), refuse]
    for table, answer in ((ALLOWED, allow), (UNCHANGED, _answer(0)), (ABSENT, _answer(ENOSYS)),
                          (UNSUPPORTED, _answer(EOPNOTSUPP))):
        for numbers in table.values():
            if (number := numbers[column]) is not None:
                program += [_statement(EQUAL, number, 0, 1), answer]
    for name, numbers in JUDGED.items():
        if (number := numbers[column]) is not None:
            program += [_statement(EQUAL, number, 0, len(judged[name])), *judged[name]]
    return b"".join([*program, _statement(AT_LEAST, NEWER, 0, 1), _answer(ENOSYS), refuse])
