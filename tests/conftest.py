"""Shared by the tests: the real command line, a small real run, and image folders drawn on the spot."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

PROJECT = Path(__file__).parents[1]
SMALL = ["teacher.options.width=8", "teacher.train.epochs=4", "teacher.floor=0.3", "distill.options.width=16",
         "distill.train.epochs=4", "distill.control=false", "prune.multiple=4", "finetune.train.epochs=4", "threads=1"]

torch.set_num_threads(1)

Compress = Callable[..., "subprocess.CompletedProcess[str]"]


def run_compress(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs `python -m compress` from the project's root."""
    return subprocess.run([sys.executable, "-W", "error::DeprecationWarning:compress", "-m", "compress",
                           *map(str, arguments)], cwd=PROJECT, capture_output=True, text=True, timeout=timeout,
                          check=False)


@pytest.fixture
def compress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Compress:
    """The same command line inside this process, which spares each call the seconds of importing torch."""
    from compress.cli import main

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code
        return subprocess.CompletedProcess(sys.argv, code if isinstance(code, int) else 1, captured.out, captured.err)

    return run


def assert_one_line_error(done: subprocess.CompletedProcess[str], *parts: str, code: int = 2) -> None:
    """The command failed with the exit code and one line on stderr that holds the parts."""
    assert done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for part in parts:
        assert part in lines[0], (part, lines[0])


def draw_folder(root: Path, classes: int, images: int, size: int = 12, splits: tuple[str, ...] = ("train", "test"),
                seed: int = 0) -> Path:
    """An image folder whose classes differ in colour, so that a network can learn them."""
    generator = np.random.default_rng(seed)
    for split in splits:
        for label in range(classes):
            folder = root / split / f"class_{label:03d}"
            folder.mkdir(parents=True)
            colour = np.array([label * 37 % 256, label * 101 % 256, label * 173 % 256])
            for index in range(images):
                noise = generator.integers(-30, 30, (size, size, 3))
                pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def real_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST's files, unpacked from the development machine's copy where that lies beside the project."""
    packed = PROJECT.parent / "shared" / "data" / "MNIST" / "raw"
    if not packed.is_dir():
        pytest.skip("needs the real MNIST in ../shared/data")
    root = tmp_path_factory.mktemp("real")
    (root / "MNIST" / "raw").mkdir(parents=True)
    for path in packed.glob("*.gz"):
        (root / "MNIST" / "raw" / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return root


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run on digits with narrow networks and few epochs, through the real command line."""
    runs = tmp_path_factory.mktemp("runs")
    done = run_compress("run", "slim_resnet18_digits", f"run_dir={runs}", "name=small", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs / "small"


@pytest.fixture(scope="session")
def submission(small_run: Path) -> Path:
    """The packaged int8 submission of the small run."""
    return small_run / "submission"


@pytest.fixture(scope="session")
def digits_test(small_run: Path) -> Path:
    """The digits' test split as an image folder."""
    return small_run / "07-evaluate" / "test_images"
