"""The walls around foreign code, tried from the inside: with bubblewrap, in the weak sandbox, and without root's rights."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.evaluation.distributions import reach
from compress.evaluation.sandbox import MAX_THREADS, Child
from compress.evaluation.system_calls import AUDIT_ARCH
from compress.evaluation.walls import MISSING, UNHIDDEN, bubblewrap_fault
from metadata.errors import UserError, VerificationError
from tests.evaluation.test_system_calls import REFUSED
from tests.helpers.commands import PROJECT
from tests.helpers.processes import descendants
from tests.helpers.walls import WEAK, code_settings, old_bubblewrap, without_bubblewrap

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="the sandbox is Linux's")
NEEDS_BUBBLEWRAP = pytest.mark.skipif(WEAK, reason=f"no bubblewrap: {bubblewrap_fault()}")
MODES = [pytest.param("bubblewrap", marks=NEEDS_BUBBLEWRAP), "weak"]
Attempt = Callable[..., str]


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    """Runs a model_loader.py in a sandbox of a mode and returns what became of it: a failure's text, or "loaded"."""
    def run(mode: str, code: str, files: dict[str, Path] | None = None, **settings: object) -> str:
        folder = tmp_path / "submission"
        folder.mkdir(exist_ok=True)
        (folder / "model_loader.py").write_text(code + "\n" + HONEST)
        (folder / "weights.pth").write_bytes(b"none")
        copied = {path.name: path for path in folder.iterdir()} | (files or {})
        boot = {"mode": "submission", "weights": "weights.pth", "classes": 2, "ways": ["loader"], "model_class": None,
                "input_shape": [3, 8, 8]}
        temporary = tmp_path / "temporary"
        temporary.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
            patch.setattr("tempfile.tempdir", str(temporary))
            if mode == "weak":
                stack.enter_context(without_bubblewrap())
            elif mode == "old bubblewrap":
                stack.enter_context(old_bubblewrap(tmp_path))
            try:
                child = Child(boot, copied, code_settings(weak_sandbox=mode == "weak", **settings), 1, "it", 2**20)
                stack.callback(child.close)
                assert child.protection["bubblewrap"] == {
                    "bubblewrap": "on", "old bubblewrap": "on, scratch folder on disk: bubblewrap before 0.7",
                    "weak": f"off: {MISSING}; {UNHIDDEN}"}[mode]
                child.facts()
                said = "loaded"
            except VerificationError as error:
                said = str(error)
            if "done: " in said:  # the process lives
                assert (used := child.usage())["peak_mb"] and used["cpu_s"]
        assert list(temporary.iterdir()) == [], "something was left behind"
        return said

    return run


HONEST = """
import torch
def load_model(path):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
"""
# Each line of `BREAKOUTS` is tried by itself, and must end in an OSError.
PROBE = """
import ctypes, fcntl, getpass, glob, os, shutil, sys, tarfile, termios
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(15, b"\\xff) S 1 (", 0, 0, 0)  # its name is of any bytes
r, w = os.pipe()
done = []
def system_call(number, *arguments):
    ctypes.set_errno(0)
    if libc.syscall(number, *(*arguments, 0, 0, 0, 0, 0, 0)[:6]) == -1:
        raise OSError(ctypes.get_errno(), "refused")
for line in BREAKOUTS:
    try:
        exec(line)
    except OSError:
        continue
    except ImportError:
        if line.startswith("import"):
            continue
    done.append(line)
for name, number in CALLS.items():
    try:
        system_call(number)
    except OSError as error:
        if error.errno == 1:
            continue
    done.append(name)
os.chmod(VICTIM, 0o777); os.utime(VICTIM, (1, 1)); os.chmod(os.path.dirname(VICTIM), 0o777)
given = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)
os.sched_setaffinity(0, {0}); os.nice(1); getpass.getuser()
if (os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)) != given:
    done.append("cores or priority changed")
with open("kept", "w") as file:
    file.write("x")
shutil.copy2("kept", "copy")
with tarfile.open("a.tar", "w") as archive:
    archive.add("copy")
with tarfile.open("a.tar") as archive:
    archive.extractall("out", filter="data")
times = {name: os.stat(name).st_mtime for name in os.listdir(".")}
if min(times.values()) < STARTED or oct(os.stat("large.bin").st_mode)[-3:] != "644":
    done.append("times or modes of the files came along")
if os.stat("large.bin").st_blocks * 512 < os.path.getsize("large.bin"):
    done.append("holes of the files came along")
raise ValueError(f"done: {done}")
"""
BREAKOUTS = [
    *(f"fcntl.fcntl(r, {command}, os.getppid())" for command in (8, 10, 1026)),  # F_SETOWN, F_SETSIG, F_NOTIFY
    "fcntl.fcntl(open('kept', 'w'), 1024, 1)",  # F_SETLEASE
    "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)",
    "fcntl.ioctl(r, 0x5452, bytes([1, 0, 0, 0]))",  # FIOASYNC
    "import sklearn", "import pytest", "import compress",
    "open(DIGITS)", "open(LABELS)", "open(ARRAYS)",
    "os.setxattr(VICTIM, 'user.note', b'kept for the next run')", "os.chown(VICTIM, 1, 1)", "open(VICTIM)",
    "open(VICTIM, 'w')", "os.truncate(VICTIM, 0)", "os.unlink(VICTIM)", "os.listdir(os.path.dirname(VICTIM))",
    "os.mkdir('closed', 0o300)", "os.umask(0o700)", "os.symlink('/', 'root')", "os.link('kept', 'linked')",
    "os.mkdir('/dev/shm/hoard')", "open('/dev/shm/hoard', 'w')", "open('/hoard', 'w')", "os.posix_fallocate(w, 0, 1)",
    "open(os.path.join(os.path.dirname(os.__file__), 'hoard'), 'w')", "open('/proc/1/environ')", "os.listdir('/proc')",
    "open('/etc/passwd')", "os.listdir('/')", "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))",
    "os.kill(os.getppid(), 9)", "os.fork()",
]


@pytest.mark.parametrize("mode", [*MODES, pytest.param("old bubblewrap", marks=[NEEDS_BUBBLEWRAP, pytest.mark.slow])])
def test_each_way_out_is_closed_and_honest_files_pass(mode: str, attempt: Attempt, tmp_path: Path) -> None:
    """Forty ways out, the calls by number, 300 MB of honest files and honest copies, all in one child."""
    column = AUDIT_ARCH[platform.machine()][0]
    victim, large = tmp_path / "precious" / "key", tmp_path / "large.bin"
    victim.parent.mkdir()
    victim.write_text("secret")
    victim.chmod(0o600)
    with large.open("wb") as file:
        file.truncate(300_000_000)
    large.chmod(0o755)
    os.utime(large, (7, 7))
    before = [path.stat() for path in (victim, victim.parent)]
    sklearn = importlib.util.find_spec("sklearn")
    digits = Path(sklearn.origin).parent / "datasets" / "data" / "digits.csv.gz" if sklearn and sklearn.origin else victim
    timm, numpy = importlib.util.find_spec("timm"), importlib.util.find_spec("numpy")
    labels = Path(timm.origin).parent / "data" / "_info" / "imagenet_real_labels.json" if timm and timm.origin else victim
    assert numpy and numpy.origin
    arrays = Path(numpy.origin).parent / "lib" / "tests" / "data" / "py3-objarr.npz"
    given = {"BREAKOUTS": BREAKOUTS, "VICTIM": str(victim), "DIGITS": str(digits), "STARTED": time.time() - 1,
             "LABELS": str(labels), "ARRAYS": str(arrays),
             "CALLS": {name: numbers[column] for name, numbers in REFUSED.items() if numbers[column] is not None}}
    code = "".join(f"{name} = {value!r}\n" for name, value in given.items()) + PROBE
    assert attempt(mode, code, {"large.bin": large}).endswith("done: []")
    after = [path.stat() for path in (victim, victim.parent)]
    assert [(one.st_mode, one.st_mtime, one.st_ctime) for one in before] == [
        (one.st_mode, one.st_mtime, one.st_ctime) for one in after]
    assert victim.read_text() == "secret" and os.listxattr(victim) == []


HOARDS = {
    "unlinked and mapped": "import mmap, os, time\nkept = []\nfor _ in range(40):\n    with open('big', 'w+b') as f:\n"
                           "        f.write(bytes(2**24 - 1)); f.flush(); kept.append(mmap.mmap(f.fileno(), 4096))\n"
                           "    os.unlink('big')\ntime.sleep(9)",
    "unlinked and open": "import os, time\nkept = []\nfor i in range(40):\n    f = open('big', 'wb'); kept.append(f)\n"
                         "    f.write(bytes(2**24 - 1)); f.flush(); os.unlink('big')\ntime.sleep(9)",
    "many files": "import time\nfor i in range(12_000): open(f'{i}', 'w').close()\ntime.sleep(9)",
}


@pytest.mark.parametrize("mode", [*MODES, pytest.param("old bubblewrap", marks=[NEEDS_BUBBLEWRAP, pytest.mark.slow])])
@pytest.mark.parametrize("hoard", ["unlinked and mapped", *(pytest.param(name, marks=pytest.mark.slow)
                                                           for name in HOARDS if name != "unlinked and mapped")])
def test_the_disk_is_not_filled_unseen(mode: str, hoard: str, attempt: Attempt) -> None:
    said = attempt(mode, HOARDS[hoard])
    assert ("made more than 10,000 files" if hoard == "many files" else "the code wrote more than") in said


def test_threads_are_counted(attempt: Attempt) -> None:
    """The kernel's limit does not bind root, so the evaluator counts them too, whatever name the process takes."""
    code = ("import ctypes, threading, time\nctypes.CDLL(None).prctl(15, b'\\xff) S 1 (', 0, 0, 0)  # its name\n"
            "threading.stack_size(32768); stop = threading.Event()\n"
            "for _ in range(20_000): threading.Thread(target=stop.wait, daemon=True).start()\ntime.sleep(9)")
    said = attempt("weak" if WEAK else "bubblewrap", code)
    assert f"more than {MAX_THREADS} threads" in said or "no more memory or threads here" in said


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("code", "said"), [
    ("import ctypes; ctypes.string_at(0)", "ended its process (signal 11)"),
    ("import os; os.abort()", "ended its process (signal 6)"),
    ("import os; os._exit(3)", "ended its process (exit code 3)"),
    ("import os, signal; signal.raise_signal(signal.SIGSTOP)", "--time_limit_s 3"),
])
def test_a_child_that_crashes_or_stops_is_told(mode: str, code: str, said: str, attempt: Attempt) -> None:
    assert said in attempt(mode, code, time_limit_s=3.0)


def test_without_bubblewrap_code_is_refused_unless_the_user_allows_for_it(attempt: Attempt) -> None:
    with without_bubblewrap(), pytest.raises(UserError, match=r"bubblewrap is not installed.*--weak_sandbox"):
        Child({}, {}, code_settings(weak_sandbox=False), 1, "it", 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_sandbox_that_does_not_start_is_no_fault_of_the_submission(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reach()  # the list is made once, and for this interpreter
    monkeypatch.setattr("sys.executable", "/bin/false")
    place = without_bubblewrap() if mode == "weak" else contextlib.nullcontext()
    with place, pytest.raises(UserError, match="the sandbox does not start"):
        Child({}, {}, code_settings(weak_sandbox=mode == "weak"), 1, "it", 1)


CLOSED_FOLDERS = """
import os
os.umask(0o077)
for mode in (0o300, 0o700):
    try:
        os.mkdir(f"{mode}", mode)
    except OSError:
        pass
found = sorted(name for name in os.listdir() if name[0] in "14")
os.chmod(f"{0o700}", 0o300)
open(f"{0o700}/x", "w").close()
os.listdir(f"{0o700}")
raise ValueError(f"made {found}")
"""


@pytest.mark.parametrize("mode", MODES)
def test_an_ordinary_user_is_as_safe(mode: str, tmp_path: Path) -> None:
    """Root gives up its capabilities first: then folders of mode 0300 are as closed as they are for others."""
    folder, temporary = tmp_path / "submission", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    (folder / "model_loader.py").write_text(CLOSED_FOLDERS)
    (folder / "w.pth").write_bytes(b"x")
    script = f"""
import sys, tempfile
sys.path.insert(0, {str(PROJECT)!r})
tempfile.tempdir = {str(temporary)!r}
from pathlib import Path
from compress.evaluation.sandbox import Child
from compress.evaluation.walls import bubblewrap_fault
from metadata.errors import VerificationError
from tests.helpers.walls import code_settings, without_bubblewrap
import contextlib
files = {{path.name: path for path in Path({str(folder)!r}).iterdir()}}
boot = {{"mode": "submission", "weights": "w.pth", "classes": 2, "ways": ["loader"], "model_class": None,
        "input_shape": [3, 8, 8]}}
with without_bubblewrap() if {mode == "weak"} else contextlib.nullcontext():
    if {mode == "bubblewrap"} and bubblewrap_fault():
        sys.exit("skip: " + bubblewrap_fault())
    child = Child(boot, files, code_settings(weak_sandbox={mode == "weak"}), 1, "it", 2**20)
try:
    child.facts()
except VerificationError as error:
    print(child.protection["bubblewrap"], error)
finally:
    child.close()
"""
    drop = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
    if drop and not shutil.which("setpriv"):
        pytest.skip("root cannot give up its capabilities here: there is no setpriv")
    done = subprocess.run([*drop, sys.executable, "-B", "-W", "ignore", "-c", script], capture_output=True, text=True,
                          timeout=120, check=False)
    if done.stderr.startswith("skip: "):  # such as root's user id without root's rights, which no namespace takes over
        pytest.skip(done.stderr.strip())
    assert "made ['448']" in done.stdout, done.stdout + done.stderr
    assert done.stdout.startswith("on" if mode == "bubblewrap" else "off")
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
@NEEDS_BUBBLEWRAP
def test_an_evaluator_that_is_killed_leaves_nothing(original: Path, few: Path, tmp_path: Path) -> None:
    folder, temporary = tmp_path / "folder", tmp_path / "temporary"
    shutil.copytree(original, folder)
    temporary.mkdir()
    marker = f"marker{os.getpid()}"
    with (folder / "model.py").open("a") as file:
        file.write(f"\nopen('{marker}', 'w').write('x')\nimport time\ntime.sleep(100)\n")
    process = subprocess.Popen([sys.executable, "-B", str(PROJECT / "model_loader.py"), "--submission_dir", str(folder),
                                "--data_dir", str(few), "--allow_code", "--output_file", str(tmp_path / "r.json")],
                               env=os.environ | {"TMPDIR": str(temporary)})
    end = time.monotonic() + 60
    while not (found := descendants(process.pid)) or not any(
            Path(f"/proc/{pid}/root/scratch/folder/{marker}").exists() for pid in found):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(os.path.exists(f"/proc/{pid}") for pid in found):
        assert time.monotonic() < end, "a process outlives the evaluator"
        time.sleep(0.1)
    assert list(temporary.iterdir()) == []


TIMM = """
import numpy.testing
import timm.data
assert timm.create_model("resnet18", num_classes=3).num_classes == 3
assert len(timm.data.ImageNetInfo().label_descriptions()) == 1000
try:
    said = f"{len(timm.data.RealLabelsImagenet([]).real_labels)} labels"
except (PermissionError, AssertionError) as error:
    said = repr(error)
raise ValueError(said)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_timm_makes_its_models_without_the_labels_of_imagenet(mode: str, attempt: Attempt) -> None:
    pytest.importorskip("timm")
    assert "PermissionError(13" in attempt(mode, TIMM)
