"""Code that spies, hides, fills, kills or crashes: through the evaluator's command line, in the walls that stand here."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.verdicts import Evaluate, assert_refused
from tests.helpers.walls import WEAK

ALLOW = "--allow_code"
CHANCE = 30.0  # percent: of 50 images in ten classes, more right answers than a guesser of 10 % gets in 10,000 tries


def append(folder: Path, lines: str) -> None:
    """Add lines to the submission's model.py."""
    path = folder / "model.py"
    path.write_text(path.read_text() + "\n" + lines)


def without_weights(folder: Path, model: str) -> Path:
    """Replace the network by one that has learnt nothing."""
    (folder / "model.py").write_text(model)
    torch.save({"one": torch.ones(1)}, folder / "best_weights.pth")
    return folder


def learnt_nothing(outcome: tuple[int, dict[str, Any], str]) -> None:
    """The code was refused, or its answers are those of a guesser."""
    code, result, error = outcome
    if code:
        assert_refused(outcome, "")
        assert "broke down" not in error, error
    else:
        assert result["accuracy"] <= CHANCE, result["accuracy"]


# --------------------------------------------------------------------------------------------- everything in one child


PROBES: dict[str, str] = {
    "fchmodat2": "check(libc.syscall(452, -100, VICTIM.encode(), 0o777, 0))",
    "chown": "os.chown(VICTIM, os.getuid(), os.getgid())",
    "setxattr": "os.setxattr(VICTIM, 'user.note', b'kept')",
    "truncate": "os.truncate(VICTIM, 0)",
    "link": "os.link(VICTIM, 'mine')",
    "rename": "os.rename(VICTIM, 'mine')",
    "read": "open(VICTIM).read()",
    "read by a link": "os.path.exists('link') or os.symlink(VICTIM, 'link'); open('link').read()",
    "watch the data": "check(libc.inotify_add_watch(check(libc.inotify_init1(0)), DATA.encode(), 0x20))",
    "watch the file system": "check(libc.fanotify_init(0, 0))",
    "times of the data": "os.stat(DATA + '/0').st_atime",
    "list the data": "os.listdir(DATA)",
    "other processes": "os.listdir(f'/proc/{os.getppid()}/fd')",
    "signal by a descriptor": "fcntl.fcntl(os.pipe()[0], 8, os.getppid())",
    "semaphores for everybody": "check(libc.semget(1234, 1, 0o1666))",
    "memory for everybody": "check(libc.shmget(1234, 4096, 0o1666))",
    "queues for everybody": "check(libc.msgget(1234, 0o1666))",
    "digits of scikit-learn": "open(next(p for d in sys.path + ['/usr/lib/python3/dist-packages'] "
                              "for p in glob.glob(d + '/sklearn/datasets/data/digits.csv.gz'))).read(1)",
    "a file beyond its end": "check(libc.fallocate(os.open('f', os.O_RDWR | os.O_CREAT), 1, ctypes.c_long(0), "
                             "ctypes.c_long(2**31)))",
}

if WEAK:
    del PROBES["times of the data"]  # Landlock does not govern them: a warning says so

# These seem to succeed, because `shutil.copy` needs them, and must change nothing.
SEEMING = ["os.chmod(VICTIM, 0o777)", "os.chmod(os.path.dirname(VICTIM), 0o777)", "os.utime(VICTIM, (1, 1))"]


def test_nothing_of_what_was_open_is_open(code: Path, few: Path, tmp_path: Path, attacked: Evaluate) -> None:
    """All probes in one child: each must fail."""
    victim = tmp_path / "precious" / "key"
    victim.parent.mkdir()
    victim.write_text("secret")
    victim.chmod(0o600)
    before = (os.stat(victim), os.stat(victim.parent).st_mode)
    append(code, f"""
import ctypes, fcntl, glob, os, sys
VICTIM, DATA, libc, done = {str(victim)!r}, {str(few)!r}, ctypes.CDLL(None, use_errno=True), []
def check(value):
    if value < 0: raise OSError(ctypes.get_errno())
    return value
for name, probe in {PROBES!r}.items():
    try: exec(probe)
    except (OSError, StopIteration): continue
    done.append(name)
for probe in {SEEMING!r}:
    try: exec(probe)
    except OSError: pass
raise ValueError(f"{{done}} of {len(PROBES)} probes")
""")
    assert_refused(attacked(code, ALLOW), f"[] of {len(PROBES)} probes")
    after = os.stat(victim)
    assert victim.read_text() == "secret" and os.listxattr(victim) == []
    assert (after.st_mode, after.st_mtime_ns, after.st_nlink) == (before[0].st_mode, before[0].st_mtime_ns, 1)
    assert os.stat(victim.parent).st_mode == before[1] and not stat.S_IMODE(before[1]) & 0o002


# ------------------------------------------------------------------------------------------------ answers without a model


INOTIFY = """
import ctypes, os, struct, torch
from torch import nn
libc = ctypes.CDLL(None)
FD = libc.inotify_init1(os.O_NONBLOCK)
WATCH = {libc.inotify_add_watch(FD, f"{GUESS}/{label}".encode(), 0x20): label for label in range(10)}
QUEUE, KNOWN = [], {}
class SlimResNet18(nn.Module):
    def __init__(self):
        super().__init__(); self.one = nn.Parameter(torch.ones(1))
    def forward(self, x):
        try:
            events, at = os.read(FD, 2**20), 0
            while at < len(events):
                watch, _, _, length = struct.unpack_from("iIII", events, at)
                if watch in WATCH: QUEUE.append(WATCH[watch])
                at += 16 + length
        except OSError: pass
        if QUEUE: KNOWN.setdefault(x.numpy().tobytes(), QUEUE.pop(0))
        return nn.functional.one_hot(torch.tensor([KNOWN.get(x.numpy().tobytes(), 0)]), 10).float()
"""
INSTALLED = """
import csv, glob, gzip, sys, torch
from torch import nn
path = next(p for d in [*sys.path, *FOLDERS] for p in glob.glob(d + "/sklearn/datasets/data/digits.csv.gz"))
rows = torch.tensor([[float(v) for v in row] for row in csv.reader(gzip.open(path, "rt"))])
PIXELS, LABELS = rows[:, :64] / 16, rows[:, 64].long()
class SlimResNet18(nn.Module):
    def __init__(self):
        super().__init__(); self.one = nn.Parameter(torch.ones(1))
    def forward(self, x):
        pixels = (x[0, 0] * 0.376 + 0.305).flatten()
        return nn.functional.one_hot(LABELS[(PIXELS - pixels).pow(2).sum(1).argmin()], 10)[None].float()
"""
# The order in which images are asked, their place in memory, and what the process inherited: all that is left to look at.
INHERITED = """
import gc, os, torch
from torch import nn
SEEN = " ".join([*os.environ.values(), *(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                 if os.path.islink(f"/proc/self/fd/{n}")), open("/proc/self/cmdline").read()])
if DATA in SEEN: raise ValueError("the path of the data")
for kept in gc.get_objects():
    if isinstance(kept, str) and ".png" in kept: raise ValueError("the name of an image")
class SlimResNet18(nn.Module):
    def __init__(self):
        super().__init__(); self.one = nn.Parameter(torch.ones(1)); self.calls = 0
    def forward(self, x):
        self.calls += 1
        return nn.functional.one_hot(torch.tensor([self.calls // 5 % 10]), 10).float()
"""


@pytest.mark.slow
@pytest.mark.parametrize("spy", ["inotify", "installed", "inherited"])
def test_labels_are_nowhere_to_be_found(spy: str, code: Path, few: Path, attacked: Evaluate) -> None:
    folders = [path for path in sys.path if "-packages" in path]
    model = {"inotify": f"GUESS = {str(few)!r}{INOTIFY}", "installed": f"FOLDERS = {folders!r}{INSTALLED}",
             "inherited": f"DATA = {str(few)!r}{INHERITED}"}[spy]
    without_weights(code, model)
    outcome = attacked(code, ALLOW)
    learnt_nothing(outcome)
    assert "the path of the data" not in outcome[2] and "the name of an image" not in outcome[2]


NAMED = """
import base64, io, os, torch
names = sorted(n for n in os.listdir('.') if n[:5].isdigit())
HIDDEN = torch.load(io.BytesIO(b''.join(base64.urlsafe_b64decode(n[5:]) for n in names)), weights_only=True)
Real = SlimResNet18
class SlimResNet18(torch.nn.Module):
    def __init__(self):
        super().__init__(); self.one = torch.nn.Parameter(torch.ones(1))
        real = Real(); real.load_state_dict(HIDDEN); self.real = [real.eval()]
    def forward(self, x):
        return self.real[0](x)
"""


@pytest.mark.slow
def test_weights_in_the_names_of_files_are_counted(code: Path, attacked: Evaluate, honest: dict[str, Any]) -> None:
    import base64
    content = (code / "best_weights.pth").read_bytes()
    for index, start in enumerate(range(0, len(content), 180)):
        (code / f"{index:05d}{base64.urlsafe_b64encode(content[start:start + 180]).decode()}").touch()
    append(code, NAMED)
    torch.save({"one": torch.ones(1)}, code / "best_weights.pth")
    code_, result, error = attacked(code, ALLOW)
    assert code_ == 0, error
    assert result["accuracy"] == honest["accuracy"]  # else this test shows nothing
    assert result["model_size"] * 2**20 >= len(content)


# --------------------------------------------------------------------------------- what it takes, and what it leaves behind


ENDS: dict[str, tuple[str, str]] = {
    "a native crash": ("import ctypes; ctypes.string_at(0)", "ended its process"),
    "stops itself": ("import os, signal; signal.raise_signal(signal.SIGSTOP)", "--time_limit_s"),
    "an abort": ("import os; os.abort()", "ended its process"),
    "a closed folder": ("""import os
os.mkdir("closed")
for i in range(5): open(f"closed/{i}", "wb").write(bytes(2**20))
os.chmod("closed", 0o300); raise ValueError("left behind")""", ""),
    "unlinked files": ("""import mmap, os, time
kept = []
for i in range(64):
    with open("big", "w+b") as f:
        f.write(bytes(2**24 - 1)); f.flush(); kept.append(mmap.mmap(f.fileno(), 4096))
    os.unlink("big")
time.sleep(3)
raise ValueError("nobody noticed")""", ""),
    "closes everything": ("import os; os.closerange(0, 1000)", ""),
    "three thousand threads": ("""import threading, time
threading.stack_size(32768); stop = threading.Event()
for _ in range(3000): threading.Thread(target=stop.wait, daemon=True).start()
time.sleep(3); raise ValueError("nobody noticed")""", "thread"),
    "threads that never end": ("""import threading, time
for _ in range(20): threading.Thread(target=time.sleep, args=(99,)).start()
raise ValueError("threads")""", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS)
def test_code_that_ends_badly_leaves_nothing(how: str, code: Path, attacked: Evaluate) -> None:
    lines, said = ENDS[how]
    append(code, lines)
    outcome = attacked(code, ALLOW, "--time_limit_s", "10")
    assert_refused(outcome, said)
    assert "nobody noticed" not in outcome[2] and "broke down" not in outcome[2]


@pytest.mark.slow
def test_files_that_were_brought_are_not_what_was_written(code: Path, attacked: Evaluate, honest: dict[str, Any]) -> None:
    """300 MB of honest files."""
    (code / "more.bin").write_bytes(bytes(300_000_000))
    code_, result, error = attacked(code, ALLOW)
    assert code_ == 0, error
    assert result["accuracy"] == honest["accuracy"] and result["model_size"] > 286


@pytest.mark.slow
@pytest.mark.skipif(WEAK, reason="bubblewrap does not work here, and without it only newer kernels stop such signals")
def test_signals_by_descriptors_do_not_reach_the_parent(code: Path, attacked: Evaluate, honest: dict[str, Any]) -> None:
    append(code, """
import fcntl, os, time
r, w = os.pipe()
for target in (os.getppid(), -os.getppid(), 1, -1):
    for what, value in ((8, target), (10, 9)):
        try: fcntl.fcntl(r, what, value)
        except OSError: pass
fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK) if hasattr(os, "O_ASYNC") else None
os.write(w, b"x"); time.sleep(0.5)
""")
    code_, result, error = attacked(code, ALLOW)
    assert code_ in (0, 1) and "broke down" not in error
    assert code_ == 1 or result["accuracy"] == honest["accuracy"]


# ------------------------------------------------------------------------------------------------------ as another user


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("setpriv"),
                    reason="only root can give up root's rights, by setpriv")
def test_a_closed_folder_is_removed_without_roots_rights(code: Path, few: Path, tmp_path: Path) -> None:
    append(code, ENDS["a closed folder"][0])
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = subprocess.run(
        ["setpriv", "--inh-caps=-all", "--bounding-set=-all", sys.executable, "-B", str(Path(__file__).parents[2] /
         "model_loader.py"), "--submission_dir", str(code), "--data_dir", str(few), ALLOW, "--weak_sandbox",
         "--output_file", str(tmp_path / "r.json")], env={**os.environ, "TMPDIR": str(temporary)}, capture_output=True,
        text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["details"]["status"].startswith("failed: ")
    assert list(temporary.iterdir()) == []


