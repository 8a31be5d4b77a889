"""Readers: whatever happens to the process of a submission, the evaluator answers, in time, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import model_loader
from compress.evaluation.channel import DONE, REPLY_HEADER, REQUEST_HEADER, Channel, ChildEndedError, Clock, OutOfTimeError
from compress.evaluation.contestant import Contestant
from compress.evaluation.nursery import nursery
from compress.evaluation.reader_runtime import ReaderRuntime, SubmissionReader
from compress.evaluation.runtimes import EvaluationSettings, load_model
from metadata.errors import VerificationError
from tests.helpers.processes import descendants
from tests.helpers.architectures import layer
from tests.helpers.submissions import weights_of, write_package

SHAPE = (2, 3, 8, 8)


@pytest.fixture
def reader(submission: Path) -> Iterator[SubmissionReader]:
    """A reader that has read the small run's package."""
    reader = SubmissionReader(submission, EvaluationSettings(), Clock(60))
    reader.read()
    yield reader
    reader.close()


@pytest.mark.parametrize("kind", ["submission", "onnx_package"])
def test_a_reader_answers_as_the_model_in_this_process(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    images = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    reader = SubmissionReader(folder, EvaluationSettings(), Clock(60))
    try:
        runtime = ReaderRuntime(reader, reader.read().backend)
        answered = runtime(images)
        assert runtime.stated_ms > 0 and runtime.versions["torch"] == torch.__version__
    finally:
        reader.close()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert np.array_equal(answered, load_model(folder)(torch.from_numpy(images)).detach().numpy())
    torch.set_num_threads(before)


def test_the_evaluators_clock_bounds_what_a_reader_says(reader: SubmissionReader) -> None:
    runtime = ReaderRuntime(reader, "torch")
    runtime.channel_ms = 0.5
    for stated, measured, counted in ((9.8, 10.0, 9.8), (0.0, 10.0, 9.5), (99.0, 10.0, 10.0), (-5.0, 10.0, 9.5),
                                      (-5.0, 0.4, 0.02)):
        runtime.stated_ms = stated
        assert runtime.duration_ms(measured) == pytest.approx(counted)


@pytest.mark.parametrize(("number", "said"), [
    (signal.SIGSEGV, "crashes the library"), (signal.SIGABRT, "may be too low"), (signal.SIGKILL, "out of memory"),
    (signal.SIGTERM, "SIGTERM")])
def test_a_reader_that_dies_is_told_of(number: signal.Signals, said: str, reader: SubmissionReader) -> None:
    os.kill(reader.process, number)
    with pytest.raises(ChildEndedError, match=f"signal {int(number)}, {number.name}") as caught:
        reader.command("hash")
    assert said in str(caught.value) and str(reader.folder) in str(caught.value)
    with pytest.raises(VerificationError):
        reader.command("hash")


def test_a_reader_that_does_not_answer_is_left_in_time(reader: SubmissionReader) -> None:
    os.kill(reader.process, signal.SIGSTOP)
    reader.clock.counted, start = reader.clock.seconds - 0.3, time.monotonic()
    with pytest.raises(OutOfTimeError, match="no answer within --time_limit_s 60"):
        reader.command("hash")
    assert time.monotonic() - start < 5
    process = reader.process
    reader.close()
    assert not Path(f"/proc/{process}").exists()


def test_a_reader_that_sleeps_is_left_before_the_time_is_over(reader: SubmissionReader,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.evaluation.reader_runtime.STALL_S", 0.3)
    reader.command("hash")
    time.sleep(0.5)  # nobody asked meanwhile: that is no stall
    reader.command("hash")
    os.kill(reader.process, signal.SIGSTOP)
    with pytest.raises(VerificationError, match=r"has slept for 0\.3 s"):
        reader.command("hash")


def test_a_model_that_needs_more_memory_than_it_may_take(tmp_path: Path) -> None:
    """1.1 GB between two layers, in a package of some hundred bytes."""
    wide = [layer("conv", "Conv2d", ["input"], in_channels=3, out_channels=16, kernel_size=[1, 1], padding=[2000, 2000]),
            layer("mean", "Mean", ["conv"], dim=[2, 3]), layer("fc", "Linear", ["mean"], in_features=16, out_features=3)]
    weights = {"conv.weight": torch.ones(16, 3, 1, 1), "conv.bias": torch.zeros(16), "fc.weight": torch.ones(3, 16),
               "fc.bias": torch.zeros(3)}
    folder = write_package(tmp_path / "package", wide, weights, macs=4008 * 4008 * 48 + 48)
    reader = SubmissionReader(folder, EvaluationSettings(memory_limit_mb=256), Clock(60))
    try:
        reader.read()
        runtime = ReaderRuntime(reader, "torch")
        with pytest.raises(VerificationError, match="more than --memory_limit_mb 256"):
            runtime(np.zeros((1, 3, 8, 8), np.float32))
        assert reader.command("hash")["hashes"] == reader.facts.hashes  # the reader lives on
    finally:
        reader.close()


def test_a_nursery_that_was_killed_is_replaced(submission: Path, reader: SubmissionReader) -> None:
    first = nursery()
    os.killpg(first.process.pid, signal.SIGKILL)
    with pytest.raises(VerificationError):
        reader.command("hash")
    first.process.wait()
    again = SubmissionReader(submission, EvaluationSettings(), Clock(60))
    assert again.read().hashes == reader.facts.hashes and nursery() is not first
    again.close()


# ---------------------------------------------------------------------------------------------------- the channel


def answer(channel: Channel, *replies: bytes) -> threading.Thread:
    """Play a child that answers requests with these bytes, whatever they are."""
    request, reply, _ = map(os.dup, channel.child_ends)
    channel.start()

    def play() -> None:
        for content in replies:
            nonce = os.read(request, REQUEST_HEADER.size)[:16]
            os.write(reply, content.replace(b"NONCE-NONCE-NONC", nonce))
        os.close(request)
        os.close(reply)

    thread = threading.Thread(target=play)
    thread.start()
    return thread


FORGED = {"another nonce": REPLY_HEADER.pack(bytes(16), DONE, 0),
          "an endless reply": REPLY_HEADER.pack(b"NONCE-NONCE-NONC", DONE, 2**40),
          "an unknown status": REPLY_HEADER.pack(b"NONCE-NONCE-NONC", 99, 0),
          "no object": REPLY_HEADER.pack(b"NONCE-NONCE-NONC", DONE, 2) + b"[]",
          "nested without end": REPLY_HEADER.pack(b"NONCE-NONCE-NONC", DONE, 10**4) + b"[" * 10**4}


@pytest.mark.parametrize("forged", FORGED)
def test_forged_replies_are_refused(forged: str) -> None:
    channel = Channel("the folder", Clock(10), 64)
    thread = answer(channel, FORGED[forged])
    with pytest.raises(VerificationError, match="the code wrote into the channel"):
        channel.receive_json(channel.request(np.zeros(1, np.float32)))
    thread.join()
    channel.close()


def test_a_channel_that_closes_early_and_inputs_that_do_not_fit() -> None:
    channel = Channel("the folder", Clock(10), 64)
    with pytest.raises(VerificationError, match="too large to send"):
        channel.request(np.zeros(2**20, np.float32))
    thread = answer(channel, REPLY_HEADER.pack(b"NONCE-NONCE-NONC", DONE, 100) + struct.pack("d", 1.0))
    with pytest.raises(ChildEndedError):
        channel.receive(channel.request(np.zeros(1, np.float32)))
    thread.join()
    channel.close()


# ------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_with_a_result(number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                     stopping_signals: None) -> None:
    def interrupted(options: Any) -> dict[str, Any]:
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("the signal was not taken")

    before = signal.getsignal(number)
    code = model_loader.main(["--submission_dir", "s", "--data_dir", "d", "--output_file", str(tmp_path / "r.json")],
                             interrupted)
    assert code == 128 + number and number.name in capsys.readouterr().err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["total_score"] == 0 and f"stopped by {number.name}" in result["details"]["status"]
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_nothing_is_left_of_an_evaluator_that_is_ended(number: signal.Signals, submission: Path, few: Path,
                                                       tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with subprocess.Popen(
            [sys.executable, model_loader.__file__, "--submission_dir", str(submission), "--data_dir", str(few),
             "--output_file", str(tmp_path / "r.json"), "--runs", "1000000"], stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(temporary)}) as evaluator:
        until = time.monotonic() + 60
        while len(started := descendants(evaluator.pid)) < 2 and time.monotonic() < until:  # the nursery and its reader
            time.sleep(0.05)
        assert len(started) >= 2
        evaluator.send_signal(number)
        assert evaluator.wait(30) == (128 + number if number == signal.SIGTERM else -number)
    until = time.monotonic() + 10
    while any(Path(f"/proc/{process}").exists() for process in started) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [process for process in started if Path(f"/proc/{process}").exists()]
    assert list(temporary.iterdir()) == []
    if number == signal.SIGTERM:
        assert "SIGTERM" in json.loads((tmp_path / "r.json").read_text())["details"]["status"]


# --------------------------------------------------------------------------------------------- places and environments


def test_a_relative_folder_is_the_one_of_now(submission: Path, onnx_package: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    for place, folder in (("one", submission), ("two", onnx_package)):
        shutil.copytree(folder, tmp_path / place / "s")
    for place, kind in (("one", "graph"), ("two", "onnx")):  # the nursery was started before, somewhere else
        monkeypatch.chdir(tmp_path / place)
        reader = SubmissionReader(Path("s"), EvaluationSettings(), Clock(60))
        assert reader.read().kind == kind
        reader.close()


@pytest.mark.slow
def test_packages_that_only_pythonpath_finds_are_found(submission: Path, few: Path, tmp_path: Path) -> None:
    packages = sysconfig.get_path("purelib")
    done = subprocess.run(
        [os.path.realpath(sys.executable), "-S", model_loader.__file__, "--submission_dir", str(submission), "--data_dir",
         str(few), "--output_file", str(tmp_path / "r.json"), "--runs", "5", "--warmup", "0"],
        env={"PYTHONPATH": packages, "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_evaluator_imports_where_linux_has_its_own_modules(submission: Path) -> None:
    """As on Windows: no fcntl, no resource, few signals. `load_model` works there; an evaluation says what it needs."""
    script = """import os, signal, sys
sys.path.insert(0, sys.argv[1])
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in ("SIGHUP", "SIGKILL", "SIGXCPU"):
    delattr(signal, name)
del os.memfd_create
import model_loader
model_loader.load_model(sys.argv[2])
try:
    model_loader.evaluate_submission(sys.argv[2], sys.argv[2])
except Exception as error:
    print(type(error).__name__, error)"""
    done = subprocess.run([sys.executable, "-c", script, str(Path(model_loader.__file__).parent), str(submission)],
                          capture_output=True, text=True, check=False)
    assert "UserError the evaluator runs each submission in a Linux process" in done.stdout, done.stderr


def test_a_folder_that_changes_and_changes_back_is_found_out(submission: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(submission, tmp_path / "s"))
    contestant = Contestant(folder, EvaluationSettings())
    with contestant:
        contestant.facts = contestant.reader.read()
        contestant.runtime = ReaderRuntime(contestant.reader, "torch")
        weights = weights_of(folder)
        content, times = weights.read_bytes(), weights.stat()
        weights.write_bytes(b"another file for a moment")
        weights.write_bytes(content)
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(VerificationError, match="the folder changed while its model ran"):
            contestant.finish()
