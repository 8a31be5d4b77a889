"""The verb `search`: limits in, a packaged model out; killed searches go on; what cannot be is said in one line."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.pipeline.search_recipe import search_config
from compress.pipeline.stages.search import Search
from metadata.errors import UserError
from tests.helpers.commands import Compress, PROJECT, assert_one_line_error, run_compress
from tests.search.test_search_files import COLUMNS

QUICK = ["search.samples=6", "search.criteria=l2", "search.depth=false", "search.train.checkpoint_seconds=0"]
SMALL_STUDENT = ["distill.model=compact_net", "distill.options={widths: [16, 16, 16], depths: [1, 1, 1]}"]
STAGE = "03-search"


def front(folder: Path) -> list[dict[str, str]]:
    with (folder / STAGE / "front.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def record(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / STAGE / "stage.json").read_text())
    return content


# ------------------------------------------------------------------------------------------------------------ recipes


def test_a_search_takes_the_place_of_what_compresses_the_student() -> None:
    config = search_config("slim_resnet18_digits", ["seed=3", "search.depth=false"], {"size_kb": 96.0, "latency_ms": None})
    assert [next(iter(entry)) for entry in config.stages] == ["teacher", "distill", "search", "package", "evaluate"]
    assert (config.name, config.seed) == ("slim_resnet18_digits-search", 3)
    stage = Search.model_validate(config.stages[2]["search"])
    assert (stage.size_kb, stage.latency_ms, stage.depth, stage.temperature, stage.alpha) == (96.0, None, False, 2.0, 0.5)
    assert (stage.train.lr, stage.train.padding, stage.train.epochs) == (0.05, 1, 1000)  # of the stage finetune


def test_a_recipe_with_a_search_keeps_its_stages(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: {name: digits}\nstages:\n  - distill\n  - search: {size_kb: 50, minutes: 7}\n  - package\n")
    config = search_config(str(recipe), [], {"minutes": 2.0})
    assert config.stages == [{"distill": {}}, {"search": {"size_kb": 50, "minutes": 2.0}}, {"package": {}}]
    assert config.name == "mine"


def test_a_search_needs_a_student(tmp_path: Path) -> None:
    recipe = tmp_path / "teacher.yaml"
    recipe.write_text("data: {name: digits}\nstages:\n  - teacher\n")
    with pytest.raises(UserError, match="makes no student"):
        search_config(str(recipe), [], {"size_kb": 96.0})


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("arguments", "parts"), [
    ([], ["expected a limit, got none"]),
    (["--size_kb", 0], ["size_kb", "greater than 0"]),
    (["--size_kb", 9, "--minutes", 0], ["minutes", "greater than 0"]),
    (["--size_kb", 0.5], ["no sub-network is so small", "the least is"]),
    (["--min_accuracy", 96], ["min_accuracy", "less than or equal to 1"]),
    (["--size_kb", 9, "--backend", "tensorrt"], ["backend", "tensorrt"]),
    (["--size_kb", 9, "--threads", 0], ["threads"]),
    (["--size_kb", 9, "search.method=attention"], ["features are compared by the stage distill alone"]),
    (["--size_kb", 9, "--ray", "127.0.0.1:9"], ["--ray 127.0.0.1:9: no Ray cluster there"]),
    (["--size_kb", 9, "search.sample=6"], ["unknown key 'sample'", "did you mean 'samples'"])],
    ids=lambda value: " ".join(map(str, value))[:60])
def test_mistakes_get_one_line_and_leave_nothing(arguments: list[object], parts: list[str], tiny_recipe: Path,
                                                 compress: Compress, tmp_path: Path) -> None:
    done = compress("search", tiny_recipe, *arguments, f"run_dir={tmp_path / 'runs'}")
    assert_one_line_error(done, *parts)
    assert not (tmp_path / "runs").exists()


def test_a_runtime_that_is_not_installed_is_named(tiny_recipe: Path, compress: Compress, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    done = compress("search", tiny_recipe, "--size_kb", 9, "--backend", "openvino", f"run_dir={tmp_path / 'runs'}")
    assert_one_line_error(done, "search.backend openvino: the package is not installed")


# ------------------------------------------------------------------------------------------------------ whole searches


def test_a_limit_of_bytes_gives_a_packaged_model_that_keeps_it(tiny_recipe: Path, compress: Compress,
                                                               tmp_path: Path) -> None:
    command = ["search", tiny_recipe, "--size_kb", 9, "--minutes", 0.1, "--backend", "torch", *QUICK, *SMALL_STUDENT,
               f"run_dir={tmp_path}"]
    done = compress(*command)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny-search"
    rows, notes = front(folder), record(folder)["notes"]
    assert [*rows[0]][:len(COLUMNS)] == COLUMNS
    answer = next(row for row in rows if row["status"] == "answer")
    assert answer["form"] == "int8_dynamic" and int(answer["size_bytes"]) <= 9_000
    weights, = (folder / "submission").glob("compressed_*.pth")
    assert weights.stat().st_size == int(answer["size_bytes"]) == (folder / STAGE / "weights.pth").stat().st_size
    assert notes["answer"]["id"] == int(answer["candidate"]) and rows[0]["candidate"] == "0"
    assert (folder / "results.json").is_file() and not list((folder / STAGE).glob("checkpoint*"))
    again = compress(*command)
    assert again.returncode == 0 and "[3/5] search: finished before, skipped" in again.stdout


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on(tiny_recipe: Path, tmp_path: Path) -> None:
    """SIGKILL again and again, at other moments each time; what is on disk is enough, and the clock goes on."""
    command = ["search", str(tiny_recipe), "--size_kb", "30", "--minutes", "0.7", "--backend", "torch", *QUICK,
               f"run_dir={tmp_path}"]
    stage, kills = tmp_path / "tiny-search" / STAGE, 0
    for awaited in ("values-l2.json", "race.json", "checkpoint-heat-*.pth", "checkpoint-final.pth"):
        with subprocess.Popen([sys.executable, "-m", "compress", *command], cwd=PROJECT, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, start_new_session=True) as process:
            patience = time.monotonic() + 300
            while not list(stage.glob(awaited)) and process.poll() is None and time.monotonic() < patience:
                time.sleep(0.005)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
    assert kills == 4 and not (stage / "stage.json").exists()
    before = json.loads((stage / "race.json").read_text())["entrants"]
    spent, step = json.loads((stage / "clock.json").read_text())["spent"], torch.load(
        stage / "checkpoint-final.pth", weights_only=True)["step"]
    assert spent > 0 and step > 0
    done = run_compress(*command)
    assert done.returncode == 0, done.stderr
    notes = record(tmp_path / "tiny-search")["notes"]
    after = json.loads((stage / "race.json").read_text())["entrants"]
    assert [each["widths"] for each in after[:len(before)]] == [each["widths"] for each in before]
    assert notes["answer"]["steps"] >= step and 60 * notes["minutes"]["taken"] > spent


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_limit_of_time_is_kept_as_measured(backend: str, tiny_recipe: Path, compress: Compress, tmp_path: Path) -> None:
    """The limit is half of the student's own time on the runtime, as the search itself measures it."""
    command = ["search", tiny_recipe, "--minutes", 1.5, "--backend", backend, *QUICK, "search.depth=true",
               f"run_dir={tmp_path}"]
    first = compress(*command, "--latency_ms", 100, "name=whole")
    assert first.returncode == 0, first.stderr
    whole = record(tmp_path / "whole")["notes"]["answer"]["latency_ms"]
    done = compress(*command, "--latency_ms", 0.8 * whole, "name=half")
    assert done.returncode == 0, done.stderr
    answer = record(tmp_path / "half")["notes"]["answer"]
    assert answer["latency_ms"] <= 0.8 * whole * (1 + max(0.03, answer["noise"]))
    assert "rank correlation" in done.stdout and "random sub-networks differ from the prediction" in done.stdout


@pytest.mark.slow
def test_what_no_model_reaches_is_said_with_the_nearest(tiny_recipe: Path, compress: Compress, tmp_path: Path) -> None:
    command = ["search", tiny_recipe, "--size_kb", 20, "--min_accuracy", 1, "--minutes", 0.1, "--backend", "torch", *QUICK,
               f"run_dir={tmp_path}", "search.train.lr=1e-5", "distill.train.epochs=1"]
    done = compress(*command)
    assert_one_line_error(done, "no model keeps min_accuracy", "instead of 1", "front.csv", code=1)
    rows = front(tmp_path / "tiny-search")
    assert len(rows) > 2 and not (tmp_path / "tiny-search" / STAGE / "stage.json").exists()
    assert not (tmp_path / "tiny-search" / "submission").exists()


@pytest.mark.slow
def test_a_limit_that_no_network_is_fast_enough_for_names_the_least_time(tiny_recipe: Path, compress: Compress,
                                                                         tmp_path: Path) -> None:
    done = compress("search", tiny_recipe, "--latency_ms", 1e-4, "--minutes", 0.5, "--backend", "torch", *QUICK,
                    f"run_dir={tmp_path}")
    assert_one_line_error(done, "no sub-network of", "0.0001", "the least of each is", " ms and ")


@pytest.mark.slow
def test_a_floor_of_accuracy_alone_gives_a_faster_network_that_has_it(tiny_recipe: Path, compress: Compress,
                                                                      tmp_path: Path) -> None:
    done = compress("search", tiny_recipe, "--min_accuracy", 0.3, "--minutes", 1, "--backend", "torch", *QUICK,
                    f"run_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    answer = record(tmp_path / "tiny-search")["notes"]["answer"]
    assert answer["correct"] / answer["images"] >= 0.3
    student = front(tmp_path / "tiny-search")[0]
    assert answer["macs"] < int(student["macs"])
