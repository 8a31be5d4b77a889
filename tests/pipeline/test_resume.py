"""Interrupted runs: killed, out of disk, started twice. Each continues, and ends with the same bits."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import Compress, PROJECT, SMALL, assert_one_line_error
from tests.helpers.ledgers import metrics, weights

STEPS = 32  # of each training: 48 images, batches of 6, 4 epochs


@pytest.mark.parametrize(("recipe", "stage", "file"), [
    pytest.param("two_stages", "01-teacher", "checkpoint.pth", marks=pytest.mark.slow),
    ("two_stages", "02-distill", "checkpoint-student.pth"),
    pytest.param("four_stages", "04-finetune", "checkpoint.pth", marks=pytest.mark.slow)])
def test_killed_run_continues_to_the_same_weights_bit_for_bit(recipe: str, stage: str, file: str, tiny_run: Path,
                                                              compress: Compress, tmp_path: Path,
                                                              request: pytest.FixtureRequest) -> None:
    """SIGKILL in the middle of a training stage; nobody interrupted `tiny_run`."""
    trainings = ["teacher", "distill", *(["finetune"] if recipe == "four_stages" else [])]
    command = ["run", str(request.getfixturevalue(recipe)), f"run_dir={tmp_path}", "name=tiny",
               *(f"{name}.train.checkpoint_seconds=0" for name in trainings)]
    checkpoint = tmp_path / "tiny" / stage / file
    for _ in range(5):  # on a busy machine this process may look too late
        with subprocess.Popen([sys.executable, "-m", "compress", *command], cwd=PROJECT, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, start_new_session=True) as process:
            patience = time.monotonic() + 300
            while not checkpoint.exists() and process.poll() is None and time.monotonic() < patience:
                time.sleep(0.002)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        step = torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else STEPS
        if 0 < step < STEPS and not checkpoint.with_name("stage.json").exists():
            break
        shutil.rmtree(tmp_path / "tiny")
    assert 0 < step < STEPS, f"killed at step {step} of {STEPS}, not in the middle"
    assert not checkpoint.with_name("stage.json").exists()
    done = compress(*command)
    assert done.returncode == 0, done.stderr
    assert f"continuing at step {step}" in done.stdout
    one, other = weights(tmp_path / "tiny"), weights(tiny_run)
    assert f"{stage}/weights.pth" in one and one == {name: other[name] for name in one}
    epochs = metrics(tmp_path / "tiny")
    assert len(epochs) == 4 * len(trainings) and epochs == metrics(tiny_run)[:len(epochs)]


def test_full_disk_gets_one_line_and_the_run_goes_on_later(two_stages: Path, tiny_run: Path, compress: Compress,
                                                           tmp_path: Path) -> None:
    """A limit on the size of a file stands in for a full disk: the teacher's weights do not fit, then they do."""
    command = ["run", two_stages, f"run_dir={tmp_path}", "name=tiny"]
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40 * 1024, most))
    try:
        done = compress(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    assert_one_line_error(done, "no half-written file")
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("weights.pth"))
    done = compress(*command)
    assert done.returncode == 0, done.stderr
    one, other = weights(tmp_path / "tiny"), weights(tiny_run)
    assert len(one) == 2 and one == {name: other[name] for name in one}


def test_two_processes_cannot_share_a_run(compress: Compress, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    with (tmp_path / "small" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = compress("run", "slim_resnet18_digits", f"run_dir={tmp_path}", "name=small", *SMALL)
    assert_one_line_error(done, "another process is using this folder")
