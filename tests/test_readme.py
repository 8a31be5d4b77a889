"""The README's commands are run, as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import PROJECT, SMALL
from tests.helpers.folders import draw_folder


STATIC = ["quantize_static.max_drop=0.5", "quantize_static.portable=false", "quantize_static.budget_seconds=0.01"]


def commands() -> list[str]:
    """Every line of the README's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines() if line.strip()]


def test_readme_starts_with_the_two_commands() -> None:
    found = commands()
    assert [line.split("#")[0].strip() for line in found[:2]] == ["make demo", "make test"]
    makefile = (PROJECT / "Makefile").read_text()
    assert "run slim_resnet18_digits" in makefile and '-m "not slow"' in makefile
    for line in found:
        if line.startswith("make"):
            assert f"\n{line.split()[1]}:" in makefile, line


def write_law(path: Path) -> None:
    """Runs of the study's CNN whose loss is a law of N and D, with a little noise."""
    rows = [(n, d, (0.4 + 6 / n**0.35 + 20 / d**0.4) * (1 + 0.01 * ((n * 7 + d) % 5 - 2)))
            for n in (1774, 6286, 23_654, 91_702) for d in (1000, 2500, 10_000, 50_000)]
    path.parent.mkdir(parents=True)
    path.write_text("N,D,epochs,dataset,status,final_test_loss_avg_last5\n" + "".join(
        f"{n},{d},20,cifar10,done,{loss:.5f}\n" for n, d, loss in rows))


@pytest.mark.parametrize("command", [line for line in commands() if not line.startswith("make")])
def test_readme_command_runs(command: str, small_run: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Each command with its placeholders filled in; runs are shortened, real data sets are planned instead of trained."""
    words = command.split("#")[0].split()
    images = tmp_path / "images"
    filled = {"DIR": str(images), "CIFAR10": str(images), "RUN": str(small_run), "OUT": str(tmp_path / "out"),
              "TEST_IMAGES": str(small_run / "07-evaluate" / "test_images"), "SUBMISSION": str(small_run / "submission"),
              "OTHER_SUBMISSION": str(small_run / "submission")}
    words = [re.sub(r"\b(" + "|".join(filled) + r")\b", lambda match: filled[match[0]], word) for word in words]
    assert words[0] == "python", command
    if "run" in words and any(word.startswith("slim_resnet18_digits") for word in words):
        words += [f"run_dir={tmp_path}", *SMALL, *(STATIC if "static" in command else [])]
    elif "train" in words or "mnist_challenge" in words:
        if "MNIST" in words:
            words[words.index("MNIST")] = str(request.getfixturevalue("real_mnist"))
        if "--config" in words and "--data_root" in words:
            draw_folder(images, 100 if "cifar100" in command else 10, 3, size=32)
        if "--config" in words:
            words += ["--num_epochs", "1", "--log_dir", str(tmp_path / "log"), "--threads", "1"]
    elif any(word.startswith("data.root=") for word in words):
        classes = 10 if "cifar10" in command else 100
        draw_folder(images, classes, 3, size=32)
        words[words.index("run")] = "plan"
    if "scaling" in words:
        study = tmp_path / "study"
        words = [word.replace("STUDY", str(study)) for word in words]
        if "sweep" in words:  # of the packaged plan, one point
            plan = tmp_path / "plan.yaml"
            plan.write_text("dataset: digits\nbatch_size: 64\nnum_epochs: 1\nsweeps: [{kind: width, widths: [2], depth: 1, "
                            "dataset_size: 100}]\n")
            words[words.index("digits")] = str(plan)
        if "final_data.csv" in command:
            write_law(study / "results" / "final_data.csv")
    if "--task" in words:
        words += ["--threads", "1"]  # other tests keep the other core busy
    if "--output_file" in words:
        words[words.index("--output_file") + 1] = str(tmp_path / "results.json")
    done = subprocess.run([sys.executable, *words[1:]], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
