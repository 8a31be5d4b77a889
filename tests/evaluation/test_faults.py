"""What the sandbox forbids is said as such, with the line of the code: every kind, raised in a confined process."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from compress.evaluation import faults
from tests.helpers.commands import PROJECT

# What a submission's file does -> the line of the fault in it, and what is said.
# "printing" changes standard output: it stays the last.
KINDS: dict[str, tuple[str, int, str]] = {
    "fork": ("import os\nos.fork()", 3, "no other processes here"),
    "subprocess": ("import subprocess\nsubprocess.run(['true'])", 3, "no other processes here"),
    "popen": ("import os\nos.popen('true')", 3, "no other processes here"),
    "a worker": ("import multiprocessing\nmultiprocessing.Process(target=print).start()", 3, "no other processes here"),
    "a pool": ("from multiprocessing import Pool\nPool(2)  # workers", 3, "no other processes here (Perm"),
    "a lock": ("import multiprocessing\nmultiprocessing.Lock()", 3, "no locks between processes here: use those of"),
    "a link": ("import os\nos.symlink('case00.py', 'link')", 3, "no links are made here"),
    "a move": ("import os\nos.mkdir('d')\nos.rename('case00.py', 'd/x')", 4, "no file is moved or linked from one"),
    "shared memory": ("from multiprocessing import shared_memory\nshared_memory.SharedMemory(create=True, size=9)", 3,
                      "no memory is shared with other processes here"),
    "a connection": ("import socket\nsocket.create_connection(('127.0.0.1', 9), 1)", 3, "no network here"),
    "a name": ("import urllib.request\nurllib.request.urlopen('https://example.com/a.pth')", 3, "no network here"),
    "a download in a called function": ("import urllib.request\ndef get():\n    urllib.request.urlretrieve("
                                        "'http://127.0.0.1/a', 'a')\n\nget()", 4, "no network here"),
    "a file elsewhere": ("open('/etc/shadow')", 2, "no file outside the submission's folder is read or written here: "
                         "/etc/shadow"),
    "writing elsewhere": ("open('/tmp/written_by_a_submission', 'w')", 2, "no file outside the submission's folder is read "
                          "or written here: /tmp/written"),
    "a path elsewhere": ("open('/kaggle/working/model.pth')", 2, "the code runs in a copy of its folder: take paths from"),
    "a file that is not there": ("open('classes.txt')", 2, "classes.txt is not in the submission's folder"),
    "a large file": ("with open('large', 'wb') as file:\n    for _ in range(40):\n        file.write(bytes(2**20))", 4,
                     "no file above 16 MiB is written here"),
    "many files": ("files = [open(f'{i}', 'w') for i in range(200)]", 2, "no more than 128 files are open"),
    "memory": ("hoard = bytearray(2**40)", 2, "no more memory or threads here than --memory_limit_mb 512 allows"),
    "a package": ("import tensorflow_of_nobody", 2, "no package tensorflow_of_nobody in the sandbox, and"),
    "a system call": ("import os\nos.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))", 3,
                      "this system call is refused here"),
    "a fault of their own": ("a = {}\na['b']", 3, "KeyError: 'b'"),
    "a syntax error": ("x = 1\nif x\n", 3, "SyntaxError"),
    "printing": ("import os\nos.dup2(os.open('printed', os.O_CREAT | os.O_WRONLY), 1)\nfor _ in range(40):\n"
                 "    os.write(1, bytes(2**20))", 5, "no more than 16 MiB are printed here"),
}
CONFINED = """
import importlib.util, json, pathlib, sys, os
here, folder, (readable, packages) = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
child, confine, calls, faults = (load(here / f"{name}.py", f"sandbox_{name}")
                                 for name in ("child", "confine", "system_calls", "faults"))
child.set_limits(512, 60)
state = confine.confine(readable, [str(folder)], calls.seccomp_program(os.uname().machine, os.getpid()))
os.chdir(folder)
output = os.dup(1)
said = {}
for path in sorted(folder.glob("case*.py")):
    try:
        load(path, path.stem)
    except BaseException as error:
        said[path.name] = faults.explain_fault(error, folder, 512, packages)
os.write(output, json.dumps([state, said]).encode())
"""


def test_every_refusal_is_said_with_its_line(tmp_path: Path) -> None:
    from compress.evaluation.distributions import reach
    if platform.system() != "Linux":
        pytest.skip("Landlock and seccomp are Linux's")
    for number, (source, _, _) in enumerate(KINDS.values()):
        (tmp_path / f"case{number:02}.py").write_text(f"# a submission's file\n{source}\n")
    arguments = [str(PROJECT / "compress" / "evaluation"), str(tmp_path), json.dumps([reach().rules(), ["torch", "numpy"]])]
    done = subprocess.run([sys.executable, "-I", "-B", "-c", CONFINED, *arguments], capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    state, said = json.loads(done.stdout)
    if not all(text.startswith("on") for text in state.values()):
        pytest.skip(f"this kernel does not offer all of it: {state}")
    wrong = {}
    for number, (kind, (_, line, expected)) in enumerate(KINDS.items()):
        name = f"case{number:02}.py"
        got = said.get(name, "nothing was raised")
        if not got.startswith(f"{name}:{line}: {expected}") and not (
                got.startswith(f"{name}:{line}: ") and expected in got and expected in ("take paths from model_path",)):
            wrong[kind] = got
    assert wrong == {}
    assert not Path("/tmp/written_by_a_submission").exists()


def test_errors_without_a_line_of_the_code_and_unsafe_advice(tmp_path: Path) -> None:
    import torch
    try:
        torch.jit.load(str(tmp_path / "missing.pt"))
    except Exception as error:  # whatever torch raises
        assert faults.explain_fault(error, tmp_path, 512).startswith(f"{type(error).__name__}: ")
    torch.save({"a": Path("x")}, tmp_path / "w.pth")
    with pytest.raises(Exception, match="weights_only") as caught:
        torch.load(tmp_path / "w.pth", weights_only=True)
    said = faults.explain_fault(caught.value, tmp_path, 512)
    assert "weights_only=True refuses this file" in said and "set to `False`" not in said and "add_safe_globals" not in said


def test_an_exception_that_cannot_be_told_is_named(tmp_path: Path) -> None:
    class MuteError(Exception):
        """It raises when it is asked for its text."""

        def __str__(self) -> str:
            raise ValueError("no text")

    assert faults.explain_fault(MuteError(), tmp_path, 512) == "MuteError"
    long = faults.explain_fault(ValueError("a\nb" * 1000), tmp_path, 512)
    assert "\n" not in long and len(long) == faults.MAX_LINE
