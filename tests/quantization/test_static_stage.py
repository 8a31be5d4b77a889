"""Stage quantize_static: what a run packages, what it says when nothing is good enough, and its settings."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import pytest

from tests.helpers.commands import Compress, assert_one_line_error, run_here
from tests.helpers.folders import draw_folder

# The budget ends after the first candidate, which may lose almost everything: test_search.py tests the search.
QUANTIZE = "quantize_static: {max_drop: 0.9, budget_seconds: 0.001}"
TRAINING = "options: {width: 8, stem: small}, train: {epochs: 1, batch_size: 16, augment: [crop], compile: false}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files are read larger than the network sees them, so that training can shift its window."""
    folder = tmp_path_factory.mktemp("static")
    images = draw_folder(folder / "images", 4, 24, size=24)
    path = folder / "mine.yaml"
    path.write_text(f"""data: {{name: image_folder, root: {images}, resize: 20, crop: 16, validation_fraction: 0.25}}
stages:
  - teacher: {{model: slim_resnet18, floor: 0, {TRAINING}}}
  - distill: {{model: slim_resnet18, control: false, {TRAINING}}}
  - finetune: {{quantization_aware: true, train: {{epochs: 1, batch_size: 16, compile: false}}}}
  - export
  - {QUANTIZE}
  - package
  - evaluate
""")
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    done = run_here("run", recipe, f"run_dir={recipe.parent}", "name=mine", "threads=1")
    assert done.returncode == 0, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    for part in ("candidate right ms kB without VNNI", "SQNR dB", "chosen: ", "without VNNI: ", "evaluate (test)"):
        assert part in text, text
    return recipe.parent / "mine"


def test_a_static_run_packages_what_was_measured(finished: Path) -> None:
    record = json.loads((finished / "05-quantize_static" / "stage.json").read_text())
    rows, candidates = record["notes"]["coverage"], record["notes"]["candidates"]
    assert len(record["notes"]["not_tried"]) == 10 and [row["chosen"] for row in candidates] == [True]
    assert candidates[0]["images"] == 24  # the cropped validation images
    assert all(row["sqnr_db"] > 10 and row["dtype"] in ("int8", "float32") for row in rows)
    metadata = json.loads((finished / "submission" / "model_metadata.json").read_text())
    assert metadata["quantization"]["scheme"] == "static_int8" and metadata["model_format"] == "onnx"
    assert metadata["quantization"]["layers"] == {row["layer"]: f"{row['dtype']}: {row['reason']}" for row in rows}
    assert metadata["portability"]["verdict"].startswith("holds") and metadata["runtime"] in ("onnxruntime", "openvino")
    assert metadata["compression_steps"][-2:] == ["onnx_export", "static_quantization"]
    card = (finished / "submission" / "README.md").read_text()
    assert f"| runtime | {metadata['runtime']} |" in card and "on CPUs without VNNI | holds" in card
    with (finished / "ledger.csv").open() as file:
        ledger = {row["stage"]: row for row in csv.DictReader(file)}
    assert int(ledger["quantize_static"]["size_bytes"]) < 0.45 * int(ledger["export"]["size_bytes"])
    results = json.loads((finished / "results.json").read_text())
    assert results["details"]["backend"] == metadata["runtime"]
    evaluated = json.loads((finished / "07-evaluate" / "stage.json").read_text())
    assert evaluated["notes"]["in_memory"]["correct"] == results["details"]["accuracy"]["correct"]


def again(compress: Compress, recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return compress("run", recipe, f"run_dir={recipe.parent}", "name=mine", "threads=1", *arguments)


def test_a_static_run_that_is_finished_is_not_searched_again(finished: Path, recipe: Path, compress: Compress) -> None:
    done = again(compress, recipe)
    assert done.returncode == 0 and "quantize_static: finished before, skipped" in done.stdout


@pytest.mark.slow
def test_what_cannot_be_reached_is_one_line_and_the_best_is_kept(finished: Path, recipe: Path, compress: Compress) -> None:
    # Too few validation images to show that no accuracy at all is lost.
    done = again(compress, recipe, "--update", "quantize_static.max_drop=0", "quantize_static.weights=8-bit")
    folder = finished / "05-quantize_static"
    assert len(json.loads((folder / "candidates.json").read_text())["candidates"]) == 1
    assert_one_line_error(done, "no candidate fulfils the request; the best one, U8S8", "8-bit weights",
                          "best_candidate.onnx", "max_drop",
                          code=1)
    assert (folder / "best_candidate.onnx").is_file() and not (folder / "stage.json").exists()


@pytest.mark.parametrize(("change", "parts"), [
    ("quantize_static.exclude=[conv9]", ("quantize_static.exclude: 'conv9' is no Conv2d or Linear layer",)),
    ("quantize_static.max_drop=2", ("max_drop", "less than 1")),
    ("quantize_static.bachend=openvino", ("bachend", "backend")),
    ("quantize_static.weights=6-bit", ("weights", "'auto', 'pair', '8-bit' or '7-bit'")),
    ("quantize_static.backend=tensorrt", ("backend", "onnxruntime"))])
def test_mistakes_in_the_stages_settings(recipe: Path, compress: Compress, change: str, parts: tuple[str, ...]) -> None:
    assert_one_line_error(compress("plan", recipe, change), *parts)


def test_an_int8_model_is_not_quantized_again(recipe: Path, compress: Compress, tmp_path: Path) -> None:
    twice = tmp_path / "twice.yaml"
    twice.write_text(recipe.read_text().replace("  - package", "  - quantize_static\n  - package"))
    assert_one_line_error(compress("plan", twice), "quantize_static: the model is int8 already")
