"""Shared by the tests: the real command line, a small real run, and image folders drawn on the spot."""

from __future__ import annotations

import gc
import gzip
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import PROJECT, SMALL, Compress, run_compress
from tests.helpers.sharing import shared_folder

pytest_plugins = ["tests.helpers.summary"]
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: two workers' would fight for two cores


def pytest_collection_finish() -> None:
    """Leave what importing made out of every later search for garbage, which takes half a second with it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Take back the threads that a run inside this process took: the next tests would fight with them for the cores."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def compress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Compress:
    """Run the command line inside this process, which spares each call the seconds of importing torch."""
    from compress.cli.main import main

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code
        return subprocess.CompletedProcess(sys.argv, code if isinstance(code, int) else 1, captured.out, captured.err)

    return run


@pytest.fixture
def stopping_signals() -> Iterator[None]:
    """Heed the signals that ask a process to stop, here and in processes that the test starts: a shell may ignore some."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="session")
def real_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST's files, unpacked from the development machine's copy where that lies beside the project."""
    packed = PROJECT.parent / "shared" / "data" / "MNIST" / "raw"
    if not packed.is_dir():
        pytest.skip("needs the real MNIST in ../shared/data")

    def unpack(root: Path) -> None:
        (root / "MNIST" / "raw").mkdir(parents=True)
        for path in packed.glob("*.gz"):
            (root / "MNIST" / "raw" / path.stem).write_bytes(gzip.decompress(path.read_bytes()))

    return shared_folder(tmp_path_factory, "mnist", unpack)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run on digits with narrow networks and few epochs, through the real command line."""
    def run(runs: Path) -> None:
        done = run_compress("run", "slim_resnet18_digits", f"run_dir={runs}", "name=small", *SMALL)
        assert done.returncode == 0, done.stdout + done.stderr

    return shared_folder(tmp_path_factory, "runs", run) / "small"


@pytest.fixture(scope="session")
def submission(small_run: Path) -> Path:
    """The packaged int8 submission of the small run."""
    return small_run / "submission"


@pytest.fixture(scope="session")
def digits_test(small_run: Path) -> Path:
    """The digits' test split as an image folder."""
    return small_run / "07-evaluate" / "test_images"


@pytest.fixture(scope="session")
def few(digits_test: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five test images of each digit, as an image folder."""
    def copy(folder: Path) -> None:
        for source in sorted(digits_test.iterdir()):
            (folder / source.name).mkdir()
            for image in sorted(source.iterdir())[:5]:
                shutil.copy(image, folder / source.name)

    return shared_folder(tmp_path_factory, "few", copy)
