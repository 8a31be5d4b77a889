"""Submissions with their own model.py: the variants that people have, and code that cheats, breaks out or breaks down."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import shutil
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.evaluation.distributions import reach
from compress.evaluation.evaluate import evaluate_submission
from compress.evaluation.runtimes import EvaluationSettings
from compress.evaluation.sandbox import check_hidden
from compress.evaluation.submission import read_submission
from metadata.errors import UserError
from tests.helpers.marks import slow_but
from tests.helpers.submissions import compressed_text
from tests.helpers.verdicts import Evaluate, assert_refused
from tests.helpers.walls import code_settings, warnings_of_the_walls

ALLOW = "--allow_code"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "folder"))


def edit(folder: Path, **changes: Any) -> None:
    """Changes keys of the metadata; None removes one."""
    path = folder / "metadata.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def append(code: str) -> Callable[[Path], Any]:
    """Adds lines to the end of model.py."""
    return lambda folder: (folder / "model.py").write_text((folder / "model.py").read_text() + "\n" + code)


def wrap(forward: str, before: str = "") -> Callable[[Path], Any]:
    """Replaces the class by one whose forward does something else with `honest`, the real one's."""
    body = "\n".join("        " + line for line in forward.splitlines())
    return append(f"import os, sys, time, torch\nhonest = SlimResNet18.forward\n{before}\nclass Other(SlimResNet18):\n"
                  f"    def forward(self, x):\n{body}\n    __name__ = 'SlimResNet18'\n"
                  "Other.__name__ = 'SlimResNet18'\nSlimResNet18 = Other\n")


# ----------------------------------------------------------------------------------------------------- the variants


def test_code_runs_only_when_allowed(folder: Path, evaluate: Evaluate) -> None:
    append("open('executed', 'w')")(folder)
    assert_refused(evaluate(folder), "only with --allow_code", code=2)
    assert_refused(evaluate(folder, ALLOW, "--batch_size", "8"), "graded at batch 1", code=2)
    assert not list(folder.glob("**/executed"))


def test_same_answers_as_the_package(folder: Path, honest: dict[str, Any], evaluate: Evaluate) -> None:
    package = honest
    # The import of torch's compiler takes as long as that of torch itself.
    wrap("assert 'torch._dynamo' not in sys.modules\nreturn honest(self, x)")(folder)
    code, result, error = evaluate(folder, ALLOW)
    assert code == 0, error
    details = result["details"]
    assert details["accuracy"]["predictions_sha256"] == package["details"]["accuracy"]["predictions_sha256"]
    assert details["parameters"]["all"] == package["details"]["parameters"]["all"]
    named = sum(len(path.name) for path in folder.iterdir())  # names can hold numbers
    assert details["macs"] == package["details"]["macs"]
    weights = (folder / "best_weights.pth").stat().st_size
    assert result["model_size"] * 2**20 == weights + named + compressed_text(folder)
    assert package["model_size"] * 2**20 == weights
    assert details["preprocessing"]["stated_by"] == "metadata.json"
    assert details["bytes"]["needed_at_inference"] == named + sum(path.stat().st_size for path in folder.iterdir())
    assert any("lie in buffers" in warning for warning in details["warnings"])  # int8 weights do
    if platform.system() == "Linux":
        states = details["sandbox"]["protection"]
        off = [f"sandbox: {what} {state}" for what, state in states.items() if not state.startswith("on")]
        assert off == warnings_of_the_walls() and set(off) <= set(details["warnings"])


@pytest.mark.parametrize("change", [
    dict(model_format="pytorch"), dict(model_format="pt"), dict(model_format=".pth"), dict(model_format=None),
    dict(weights_file="best_weights.pth"), dict(model_file="best_weights.pth"), dict(num_classes=None, pruning_rate=None),
    dict(model_name="my best net"), dict(model_class="SlimResNet18", team=None), dict(input_shape=[1, 3, 8, 8]),
], ids=lambda change: "-".join(map(str, change)))
def test_metadata_in_the_variants_seen_in_the_wild(change: dict[str, Any], folder: Path) -> None:
    edit(folder, **change)
    if "team" in change:
        (folder / "metadata.json").rename(folder / "model_metadata.json")
    files = read_submission(folder)
    assert files.kind == "code" and files.weights.name == "best_weights.pth" and files.preprocessing.crop == 8


@pytest.mark.parametrize(("stated", "resize", "crop"), [
    (None, 256, 224), ({"resize": [40, 40], "center_crop": 32}, 40, 32), ({"resize": 36, "input_size": [32, 32]}, 36, 32),
    ({"resize_size": 48, "crop_size": 40, "normalization": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}, 48, 40),
])
def test_preprocessing_is_read_or_the_originals(stated: Any, resize: int, crop: int, folder: Path) -> None:
    edit(folder, preprocessing=stated)
    files = read_submission(folder)
    assert (files.preprocessing.resize, files.preprocessing.crop) == (resize, crop)
    assert files.preprocessing.mean == ([0.1, 0.2, 0.3] if stated and "normalization" in stated else [0.485, 0.456, 0.406])
    assert ("original's default" in files.preprocessing_from) == (stated is None)
    assert files.input_shape == (3, crop, crop)


@pytest.mark.slow
def test_a_class_is_found_without_being_named_and_checkpoints_are_unwrapped(folder: Path, evaluate: Evaluate,
                                                                            honest: dict[str, Any]) -> None:
    weights = torch.load(folder / "best_weights.pth", weights_only=True)
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}},
               folder / "best_weights.pth")
    edit(folder, model_name=None)
    code, result, error = evaluate(folder, ALLOW)
    assert code == 0, error
    assert result["details"]["sandbox"]["model_class"] == "SlimResNet18" and result["accuracy"] == honest["accuracy"]


# ---------------------------------------------------------------------------------------------- what must be refused


def pickle_with_code(folder: Path) -> None:
    buffer = io.BytesIO()
    torch.save({}, buffer)
    evil = b"cos\nsystem\n(S'touch " + str(folder / "executed").encode() + b"'\ntR."
    with zipfile.ZipFile(io.BytesIO(buffer.getvalue())) as old, zipfile.ZipFile(folder / "best_weights.pth", "w") as new:
        for item in old.namelist():
            new.writestr(item, evil if item.endswith("data.pkl") else old.read(item))


def poisoned(folder: Path) -> None:
    weights = torch.load(folder / "best_weights.pth", weights_only=True)
    weights["fc.bias"][0] = float("nan")
    torch.save(weights, folder / "best_weights.pth")


def other_weights(folder: Path) -> None:
    weights = torch.load(folder / "best_weights.pth", weights_only=True)
    del weights["fc.bias"]
    torch.save(weights, folder / "best_weights.pth")


def contradicted(folder: Path) -> None:
    (folder / "trained_pruned_architecture.json").write_text(json.dumps({"layers": [
        {"name": "conv1", "pruning_info": {"remaining_channels": 1000}}]}))
    edit(folder, architecture_file="trained_pruned_architecture.json")


def linked(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        outside = folder.parent / f"outside_{name}"
        (folder / name).rename(outside)
        os.symlink(outside, folder / name)
    return change


# What the sandbox refuses. What is not in bubblewrap's view of the disk is not found.
FORBIDDEN: dict[str, str] = {
    "forks": "import os; os.fork()",
    "starts a program": "import subprocess; subprocess.run(['true'])",
    "opens a connection": "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "reads the project": f"open({str(Path(__file__))!r}).read()",
    "writes elsewhere": "open('/tmp/written_by_a_submission', 'w')",
    "kills its parent": "import os; os.kill(os.getppid(), 9)",
    "looks into its parent": "import os; open(f'/proc/{os.getppid()}/environ').read()",
    "kills its parent by its thread":
        "import ctypes, os\nif ctypes.CDLL(None).syscall(234, os.getppid(), os.getppid(), 9): raise PermissionError",
    "cuts the shared memory short":
        "import os\nfor fd in range(3, 40):\n    try: size = os.fstat(fd).st_size\n    except OSError: continue\n"
        "    if size == 2**26: os.ftruncate(fd, 0)",
    "hoards in nameless memory": "import os; os.memfd_create('hoard')",
    "makes a device": "import os, stat; os.mknod('disk', stat.S_IFBLK | 0o600, os.makedev(254, 0))",
    "bends the clock": "import ctypes\nb = ctypes.create_string_buffer(256)\nb[0] = b'\\x00'\n"
                       "if ctypes.CDLL(None).syscall(159, b) < 0: raise PermissionError",
    "changes its schedule": "import os; os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))",
}

REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "metadata missing": (lambda f: (f / "metadata.json").unlink(), "there is neither"),
    "metadata no JSON": (lambda f: (f / "metadata.json").write_text("{'a': 1}"), "not valid JSON"),
    "metadata huge": (lambda f: os.truncate(f / "metadata.json", 2**25), "over JSON's limit"),
    "unknown format": (lambda f: edit(f, model_format="keras"), "model_format"),
    "unknown schema": (lambda f: edit(f, schema=7), "schema"),
    "weights missing": (lambda f: (f / "best_weights.pth").unlink(), "0 files end in"),
    "weights named but missing": (lambda f: [edit(f, weights_file="other.pth"), (f / "best_weights.pth").unlink()],
                                  "names weights_file 'other.pth', which it does not hold, and 0 files end in"),
    "weights empty": (lambda f: (f / "best_weights.pth").write_bytes(b""), "the file is empty"),
    "weights huge": (lambda f: os.truncate(f / "best_weights.pth", 2**33), "over the limit"),
    "two candidates": (lambda f: shutil.copy(f / "best_weights.pth", f / "a.pt"), "2 files end in"),
    "weights outside": (lambda f: [edit(f, weights_file="a/../../w.pth"),
                                   (f / "best_weights.pth").rename(f.parent / "w.pth")], "which it does not hold"),
    "weights linked outside": (linked("best_weights.pth"), "outside the submission"),
    "model.py linked outside": (linked("model.py"), "outside the submission"),
    "model.py missing": (lambda f: (f / "model.py").unlink(), "does not fit torchvision's ResNet18"),
    "a device": (lambda f: os.mkfifo(f / "pipe"), "neither a file nor a folder"),
    "pickle with code": (pickle_with_code, "best_weights.pth holds int"),
    "NaN in the weights": (poisoned, "NaN"),
    "other weights": (other_weights, "Missing key(s)"),
    "pruning info lies": (contradicted, "remaining_channels is 1000"),
    "syntax error": (append("def"), "SyntaxError"),
    "no class": (lambda f: (f / "model.py").write_text("x = 1"), "defines no nn.Module"),
    "raises at import": (append("raise ValueError('two\\nlines')"), "ValueError: two"),
    "exits at import": (append("import sys; sys.exit(0)"), "SystemExit"),
    "os._exit at import": (append("import os; os._exit(0)"), "ended its process (exit code 0)"),
    "os._exit in forward": (wrap("os._exit(0)"), "ended its process (exit code 0)"),
    "loops for ever": (append("while True: pass"), "within --time_limit_s 1"),
    "loops in forward": (wrap("while True: pass"), "within --time_limit_s 1"),
    "eats memory": (append("hoard = [bytearray(2**24) for _ in range(10**6)]"), "MemoryError"),
    "facts too deep to parse": (append("import json; json.dumps = lambda *a, **k: '[' * 100000"), "wrote into the channel"),
    "raises its limits": (append("import resource; resource.setrlimit(resource.RLIMIT_AS, (1, 1)); a = bytearray(2**20)"),
                          "Error"),
    "few classes": (wrap("return honest(self, x)[:, :5]"), "for 10 classes"),
    "NaN answers": (wrap("return honest(self, x) * float('nan')"), "NaN or infinite"),
    "no tensor": (wrap("return [1]"), "returned list"),
    "complex numbers": (wrap("return honest(self, x).to(torch.complex64)"), "returned complex numbers"),
    "answers change": (wrap("return honest(self, x) + 3 * torch.randn(1, 10)"), "another answer when asked again"),
    "other answers later": (wrap("global calls; calls += 1\nreturn honest(self, x) if calls < 40 else torch.zeros(1, 10)",
                                 "calls = 0"), "another answer when asked again"),
    "floods the channel": (append("import os\nfor fd in range(3, 40):\n    try: os.write(fd, bytes(4096))\n"
                                  "    except OSError: pass"), "wrote into the channel"),
    "fills the disk": (append("import time\nfor i in range(99):\n    with open(f'{i}', 'wb') as f: f.write(bytes(2**23))\n"
                              "time.sleep(30)"), "wrote more than"),
    "a file too large": (append("f = open('x', 'wb')\nfor i in range(99): f.write(bytes(2**24))"), "File too large"),
    **{name: (append(code), "Error") for name, code in FORBIDDEN.items()},
}
# Each forbidden call has a child of its own in the slow suite; test_each_forbidden_call_is_refused tries all in one child.
# Too few classes are what the hostile opponent answers.
SLOW_ATTACKS = {*FORBIDDEN, "syntax error", "exits at import", "os._exit at import", "raises its limits", "no tensor",
                "NaN answers", "loops in forward", "answers change", "a file too large", "few classes", "no class",
                "complex numbers", "facts too deep to parse", "fills the disk", "model.py missing", "other weights",
                "other answers later", "os._exit in forward"}


@pytest.mark.parametrize("attack", slow_but(REFUSED, REFUSED.keys() - SLOW_ATTACKS))
def test_broken_and_hostile_code_scores_zero(attack: str, folder: Path, evaluate: Evaluate) -> None:
    change, said = REFUSED[attack]
    change(folder)
    # Time enough for a loaded machine to run honest code; what loops for ever needs none.
    limit = "1" if "loops" in attack else "60"
    assert_refused(evaluate(folder, ALLOW, "--time_limit_s", limit, "--memory_limit_mb", "1024"), said)
    assert not (folder / "executed").exists() and not Path("/tmp/written_by_a_submission").exists()
    assert children() == [], "a process outlives the evaluation"


def test_each_forbidden_call_is_refused(folder: Path, evaluate: Evaluate) -> None:
    append(f"""refused, others = 0, {{}}
for name, code in {FORBIDDEN!r}.items():
    try: exec(code, {{}})
    except (PermissionError, FileNotFoundError): refused += 1
    except OSError as error:
        if error.errno == 30: refused += 1  # a read-only file system
        else: others[name] = repr(error)
    except BaseException as error: others[name] = repr(error)
    else: others[name] = "done"
raise ValueError(f"{{refused}} calls refused, others: {{others}}")
""")(folder)
    assert_refused(evaluate(folder, ALLOW), f"{len(FORBIDDEN)} calls refused, others: {{}}")
    assert not Path("/tmp/written_by_a_submission").exists()


# ------------------------------------------------------------------------------- what must not change the result


HARMLESS: dict[str, tuple[Callable[[Path], Any], str | None]] = {
    "prints forged results": (append("print('{\"accuracy\": 100, \"total_score\": 999}', flush=True)"), "printed"),
    "patches time": (append("import time\ntime.perf_counter_ns = time.time = time.monotonic = lambda: 0"), None),
    "patches torch": (append("import torch\ntorch.Tensor.argmax = lambda self, *a: torch.zeros(1)\n"
                             "torch.get_num_threads = lambda: 0"), None),
    "changes its own folder": (append("import pathlib\nfor path in pathlib.Path('.').iterdir():\n"
                                      "    path.chmod(0o600); path.write_bytes(b'')"), None),
    "swallows what is refused": (append("import os\nfor call in (os.fork, lambda: open('/etc/shadow')):\n"
                                        "    try: call()\n    except OSError: pass"), None),
    "hides numbers in buffers": (wrap("return honest(self, x)"), "lie in buffers"),
    "hides numbers in a file": (lambda f: (f / "more.bin").write_bytes(bytes(2**20)), "files beside the weights"),
    "caches answers": (wrap("key = bytes(x.numpy())\nif key not in seen:\n    time.sleep(0.02)\n"
                            "    seen[key] = honest(self, x)\nreturn seen[key]", "seen = {}"), "answers are cached"),
    "makes folders without end": (append("import os\nfor _ in range(1500):\n    os.mkdir('d'); os.chdir('d')"), None),
    "has a class of an odd name": (append("import json\nreal = json.dumps\n"
                                          "json.dumps = lambda o, **k: real({**o, 'class': '\\ud800'})"), None),
    "creates and deletes in a race": (append(
        "import os, threading\ndef race():\n    while True:\n        open('r', 'w').close(); os.unlink('r')\n"
        "threading.Thread(target=race, daemon=True).start()"), None),
    "leaves threads behind": (append("import threading, time\n"
                                     "threading.Thread(target=lambda: time.sleep(99), daemon=True).start()"), None),
}
TOGETHER = ("prints forged results", "hides numbers in a file", "changes its own folder", "swallows what is refused",
            "has a class of an odd name", "leaves threads behind", "patches torch", "patches time")


HARMLESS["many together"] = (lambda folder: [HARMLESS[trick][0](folder) for trick in TOGETHER], None)
QUICK_TRICKS = ["many together", "caches answers"]


@pytest.fixture(scope="session")
def honest(submission: Path, few: Path) -> dict[str, Any]:
    """The result of the package that the original was made from."""
    return evaluate_submission(submission, few, settings=EvaluationSettings(runs=20, warmup=2))


@pytest.mark.parametrize("trick", slow_but(HARMLESS, QUICK_TRICKS))
def test_tricks_do_not_change_the_result(trick: str, folder: Path, evaluate: Evaluate, honest: dict[str, Any]) -> None:
    change, warned = HARMLESS[trick]
    change(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    begun = time.monotonic()
    code, result, error = evaluate(folder, ALLOW)
    assert code == 0, error
    assert result["accuracy"] == honest["accuracy"]
    assert result["details"]["accuracy"]["predictions_sha256"] == honest["details"]["accuracy"]["predictions_sha256"]
    assert 0 < result["latency"] < 1000 * (time.monotonic() - begun) / result["details"]["latency"]["runs"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for text in filter(None, [warned, *(HARMLESS[one][1] for one in TOGETHER if trick == "many together")]):
        assert any(text in warning for warning in result["details"]["warnings"]), result["details"]["warnings"]


def children() -> list[str]:
    """The sandboxes that this process has started and that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if b"evaluation/child.py" in (folder / "cmdline").read_bytes():
                found += [folder.name] if f"\nPPid:\t{os.getpid()}\n" in (folder / "status").read_text() else []
    return found


def test_data_that_code_could_read_are_refused() -> None:
    with pytest.raises(UserError, match="which the code may read"):
        check_hidden(Path(sysconfig.get_path("stdlib")) / "json")
    check_hidden(Path(sys.prefix))


def test_nothing_runs_where_code_could_read_the_data(folder: Path, few: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The test data lie in an installed package that code may read."""
    append("raise ValueError('the code ran')")(folder)
    installed, info = tmp_path / "installed", tmp_path / "installed" / "thop-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: thop\nVersion: 1.0\n")
    (info / "RECORD").write_text("thop/__init__.py,,\n")
    data = Path(shutil.copytree(few, installed / "thop" / "images"))
    (installed / "thop" / "__init__.py").touch()
    monkeypatch.syspath_prepend(installed)
    reach.cache_clear()
    try:
        with pytest.raises(UserError, match=r"lies under .*thop, which the code may read"):
            evaluate_submission(folder, data, settings=code_settings())
    finally:
        reach.cache_clear()


def test_a_hostile_opponent_costs_nobody_else_the_score(folder: Path, submission: Path, evaluate: Evaluate,
                                                        honest: dict[str, Any]) -> None:
    wrap("return honest(self, x)[:, :5]")(folder)
    code, result, error = evaluate(submission, ALLOW, "--compare", str(folder))
    assert code == 0 and result["accuracy"] == honest["accuracy"], error
    status = result["details"]["compare"]["status"]
    assert str(folder) in status and "for 10 classes" in status
    assert any("there is no comparison" in warning for warning in result["details"]["warnings"])


def test_reading_alone_does_not_run_anything(folder: Path) -> None:
    append("raise SystemExit('executed')")(folder)
    assert read_submission(folder).kind == "code"
