"""Stage quantize_static: what a run packages, what it says when nothing is good enough, and its settings."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.helpers.commands import SMALL, Compress, assert_one_line_error, run_compress
from tests.helpers.folders import draw_folder

# The budget ends after the first candidate, which keeps 70 % of the accuracy on any CPU: test_search.py tests the search.
QUICK = [*SMALL, "quantize_static.budget_seconds=0.001", "quantize_static.max_drop=0.3"]


@pytest.fixture(scope="module")
def static_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("static")
    done = run_compress("run", "slim_resnet18_digits_static", f"run_dir={runs}", "name=mine", *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    for part in ("candidate right ms kB without VNNI", "SQNR dB", "chosen: ", "without VNNI: ", "evaluate (test)"):
        assert part in text, text
    return runs / "mine"


def test_a_static_run_packages_what_was_measured(static_run: Path) -> None:
    record = json.loads((static_run / "06-quantize_static" / "stage.json").read_text())
    rows, candidates = record["notes"]["coverage"], record["notes"]["candidates"]
    assert len(record["notes"]["not_tried"]) == 9 and [row["chosen"] for row in candidates] == [True]
    assert all(row["sqnr_db"] > 10 and row["dtype"] in ("int8", "float32") for row in rows)
    metadata = json.loads((static_run / "submission" / "model_metadata.json").read_text())
    assert metadata["quantization"]["scheme"] == "static_int8" and metadata["model_format"] == "onnx"
    assert metadata["quantization"]["layers"] == {row["layer"]: f"{row['dtype']}: {row['reason']}" for row in rows}
    assert metadata["portability"]["verdict"].startswith("holds") and metadata["runtime"] in ("onnxruntime", "openvino")
    assert metadata["compression_steps"][-2:] == ["onnx_export", "static_quantization"]
    card = (static_run / "submission" / "README.md").read_text()
    assert f"| runtime | {metadata['runtime']} |" in card and "on CPUs without VNNI | holds" in card
    with (static_run / "ledger.csv").open() as file:
        ledger = {row["stage"]: row for row in csv.DictReader(file)}
    assert int(ledger["quantize_static"]["size_bytes"]) < 0.45 * int(ledger["export"]["size_bytes"])
    results = json.loads((static_run / "results.json").read_text())
    assert results["details"]["backend"] == metadata["runtime"]
    evaluated = json.loads((static_run / "08-evaluate" / "stage.json").read_text())
    assert evaluated["notes"]["in_memory"]["correct"] == results["details"]["accuracy"]["correct"]


def test_a_static_run_that_is_finished_is_not_searched_again(static_run: Path, compress: Compress) -> None:
    done = compress("run", "slim_resnet18_digits_static", f"run_dir={static_run.parent}", "name=mine", *QUICK)
    assert done.returncode == 0 and "quantize_static: finished before, skipped" in done.stdout


def test_what_cannot_be_reached_is_one_line_and_the_best_is_kept(static_run: Path, compress: Compress) -> None:
    # The validation split has too few images to show that no accuracy at all is lost.
    done = compress("run", "slim_resnet18_digits_static", f"run_dir={static_run.parent}", "name=mine", "--update",
                    *QUICK[:-1], "quantize_static.max_drop=0")
    folder = static_run / "06-quantize_static"
    assert len(json.loads((folder / "candidates.json").read_text())["candidates"]) == 1
    assert_one_line_error(done, "no candidate fulfils the request; the best one, U8S8", "best_candidate.onnx", "max_drop",
                          code=1)
    assert (folder / "best_candidate.onnx").is_file() and not (folder / "stage.json").exists()


@pytest.mark.parametrize(("change", "parts"), [
    ("quantize_static.exclude=[conv9]", ("quantize_static.exclude: 'conv9' is no Conv2d or Linear layer",)),
    ("quantize_static.max_drop=2", ("max_drop", "less than 1")),
    ("quantize_static.bachend=openvino", ("bachend", "backend")),
    ("quantize_static.backend=tensorrt", ("backend", "onnxruntime"))])
def test_mistakes_in_the_stages_settings(static_run: Path, compress: Compress, change: str, parts: tuple[str, ...]) -> None:
    done = compress("run", "slim_resnet18_digits_static", f"run_dir={static_run.parent}", "name=mine", "--update",
                    *QUICK, change)
    assert_one_line_error(done, *parts)


def test_training_images_are_cropped_before_they_calibrate(compress: Compress, tmp_path: Path) -> None:
    """Files are read larger than the network sees them, so that training can shift its window."""
    images = draw_folder(tmp_path / "images", 4, 12, size=24)
    training = "options: {width: 8, stem: small}, train: {epochs: 1, batch_size: 16, augment: [crop]}"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"""data: {{name: image_folder, root: {images}, resize: 20, crop: 16, validation_fraction: 0.25}}
stages:
  - teacher: {{model: slim_resnet18, floor: 0, {training}}}
  - distill: {{model: slim_resnet18, {training}}}
  - finetune: {{quantization_aware: true, train: {{epochs: 1, batch_size: 16}}}}
  - export
  - quantize_static: {{max_drop: 0.9, portable: false, budget_seconds: 0.001}}
  - package
""")
    done = compress("run", recipe, f"run_dir={tmp_path}", "name=cropped", "threads=1")
    assert done.returncode == 0, done.stdout + done.stderr
    notes = json.loads((tmp_path / "cropped" / "05-quantize_static" / "stage.json").read_text())["notes"]
    assert notes["not_tried"] and notes["candidates"][0]["images"] == 12
    again = recipe.read_text().replace("  - package", "  - quantize_static\n  - package")
    recipe.write_text(again)
    assert_one_line_error(compress("plan", recipe, f"run_dir={tmp_path}"), "quantize_static: the model is int8 already")
