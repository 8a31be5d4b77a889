"""The whole recipe: its ledger, its report, what runs again after a change, and what a stage's result is held to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import Compress, assert_one_line_error, run_compress
from tests.helpers.folders import draw_folder
from tests.helpers.ledgers import STAGES, ledger
from tests.helpers.submissions import edit_weights, restate


def test_ledger_has_a_measured_row_a_stage(small_run: Path) -> None:
    rows = {row["stage"]: row for row in ledger(small_run)}
    assert list(rows) == STAGES
    number = {stage: {key: float(row[key]) for key in ("parameters", "macs", "size_bytes", "latency_ms", "accuracy",
                                                       "correct", "images")} for stage, row in rows.items()}
    for stage in STAGES:
        assert number[stage]["accuracy"] == pytest.approx(number[stage]["correct"] / number[stage]["images"])
        assert number[stage]["latency_ms"] > 0 and number[stage]["macs"] > 0
    assert number["prune"]["macs"] < number["distill"]["macs"]
    assert number["prune"]["parameters"] == number["finetune"]["parameters"] < number["distill"]["parameters"]
    assert number["quantize_dynamic"]["size_bytes"] < 0.6 * number["finetune"]["size_bytes"]  # tiny: headers weigh
    assert number["finetune"]["accuracy"] > 0.5 and rows["evaluate"]["split"] == "test"
    assert abs(number["quantize_dynamic"]["correct"] - number["finetune"]["correct"]) <= 6
    assert number["quantize_dynamic"]["correct"] == number["package"]["correct"]


def test_stage_folders_report_and_notes(small_run: Path) -> None:
    prune = json.loads((small_run / "03-prune" / "stage.json").read_text())["notes"]
    assert prune["channels"]["conv1"] == [8, 4] and prune["parameters"][1] < prune["parameters"][0]
    assert prune["latency"]["ratio"] > 0 and prune["latency"]["rounds"] == 5
    coverage = json.loads((small_run / "05-quantize_dynamic" / "stage.json").read_text())["notes"]["coverage"]
    assert len(coverage) == 21 and all(row["dtype"] == "int8" and row["reason"] for row in coverage)
    results = json.loads((small_run / "results.json").read_text())
    in_memory = json.loads((small_run / "07-evaluate" / "stage.json").read_text())["notes"]["in_memory"]
    assert in_memory["correct"] == results["details"]["accuracy"]["correct"]
    report = (small_run / "report.md").read_text()
    assert "| quantize_dynamic |" in report and (small_run / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(small_run.glob("*/checkpoint*.pth"))
    metrics = (small_run / "02-distill" / "metrics.csv").read_text().splitlines()
    assert metrics[0].startswith("training,epoch,train_loss,train_accuracy,validation_loss,validation_accuracy,lr")
    assert len(metrics) == 4


def test_finished_stages_are_skipped_and_changes_need_a_word(tiny_recipe: Path, tiny_run: Path, compress: Compress) -> None:
    same = ["run", tiny_recipe, f"run_dir={tiny_run.parent}"]
    again = compress(*same)
    assert again.returncode == 0 and again.stdout.count("finished before, skipped") == len(STAGES)
    before = ledger(tiny_run)
    changed = compress(*same, "seed=7")
    assert_one_line_error(changed, "work that would be redone", "seed: 0 -> 7", "--update")
    assert ledger(tiny_run) == before


def test_update_redoes_only_what_the_change_touches(four_stages: Path, tiny_run: Path, compress: Compress,
                                                    tmp_path: Path) -> None:
    copied = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    assert (copied / "submission").is_dir() and (copied / "results.json").is_file()
    done = compress("run", four_stages, f"run_dir={tmp_path}", "name=tiny", "prune.ratio=0.6", "--update")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished before, skipped") == 2
    assert ledger(copied)[:2] == ledger(tiny_run)[:2] and ledger(copied)[2] != ledger(tiny_run)[2]
    assert sorted(path.name for path in copied.glob("[0-9]*")) == ["01-teacher", "02-distill", "03-prune", "04-finetune"]
    assert not (copied / "submission").exists() and not (copied / "results.json").exists()  # nothing stale
    shorter = tmp_path / "shorter.yaml"
    shorter.write_text(four_stages.read_text().split("  - prune")[0])
    done = compress("run", shorter, f"run_dir={tmp_path}", "name=tiny", "--update")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in copied.glob("[0-9]*")) == ["01-teacher", "02-distill"]


@pytest.mark.slow
def test_challenge_layout_in_a_recipe_is_scored_too(tiny_recipe: Path, tiny_run: Path, compress: Compress,
                                                    tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    done = compress("run", tiny_recipe, f"run_dir={tmp_path}", "package.layout=challenge", "package.username=ada",
                    "--update")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "submission" / "metadata.json").read_text())["username"] == "ada"
    assert not (folder / "submission" / "model.py").exists()
    scored, before = (json.loads((path / "results.json").read_text()) for path in (folder, tiny_run))
    assert scored["accuracy"] == before["accuracy"]


def test_package_states_the_students_numbers_not_the_controls(compress: Compress, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    settings = "model: simple_mlp, options: {hidden: [16], input_shape: [1, 8, 8]}, train: {epochs: 1, augment: []}"
    recipe.write_text(f"""data: {{name: digits, channels: 1}}
stages:
  - teacher: {{floor: 0, {settings}}}
  - distill: {{control: true, {settings}}}
  - package: {{layout: challenge, username: ada}}
""")
    done = compress("run", recipe, f"run_dir={tmp_path}", "name=mine", "threads=1")
    assert done.returncode == 0, done.stderr
    rows = {row["stage"]: row for row in ledger(tmp_path / "mine")}
    assert list(rows) == ["teacher", "distill", "distill (control)", "package"]
    assert rows["distill"]["correct"] != rows["distill (control)"]["correct"]  # else this test shows nothing
    stated = json.loads((tmp_path / "mine" / "submission" / "model_metadata.json").read_text())["accuracy"]
    assert str(stated["correct"]) == rows["distill"]["correct"] == rows["package"]["correct"]
    notes = json.loads((tmp_path / "mine" / "02-distill" / "stage.json").read_text())["notes"]
    gain = int(rows["distill"]["correct"]) - int(rows["distill (control)"]["correct"])
    assert notes["gain_over_control"]["images"] == gain
    assert ("the teacher did not help" in done.stdout) == (gain <= 0)
    assert compress("package", tmp_path / "mine", "--out", tmp_path / "again").returncode == 0
    assert json.loads((tmp_path / "again" / "metadata.json").read_text())["username"] == "ada"


def test_packaged_accuracy_that_differs_fails_the_run(tiny_recipe: Path, tiny_run: Path, compress: Compress,
                                                      tmp_path: Path) -> None:
    """Tamper with the packaged weights as a bug would (hashes restated), and run only the evaluation again."""
    folder = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    shutil.rmtree(folder / "07-evaluate")
    edit_weights(folder / "submission", lambda weights: weights["fc.bias"].add_(torch.arange(4) * 100.0))
    restate(folder / "submission")
    done = compress("run", tiny_recipe, f"run_dir={tmp_path}")
    assert_one_line_error(done, "test images right", "they must be the same", code=1)


def test_a_result_that_is_slower_and_not_smaller_is_refused(compress: Compress, tmp_path: Path) -> None:
    """Int8 buys nothing for a network of a hundred numbers: scales and file headers weigh more than it saves."""
    recipe = tmp_path / "mine.yaml"
    training = "train: {epochs: 1, batch_size: 64, augment: []}"
    recipe.write_text(f"""data: {{name: digits, channels: 1}}
stages:
  - teacher: {{model: simple_mlp, options: {{hidden: [1], input_shape: [1, 8, 8]}}, floor: 0, {training}}}
  - distill: {{model: simple_mlp, options: {{hidden: [1], input_shape: [1, 8, 8]}}, {training}}}
  - quantize_dynamic: {{arithmetic: int8}}
  - package
""")
    arguments = [recipe, f"run_dir={tmp_path}", "name=mine", "threads=1"]
    assert_one_line_error(compress("run", *arguments), "stage 03-quantize_dynamic: its result is slower", "not smaller",
                          "quantize_dynamic.allow_slower=true", code=1)
    assert not (tmp_path / "mine" / "03-quantize_dynamic" / "stage.json").exists()
    done = compress("run", *arguments, "quantize_dynamic.allow_slower=true", "--update")
    assert done.returncode == 0, done.stderr
    assert [row["stage"] for row in ledger(tmp_path / "mine")] == ["teacher", "distill", "quantize_dynamic", "package"]


@pytest.mark.slow
def test_the_users_original_recipe_runs_a_few_steps(tmp_path: Path) -> None:
    """slim_resnet18_100: 100 classes at 224x224, a randomly initialised ResNet50, two steps a training."""
    root = draw_folder(tmp_path / "images", 100, 2, size=20, splits=("train",))
    draw_folder(tmp_path / "images", 100, 1, size=20, splits=("test",))
    few = [f"{name}.train.{key}" for name in ("teacher", "distill", "finetune")
           for key in ("max_steps=2", "batch_size=4", "epochs=1")]
    done = run_compress("run", "slim_resnet18_100", f"data.root={root}", f"run_dir={tmp_path / 'runs'}",
                        "teacher.pretrained=false", "threads=1", *few, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    folder = tmp_path / "runs" / "slim_resnet18_100"
    assert [row["stage"] for row in ledger(folder)] == STAGES
    architecture = json.loads((folder / "submission" / "trained_pruned_architecture.json").read_text())
    first = architecture["layers"][0]
    assert (architecture["num_classes"], architecture["input_shape"]) == (100, [3, 224, 224])
    assert (first["in_channels"], first["out_channels"], first["kernel_size"], first["stride"]) == (3, 24, [7, 7], [2, 2])
    assert first["pruning_info"] == {"type": "structured", "num_channels_pruned": 8, "remaining_channels": 24}
    assert architecture["pruning_rate"] == 0.3
    assert architecture["training_details"]["optimizer"] == "adam" and architecture["training_details"]["lr"] == 0.001
    assert "warning: the teacher's validation accuracy is" in done.stdout
