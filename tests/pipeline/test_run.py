"""The whole recipe through the real command line: its ledger, its resume, and what bad input gets."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import Compress, PROJECT, SMALL, assert_one_line_error, run_compress
from tests.helpers.folders import draw_folder

STAGES = ["teacher", "distill", "prune", "finetune", "quantize_dynamic", "package", "evaluate"]


def ledger(folder: Path) -> list[dict[str, str]]:
    with (folder / "ledger.csv").open() as file:
        return list(csv.DictReader(file))


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
    assert prune["channels"]["conv1"] == [16, 8] and prune["parameters"][1] < prune["parameters"][0]
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
    assert len(metrics) == 5


def test_finished_stages_are_skipped_and_changes_need_a_word(small_run: Path, compress: Compress) -> None:
    same = ["run", "slim_resnet18_digits", f"run_dir={small_run.parent}", "name=small", *SMALL]
    again = compress(*same)
    assert again.returncode == 0 and again.stdout.count("finished before, skipped") == len(STAGES)
    before = ledger(small_run)
    changed = compress(*same, "seed=7")
    assert_one_line_error(changed, "already holds another run", "seed: 0 -> 7", "--update")
    assert ledger(small_run) == before


def test_update_redoes_only_what_the_change_touches(small_run: Path, compress: Compress, tmp_path: Path) -> None:
    import shutil
    copied = tmp_path / "small"
    shutil.copytree(small_run, copied)
    command = ["run", "slim_resnet18_digits", f"run_dir={tmp_path}", "name=small", *SMALL, "prune.ratio=0.5"]
    done = compress(*command, "--update")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished before, skipped") == 2
    assert ledger(copied)[:2] == ledger(small_run)[:2] and ledger(copied)[2] != ledger(small_run)[2]
    shorter = tmp_path / "shorter.yaml"
    shorter.write_text((PROJECT / "compress" / "recipes" / "slim_resnet18_digits.yaml").read_text().split("  - prune")[0])
    kept = [setting for setting in SMALL if not setting.startswith(("prune", "finetune"))]
    done = compress("run", shorter, f"run_dir={tmp_path}", "name=small", *kept, "--update")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in copied.glob("[0-9]*")) == ["01-teacher", "02-distill"]  # nothing stale
    assert not (copied / "submission").exists() and not (copied / "results.json").exists()


def test_challenge_layout_in_a_recipe_is_scored_too(small_run: Path, compress: Compress, tmp_path: Path) -> None:
    import shutil
    shutil.copytree(small_run, tmp_path / "small")
    done = compress("run", "slim_resnet18_digits", f"run_dir={tmp_path}", "name=small", *SMALL, "package.layout=challenge",
                    "package.username=ada", "--update")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "small"
    assert json.loads((folder / "submission" / "metadata.json").read_text())["username"] == "ada"
    assert not (folder / "submission" / "model.py").exists()
    scored, before = (json.loads((path / "results.json").read_text()) for path in (folder, small_run))
    assert scored["accuracy"] == before["accuracy"]


def metrics(folder: Path) -> list[dict[str, str]]:
    """Every epoch's row, less what the clock says."""
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_second")}
            for path in sorted(folder.glob("*/metrics.csv")) for row in csv.DictReader(path.read_text().splitlines())]


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/weights.pth")}


@pytest.mark.parametrize(("stage", "file"), [
    pytest.param("01-teacher", "checkpoint.pth", marks=pytest.mark.slow), ("02-distill", "checkpoint-student.pth"),
    pytest.param("04-finetune", "checkpoint.pth", marks=pytest.mark.slow)])
def test_killed_run_continues_to_the_same_weights_bit_for_bit(stage: str, file: str, small_run: Path,
                                                             tmp_path: Path) -> None:
    """SIGKILL in the middle of a training stage; the settings are those of `small_run`, which nobody interrupted."""
    command = [sys.executable, "-m", "compress", "run", "slim_resnet18_digits", f"run_dir={tmp_path}", "name=small",
               *SMALL, *(f"{name}.train.checkpoint_seconds=0" for name in ("teacher", "distill", "finetune"))]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                          start_new_session=True) as process:
        checkpoint = tmp_path / "small" / stage / file
        deadline = time.monotonic() + 200
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert checkpoint.exists() and process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
    step = torch.load(checkpoint, weights_only=True)["step"]
    total = {"01-teacher": 68, "02-distill": 68, "04-finetune": 68}[stage]
    assert 0 < step < total, f"killed at step {step} of {total}, not in the middle"
    assert not (tmp_path / "small" / stage / "stage.json").exists()
    done = run_compress(*command[3:])
    assert done.returncode == 0, done.stderr
    assert f"continuing at step {step}" in done.stdout
    one, other = weights(tmp_path / "small"), weights(small_run)
    assert one.keys() == other.keys() and len(one) == 5
    assert one == other
    assert metrics(tmp_path / "small") == metrics(small_run)


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


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(("arguments", "parts"), [
    (["slim_resnet81_digits"], ["did you mean 'slim_resnet18_digits'"]),
    (["nowhere.yaml"], ["no such file"]),
    (["slim_resnet18_digits", "prune.ration=0.3"], ["unknown key 'ration'", "did you mean 'ratio'"]),
    (["slim_resnet18_digits", "teacher.train.epoch=3"], ["unknown key 'train.epoch'", "did you mean 'epochs'"]),
    (["slim_resnet18_digits", "data.nam=mnist"], ["unknown key 'data.nam'", "did you mean 'name'"]),
    (["slim_resnet18_digits", "prun.ratio=0.3"], ["did you mean 'prune'"]),
    (["slim_resnet18_digits", "prune.ratio"], ["expected key=value"]),
    (["slim_resnet18_digits", "prune.ratio=1.5"], ["ratio", "less than 1"]),
    (["slim_resnet18_digits", "prune.ratio=0.97"], ["leaves none of its"]),
    (["slim_resnet18_digits", "prune.ratio=0.01"], ["pruning removed nothing"]),
    (["slim_resnet18_digits", "prune.criterion=l3"], ["criterion"]),
    (["slim_resnet18_digits", "distill.model=vit_b_16", "distill.options={}"], ["layer", "as a teacher the model works"]),
    (["slim_resnet18_digits", "teacher.model=resnet19"], ["did you mean 'resnet18'"]),
    (["slim_resnet18_digits", "teacher.model=torchvision:alexnet", "teacher.options={}"], ["does not take images"]),
    (["slim_resnet18_digits", "teacher.options.in_channels=1"], ["does not take images of shape [3, 8, 8]"]),
    (["slim_resnet18_digits", "distill.model=resnet18", "distill.options={groups: 2}"], ["resnet18"]),
    (["slim_resnet18_digits", "seed=100000000000000000000"], ["seed"]),
    (["slim_resnet18_digits", "data.mean=[0.5]"], ["needs 3 values"]),
    (["slim_resnet18_digits", "data.resize=16"], ["data.resize"]),
    (["slim_resnet18_digits", "teacher.checkpoint=/nowhere.pth"], ["/nowhere.pth", "no such file"]),
    (["slim_resnet18_digits", "teacher.train.epochs=0"], ["it would know nothing"]),
    (["slim_resnet18_digits", "quantize_dynamic.exclude=[stem]"], ["'stem' is no Conv2d or Linear"]),
    (["slim_resnet18_digits", "evaluate.baselines=mine"], ["evaluate.baselines 'mine': unknown"]),
    (["slim_resnet18_digits", "data.name=digit"], ["did you mean 'digits'"]),
    (["slim_resnet18_digits", "name=../up"], ["name"]),
    (["slim_resnet18_digits", "device=cuda"], ["no CUDA device"]),
    (["slim_resnet18_cifar10"], ["data.root is not set"]),
    (["slim_resnet18_100", "data.root=/nowhere"], ["/nowhere/train"]),
], ids=lambda value: " ".join(value)[:60])
def test_mistakes_get_one_line_and_leave_nothing(arguments: list[str], parts: list[str], compress: Compress,
                                                 tmp_path: Path) -> None:
    if arguments[-1] == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = compress("run", *arguments, f"run_dir={tmp_path / 'runs'}")
    assert_one_line_error(done, *parts)
    assert list(tmp_path.iterdir()) == []


def test_stages_that_do_not_chain(compress: Compress, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: {name: digits}\nstages: [teacher, prune, quantise_dynamic]\n")
    done = compress("plan", recipe)
    assert_one_line_error(done, "stage prune takes a student, but what comes before it gives a teacher",
                          "did you mean 'quantize_dynamic'")
    recipe.write_text("stages: [teacher\n")
    assert_one_line_error(compress("plan", recipe), "not valid YAML")
    recipe.write_text("stages: {teacher: 1}\n")
    assert_one_line_error(compress("plan", recipe), "list of stages")
    recipe.write_text("stages: []\n")
    assert_one_line_error(compress("plan", recipe), "stages")
    recipe.write_text("stages: [distill]\n")
    assert_one_line_error(compress("plan", recipe), "stage distill takes a teacher")


@pytest.mark.parametrize("stage", ["prune", "finetune", "quantize_dynamic"])
def test_stages_that_need_float_weights_are_refused_behind_int8(stage: str, compress: Compress, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: {name: digits}\nstages: [teacher, {distill: {options: {width: 16, stem: small}}}, "
                      f"quantize_dynamic, {stage}, package]\n")
    assert_one_line_error(compress("plan", recipe), f"stage {stage}: the model is int8 by then")


def test_package_states_the_students_numbers_not_the_controls(compress: Compress, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    training = "train: {epochs: 1, batch_size: 64, augment: []}"
    recipe.write_text(f"""data: {{name: digits}}
stages:
  - teacher: {{options: {{width: 8, stem: small}}, floor: 0, {training}}}
  - distill: {{options: {{width: 8, stem: small}}, control: true, {training}}}
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


def test_a_stage_that_occurs_twice_is_addressed_by_its_place(compress: Compress, tmp_path: Path) -> None:
    recipe = tmp_path / "twice.yaml"
    recipe.write_text("data: {name: digits}\nstages: [teacher, {distill: {options: {width: 16, stem: small}}}, finetune, "
                      "finetune, package]\n")
    assert_one_line_error(compress("plan", recipe, "finetune.train.epochs=3"), "occurs 2 times", "finetune#1.train")
    done = compress("plan", recipe, "finetune#2.train.epochs=3")
    assert done.returncode == 0 and "3 epochs" in done.stdout and "5 epochs" in done.stdout
    assert_one_line_error(compress("plan", recipe, "finetune#3.train.epochs=3"), "there is no #3")


def test_teacher_with_other_classes_is_refused(small_run: Path, compress: Compress, tmp_path: Path) -> None:
    from architectures.zoo import make
    path = tmp_path / "teacher.pth"
    model = make("slim_resnet18", num_classes=12, width=8, stem="small")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()}}, path)
    common = ["slim_resnet18_digits", "teacher.options.width=8", "teacher.train.epochs=0", f"teacher.checkpoint={path}"]
    done = compress("plan", *common)
    assert_one_line_error(done, "the teacher has 12 classes, the data has 10")
    good = small_run / "01-teacher" / "weights.pth"
    done = compress("plan", *common[:-1], f"teacher.checkpoint={good}")
    assert done.returncode == 0 and "from checkpoint" in done.stdout
    (tmp_path / "bad.pth").write_bytes(good.read_bytes()[:5000])
    done = compress("plan", *common[:-1], f"teacher.checkpoint={tmp_path / 'bad.pth'}")
    assert_one_line_error(done, "bad.pth", "not a PyTorch state dict")


def test_safetensors_teacher(small_run: Path, compress: Compress, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    weights = torch.load(small_run / "01-teacher" / "weights.pth", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "teacher.safetensors")
    common = ["plan", "slim_resnet18_digits", "teacher.options.width=8", "teacher.train.epochs=0"]
    assert compress(*common, f"teacher.checkpoint={tmp_path / 'teacher.safetensors'}").returncode == 0
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    assert_one_line_error(compress(*common, f"teacher.checkpoint={tmp_path / 'bad.safetensors'}"),
                          "not a safetensors file")


def test_folder_that_is_something_else_is_left_alone(compress: Compress, tmp_path: Path) -> None:
    mine = tmp_path / "small" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("three years of work")
    done = compress("run", "slim_resnet18_digits", f"run_dir={tmp_path}", "name=small", *SMALL)
    assert_one_line_error(done, "already there and not a run's folder")
    assert mine.read_text() == "three years of work" and len(list(mine.parent.iterdir())) == 1


def test_unwritable_places(compress: Compress, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = compress("run", "slim_resnet18_digits", f"run_dir={tmp_path / 'file'}", *SMALL)
    assert_one_line_error(done, str(tmp_path / "file"))


def test_full_disk_gets_one_line_and_the_run_goes_on_later(small_run: Path, tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk: the teacher's weights do not fit, then they do."""
    command = f"ulimit -f 40; exec {sys.executable} -m compress run slim_resnet18_digits run_dir={tmp_path} name=small " \
        + " ".join(SMALL)
    done = subprocess.run(["bash", "-c", command], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert_one_line_error(done, "nothing half-written")
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("weights.pth"))
    done = run_compress("run", "slim_resnet18_digits", f"run_dir={tmp_path}", "name=small", *SMALL)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "small") == weights(small_run)


def test_two_processes_cannot_share_a_run(compress: Compress, tmp_path: Path) -> None:
    import fcntl
    (tmp_path / "small").mkdir()
    with (tmp_path / "small" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = compress("run", "slim_resnet18_digits", f"run_dir={tmp_path}", "name=small", *SMALL)
    assert_one_line_error(done, "another process is running it")


def test_packaged_accuracy_that_differs_fails_the_run(small_run: Path, compress: Compress, tmp_path: Path) -> None:
    """Tamper with the packaged weights as a bug would (hashes restated), and run only the evaluation again."""
    import shutil

    from tests.evaluation.test_evaluator import edit_weights, restate
    shutil.copytree(small_run, tmp_path / "small")
    shutil.rmtree(tmp_path / "small" / "07-evaluate")
    edit_weights(tmp_path / "small" / "submission", lambda weights: weights["fc.bias"].add_(torch.arange(10) * 0.5))
    restate(tmp_path / "small" / "submission")
    done = compress("run", "slim_resnet18_digits", f"run_dir={tmp_path}", "name=small", *SMALL)
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
