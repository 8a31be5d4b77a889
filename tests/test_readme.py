"""Every command and every Python example of the README and of docs/ runs as it is written there.

Each runs in a workspace whose folders are named like the placeholders of the pages (DIR, RUN, SUBMISSION, ...). Flags are
only appended, to make trainings short. A recipe for a large data set is planned instead of run, and so are the jobs for a
GPU. A scaling plan is a tiny one. Most commands run inside this process; REAL lists those that run as their own processes.
"""

from __future__ import annotations

import collections
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures.zoo import make
from tests.helpers.commands import PROJECT, SMALL, Compress
from tests.helpers.folders import draw_folder
from tests.helpers.onnx_graphs import drawn as numbers, node, with_head, written
from tests.helpers.sharing import shared_folder
from tests.helpers.walls import WEAK_FLAGS

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
TINY = ["data.name=image_folder", "data.root=TINY_IMAGES", "data.resize=8", "data.crop=8", "data.validation_fraction=0.25",
        "teacher.options.width=4", "teacher.floor=0", "distill.options.width=8", "prune.multiple=4", "threads=1",
        *(f"{stage}.train.{setting}" for stage in ("teacher", "distill", "finetune")
          for setting in ("epochs=1", "batch_size=16"))]
STATIC = ["quantize_static.max_drop=0.9", "quantize_static.portable=false", "quantize_static.budget_seconds=0.01",
          "prune.allow_slower=true", "quantize_static.allow_slower=true"]
FINISHED = [*SMALL, "prune.ratio=0.4", "name=small"]  # the settings of the small run, which this command then continues
# What makes a command short: the first rule whose pattern is in the command appends its words.
SHORTER = [
    (r"compress search", [*TINY[:6], "distill.options.width=8", "teacher.train.epochs=1", "distill.train.epochs=1",
                          "distill.control=false", "threads=1", "search.samples=6", "search.criteria=l2", "--minutes",
                          "0.5"]),
    (r"compress run slim_resnet18_digits_static", [*TINY, *STATIC]),
    (r"compress run slim_resnet18_digits\b", FINISHED),
    (r"compress train --config", ["--num_epochs", "1", "--max_steps", "4", "--threads", "1"]),
    (r"scaling run", ["--num_epochs", "1", "--threads", "1"]),
    (r"scaling fit", ["--bootstrap", "50", "--no_plots"]),
    (r"model_loader.py --task", ["--threads", "1", *WEAK_FLAGS]),
    (r"model_loader.py --submission_dir", ["--runs", "10"]),
    (r"benchmarks.gpu", ["--dry_run"]),
]
REAL = ["python -m compress recipes", "python -m torch.distributed.run", "--baseline_accuracy 80"]
# What is long, and what other tests of the quick suite do too: run a recipe with the stage quantize_static, evaluate a
# solution, plan with a network of timm.
SLOW = ["python -m torch.distributed.run", "compress run slim_resnet18_digits_static", "model_loader.py --task",
        "compress run slim_resnet18_100", "compress run slim_resnet18_tinyimagenet100", "compress search"]
SLOW_EXAMPLES = {("python_api", 0)}  # page, and which of its examples
PLAN = """dataset: digits
batch_size: 64
num_epochs: 1
sweeps: [{kind: width, widths: [2], depth: 1, dataset_size: 100}]
"""
MY_RECIPE = """data: {name: image_folder, root: TINY_IMAGES, resize: 8, crop: 8, validation_fraction: 0.25}
threads: 1
stages:
  - teacher: {options: {width: 4, stem: small}, floor: 0, train: {epochs: 1, batch_size: 16}}
  - distill: {options: {width: 8, stem: small}, train: {epochs: 1, batch_size: 16}}
  - prune: {multiple: 4, allow_slower: true}
  - package
"""
MY_NET = """from torch import nn

class MyNet(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))
"""


def blocks(language: str) -> list[tuple[str, str]]:
    """The name of the page and the text of each fenced block in a language."""
    return [(page.stem, block) for page in PAGES
            for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)]


def commands() -> list[tuple[str, str]]:
    """The page and the text of every command, each command once."""
    found: dict[str, str] = {}
    for page, block in blocks("sh"):
        for line in block.replace("\\\n", "").splitlines():
            if line.strip():
                found.setdefault(line.split(" #")[0].strip(), page)
    return [(page, command) for command, page in found.items()]


TESTED = [(page, command) for page, command in commands() if not command.startswith("make ")]


def write_law(path: Path) -> None:
    """Write runs of the study's CNN whose loss is a law of N and D, with a little noise."""
    rows = [(n, d, (0.4 + 6 / n**0.35 + 20 / d**0.4) * (1 + 0.01 * ((n * 7 + d) % 5 - 2)))
            for n in (1774, 6286, 23_654, 91_702) for d in (1000, 2500, 10_000, 50_000)]
    path.parent.mkdir(parents=True)
    path.write_text("N,D,epochs,dataset,status,final_test_loss_avg_last5\n" + "".join(
        f"{n},{d},20,cifar10,done,{loss:.5f}\n" for n, d, loss in rows))


def write_own_models(folder: Path) -> None:
    """Write a network of one's own with its weights, and somebody's ONNX file, both for the classes of DIR."""
    (folder / "my_net.py").write_text(MY_NET)
    torch.save(make(f"file:{folder / 'my_net.py'}:MyNet", num_classes=100).state_dict(), folder / "mine.pth")
    stem = [node("Conv", "x stem", "features", strides=[4, 4]), node("Relu", "features", "rectified")]
    nodes, constants = with_head(stem, "rectified", 16)
    constants |= {"stem": numbers(16, 3, 3, 3), "head.weight": numbers(100, 16), "head.bias": numbers(100)}
    written(folder / "theirs.onnx", nodes, constants, image=("n", 3, 224, 224), output=("n", 100))


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image folders that stand for data sets."""
    def draw(folder: Path) -> None:
        draw_folder(folder / "DIR", classes=100, images=2, size=32)
        draw_folder(folder / "CIFAR10", classes=10, images=4, size=32)
        draw_folder(folder / "TINY_IMAGES", classes=4, images=16, size=8)

    return shared_folder(tmp_path_factory, "drawn", draw)


@pytest.fixture
def workspace(drawn: Path, small_run: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder but for what the pages' placeholders name."""
    for folder in drawn.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    (tmp_path / "SETS").mkdir()
    (tmp_path / "SETS" / "cifar10").symlink_to(drawn / "CIFAR10")
    shutil.copytree(small_run, tmp_path / "RUN")
    shutil.copytree(small_run, tmp_path / "runs" / "small")
    for name in ("SUBMISSION", "OTHER_SUBMISSION"):
        shutil.copytree(small_run / "submission", tmp_path / name)
    shutil.copytree(few, tmp_path / "TEST_IMAGES")
    (tmp_path / "my_recipe.yaml").write_text(MY_RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepared(command: str, workspace: Path, request: pytest.FixtureRequest) -> list[str]:
    """The words of a command, with files of the project by their full path and what makes it short appended."""
    words = [str(PROJECT / word) if word.endswith(".py") and (PROJECT / word).is_file() else word
             for word in shlex.split(command)]
    if "theirs.onnx" in command or "my_net.py" in command:
        write_own_models(workspace)
    if "MNIST" in words:
        words[words.index("MNIST")] = str(request.getfixturevalue("real_mnist"))
    if "final_data.csv" in command:
        write_law(workspace / "STUDY" / "results" / "final_data.csv")
    if "scaling sweep" in command or "scaling plan" in command:
        (workspace / "tiny.yaml").write_text(PLAN)
        words[words.index("digits")] = "tiny.yaml"
    if "data.root=" in command:
        words[words.index("run") if "run" in words else words.index("plan")] = "plan"
    return words + next((added for pattern, added in SHORTER if re.search(pattern, command)), [])


@pytest.mark.parametrize(("page", "command"), [
    pytest.param(page, command, id=f"{page}: {command[:60]}",
                 marks=[pytest.mark.slow] if any(part in command for part in SLOW) else []) for page, command in TESTED])
def test_command_runs(page: str, command: str, workspace: Path, request: pytest.FixtureRequest) -> None:
    words = prepared(command, workspace, request)
    assert words[0] == "python", command
    if any(part in command for part in REAL):
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
        return
    if words[1:3] == ["-m", "compress"]:
        compress: Compress = request.getfixturevalue("compress")
        ran = compress(*words[3:])
        assert ran.returncode == 0, ran.stdout[-1500:] + ran.stderr[-1500:]
        return
    if words[1:3] == ["-m", "benchmarks.gpu"]:
        from benchmarks import gpu
        assert gpu.main(words[3:]) == 0
        return
    assert words[1] == str(PROJECT / "model_loader.py"), command
    import model_loader
    assert model_loader.main(words[2:]) == 0


def test_some_commands_run_as_processes_of_their_own() -> None:
    assert [sum(part in command for _, command in TESTED) for part in REAL] == [1, 1, 1] and len(TESTED) > 25


def examples() -> list[Any]:
    """The page and the code of each Python example."""
    counts: collections.Counter[str] = collections.Counter()
    found = []
    for page, code in blocks("python"):
        marks = [pytest.mark.slow] if (page, counts[page]) in SLOW_EXAMPLES else []
        found.append(pytest.param(page, code, id=f"{page} {counts[page]}", marks=marks))
        counts[page] += 1
    return found


@pytest.mark.parametrize(("page", "code"), examples())
def test_python_example_runs(page: str, code: str, workspace: Path) -> None:
    exec(compile(code, f"{page}.md", "exec"), {"__name__": page})


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Commands set the number of threads for their process."""
    torch.set_num_threads(1)


def test_readme_starts_with_the_two_commands_and_is_short() -> None:
    readme = (PROJECT / "README.md").read_text()
    assert [command for _, command in commands()[:2]] == ["make demo", "make test"]
    makefile = (PROJECT / "Makefile").read_text()
    assert "run slim_resnet18_digits" in makefile and '-m "not slow"' in makefile
    assert len(readme.splitlines()) < 150
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
    assert all(f"docs/{page.name}" in readme for page in PAGES[1:])
