"""`python -m compress train` through the real command line: what it writes, its resume, teams, logs, and bad input."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from architectures.architecture import Architecture
from architectures.weights import open_model
from compress.evaluation.measure import measure_accuracy
from compress.settings import read_mapping, recipe_names
from compress.training.flags import TRAINING_RECIPES, TrainingRun, parse_flags, resolve_training, validated
from loaders.catalog import load
from loaders.request import Request
from metadata.errors import UserError
from metadata.files import read_json
from metadata.formats import read_csv
from tests.helpers.commands import Compress, PROJECT, assert_one_line_error, run_here
from tests.helpers.folders import draw_folder
from tests.helpers.sharing import shared_folder

DIGITS = ["train", "--config", "digits", "--model_options", "{width: 8, stem: small}", "--num_epochs", "3", "--threads",
          "1"]
MLP = ["train", "--dataset", "digits", "--model_name", "SimpleMLP", "--num_epochs", "2", "--threads", "1"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training on digits."""
    def train(folder: Path) -> None:
        done = run_here(*DIGITS, "--log_dir", folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "test" in done.stdout and str(folder / "curves.png") in done.stdout

    return shared_folder(tmp_path_factory, "trained", train)


def test_files_say_what_was_trained_and_how_good_it_is(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        ".lock", "architecture.json", "card.json", "config.json", "curves.png", "metrics.csv", "summary.json",
        "weights.pth"}
    rows = read_csv(trained / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    summary = json.loads((trained / "summary.json").read_text())
    losses = [float(row["validation_loss"]) for row in rows]
    assert summary["kept_epoch"] == 1 + losses.index(min(losses))
    assert summary["validation"]["loss"] == pytest.approx(min(losses), rel=1e-5)
    splits = load(Request(name="digits"))
    architecture: Architecture = read_json(trained / "architecture.json", Architecture)
    test = splits.open_test()
    model = open_model(architecture, trained / "weights.pth").eval()
    found = measure_accuracy(model, test.batches(64), splits.card.preprocessing, len(test))
    assert summary["test"]["correct"] == found.correct > 0.8 * len(test)
    assert (trained / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_same_command_again_trains_nothing_and_other_settings_are_refused(trained: Path, compress: Compress) -> None:
    before = (trained / "summary.json").read_bytes()
    again = compress(*DIGITS, "--log_dir", trained)
    assert again.returncode == 0 and "finished before" in again.stdout
    assert_one_line_error(compress(*DIGITS, "--log_dir", trained, "--lr", "0.05", "--seed", "3"),
                          "already holds another training (lr: 0.1 -> 0.05, seed: 0 -> 3)", "--log_dir OTHER")
    assert (trained / "summary.json").read_bytes() == before


def test_a_training_is_a_teacher(trained: Path, compress: Compress, tmp_path: Path) -> None:
    planned = compress("plan", "slim_resnet18_digits", f"teacher.checkpoint={trained / 'weights.pth'}",
                       "teacher.options={width: 8, stem: small}", "teacher.train.epochs=0")
    assert planned.returncode == 0 and "from checkpoint" in planned.stdout, planned.stderr


@pytest.mark.parametrize("delay", [0.0, pytest.param(0.4, marks=pytest.mark.slow)])
def test_killed_training_ends_with_the_same_weights(trained: Path, delay: float, compress: Compress,
                                                    tmp_path: Path) -> None:
    command = [*DIGITS, "--log_dir", str(tmp_path / "killed"), "--checkpoint_seconds", "0"]
    process = subprocess.Popen([sys.executable, "-m", "compress", *command], cwd=PROJECT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint.pth").is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "weights.pth").exists()
    done = compress(*command)
    assert done.returncode == 0 and "continuing at step" in done.stdout, done.stderr
    one, other = (torch.load(folder / "weights.pth", weights_only=True) for folder in (trained, tmp_path / "killed"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    rows = [[{key: row[key] for key in ("epoch", "train_loss", "validation_loss", "lr")}
             for row in read_csv(folder / "metrics.csv")] for folder in (trained, tmp_path / "killed")]
    assert rows[0] == rows[1]
    assert not list((tmp_path / "killed").glob("*.part"))


@pytest.mark.slow
def test_two_processes_end_where_one_does_at_the_same_batch(compress: Compress, tmp_path: Path) -> None:
    arguments = ["train", "--dataset", "digits", "--model_name", "SimpleMLP", "--num_epochs", "2", "--batch_size", "64",
                 "--lr", "0.05", "--threads", "1", "--augment", "[crop]", "--padding", "1", "--clip", "1.0"]
    alone = compress(*arguments, "--log_dir", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What torch.distributed.run tells its processes; the slow test of a failing team runs the launcher itself.
    places = [{**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} for rank in ("0", "1")]
    command = [sys.executable, "-m", "compress", *arguments, "--log_dir", str(tmp_path / "two")]
    team = [subprocess.Popen(command, cwd=PROJECT, env=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for place in places]
    said = [process.communicate(timeout=300)[0] for process in team]
    assert [process.returncode for process in team] == [0, 0], said
    assert [text.count("2 processes") for text in said] == [1, 0]  # one of them speaks
    one, two = (torch.load(tmp_path / name / "weights.pth", weights_only=True) for name in ("one", "two"))
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=1e-5), name
    first, second = (read_csv(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    for mine, theirs in zip(first, second, strict=True):
        for key in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "lr"):
            assert float(mine[key]) == pytest.approx(float(theirs[key]), rel=1e-4), key


def test_tensorboard_holds_the_csv(compress: Compress, tmp_path: Path) -> None:
    done = compress(*MLP, "--log_dir", tmp_path / "t", "--use_tensorboard")
    assert done.returncode == 0, done.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "t" / "tensorboard"))
    events.Reload()
    rows = read_csv(tmp_path / "t" / "metrics.csv")
    for key in ("train_loss", "validation_accuracy", "lr"):
        assert [event.value for event in events.Scalars(key)] == pytest.approx([float(row[key]) for row in rows], rel=1e-5)


@pytest.mark.slow
def test_wandb_is_offline_asks_nothing_and_calls_nobody(tmp_path: Path) -> None:
    script = f"""
import sys
outside = []
def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        outside.append(arguments)
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        outside.append(arguments)
sys.addaudithook(watch)
sys.argv = ["compress", *{[*MLP, "--log_dir", str(tmp_path / "w"), "--use_wandb"]!r}]
from compress.cli.main import main
try:
    main()
finally:
    assert not [entry for entry in outside if entry[0] not in ("localhost", "127.0.0.1")], outside
"""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, timeout=300,
                          stdin=subprocess.DEVNULL, env={**clean, "HOME": str(tmp_path)}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test" in done.stdout and len(list((tmp_path / "w" / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "timm:resnest14d", "resnet50", "timm:resnest26d"])
def test_zoo_models_train_on_an_image_folder(name: str, compress: Compress, tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "images", classes=2, images=6, size=32)
    done = compress("train", "--dataset", "image_folder", "--data_root", root, "--image_size", "32", "--model_name", name,
                    "--num_epochs", "1", "--batch_size", "4", "--lr", "0.01", "--log_dir", tmp_path / "log",
                    "--val_fraction", "0.3", "--threads", "1")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "log" / "summary.json").read_text())
    assert summary["model"]["options"] == {"stem": "small"} and summary["test"]["images"] == 12


def test_grey_images_get_three_channels_where_the_model_needs_them(compress: Compress, tmp_path: Path) -> None:
    done = compress("train", "--dataset", "digits", "--model_name", "timm:test_resnet", "--image_size", "16",
                    "--num_epochs", "1", "--lr", "0.01", "--log_dir", tmp_path / "log", "--threads", "1")
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "log" / "card.json").read_text())
    assert card["input_shape"] == [3, 16, 16] and len(card["preprocessing"]["mean"]) == 3


# ----------------------------------------------------------------------------------------------------------- settings


def test_every_packaged_recipe_is_valid_and_says_what_it_is() -> None:
    assert {"cifar10", "cifar10_fast", "cifar100", "mnist", "fashion_mnist", "digits", "oxford_iiit_pet"} <= set(
        recipe_names(TRAINING_RECIPES))
    for name in recipe_names(TRAINING_RECIPES):
        assert validated(read_mapping(name, TRAINING_RECIPES, "")[1], name).epochs > 0
        assert (PROJECT / "compress" / "recipes" / "training" / f"{name}.yaml").read_text().startswith("# ")


def test_flags_override_the_file_in_every_spelling(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("dataset: CIFAR-10\nlr: 0.3\nscheduler: StepLR\n")
    config = resolve_training(["--config", str(file), "--lr=0.2", "--use_amp", "--bs_schedule", "0:64,5:128",
                               "--optimizer", "AdamW", "--model_options", "{width: 8}"])
    assert (config.lr, config.precision, config.batch_size_schedule, config.optimizer) == (0.2, "mixed", {0: 64, 5: 128},
                                                                                         "adamw")
    assert config.schedule == "step" and config.model_options == {"width": 8} and config.log_dir == Path("runs/mine")
    assert parse_flags(["--lr", "1e-3"]) == {"lr": 0.001} and resolve_training(["--lr", "1e-3"]).lr == 0.001
    changed = config.difference(validated({"lr": 0.2, "log_dir": "elsewhere", "threads": 7}, "x"))
    assert {text.split(":")[0] for text in changed} >= {"dataset", "optimizer"}
    assert not any(text.startswith(("lr:", "log_dir", "threads")) for text in changed)
    assert TrainingRun().difference(TrainingRun(threads=3, log_dir=Path("x"))) == []


def test_no_validation_split_means_the_training_loss_is_watched_and_the_last_weights_kept() -> None:
    config = resolve_training(["--val_fraction", "0"])
    assert (config.monitor, config.keep) == ("train", "last")
    with pytest.raises(UserError, match="leaves no validation loss to watch"):
        resolve_training(["--val_fraction", "0", "--scheduler", "plateau"])


BAD = {
    "unknown recipe": (["--config", "cifar11"], "unknown; did you mean 'cifar10'?"),
    "missing file": (["--config", "none.yaml"], "there is no such file"),
    "unknown flag": (["--batchsize", "3"], "--batchsize: unknown; did you mean 'batch_size'?"),
    "no flag": (["lr", "3"], "expected a flag"),
    "unknown optimizer": (["--optimizer", "adan"], "optimizer"),
    "wrong type": (["--num_epochs", "many"], "num_epochs"),
    "unknown data": (["--dataset", "cifar12", "--log_dir", "LOG"], "cifar12"),
    "no data there": (["--dataset", "mnist", "--data_root", "EMPTY", "--log_dir", "LOG"], "mnist is not there"),
    "unknown model": (["--config", "digits", "--model_name", "resnet19", "--model_options", "{}", "--log_dir", "LOG"],
                      "did you mean"),
    "unknown option": (["--config", "digits", "--model_options", "{widht: 3}", "--log_dir", "LOG"],
                       "did you mean 'width'"),
    "shape": (["--dataset", "digits", "--model_name", "mnist_model_ll", "--log_dir", "LOG"],
              "mnist_model_ll: it does not take images of shape"),
    "classes": (["--config", "digits", "--num_classes", "7", "--log_dir", "LOG"], "10 classes"),
    "log folder is a file": (["--config", "digits", "--log_dir", "FILE/log"], "FILE"),
    "log folder is something else": (["--config", "digits", "--log_dir", "FULL"], "not a training's folder"),
    "float16 on a CPU": (["--config", "digits", "--use_amp", "--amp_dtype", "float16", "--device", "cpu", "--log_dir",
                          "LOG"], "(amp_dtype float16) is for CUDA"),
    "no such weights": (["--config", "digits", "--model_name", "slim_resnet18", "--pretrained", "--log_dir", "LOG"],
                        "no pretrained weights"),
    "no data root": (["--dataset", "cifar10", "--log_dir", "LOG"], "--data_root"),
    "infinite rate": (["--config", "digits", "--lr", ".inf", "--log_dir", "LOG"], "lr"),
    "flag without its value": (["--config", "digits", "--log_dir", "LOG", "--lr"], "--lr: expected a value"),
    "reserved option": (["--config", "digits", "--model_options", "{num_classes: 5}", "--log_dir", "LOG"],
                        "num_classes is a setting of its own"),
    "epoch twice": (["--config", "digits", "--bs_schedule", "0:64,0:32", "--log_dir", "LOG"], "twice"),
    "key twice": (["--config", "digits", "--model_options", "{width: 8, width: 9}", "--log_dir", "LOG"], "twice"),
    "sizes that do not suit": (["--dataset", "digits", "--model_name", "SimpleMLP", "--size_schedule", "0:6,1:8",
                                "--log_dir", "LOG"], "size_schedule 6: it does not take images of shape"),
    "sizes above the image": (["--config", "digits", "--size_schedule", "0:16", "--log_dir", "LOG"],
                              "more than the images"),
    "project of a strange name": (["--config", "digits", "--wandb_project", "a/b", "--log_dir", "LOG"], "wandb_project"),
    "batch too small for the parts": (["--config", "digits", "--accumulate", "64", "--log_dir", "LOG"],
                                      "two or more images"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing_half_written(case: str, compress: Compress, tmp_path: Path) -> None:
    arguments, expected = BAD[case]
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "thesis.txt").write_text("mine")
    (tmp_path / "FILE").write_text("")
    places = ("LOG", "EMPTY", "FILE", "FULL")
    arguments = [str(tmp_path / part) if part.split("/")[0] in places else part for part in arguments]
    if "--log_dir" not in arguments:
        arguments += ["--log_dir", str(tmp_path / "LOG")]
    assert_one_line_error(compress("train", *arguments), expected)
    assert not (tmp_path / "LOG").exists()
    assert (tmp_path / "FULL" / "thesis.txt").read_text() == "mine"


def test_a_mended_command_works_after_one_that_failed(compress: Compress, tmp_path: Path) -> None:
    arguments = ["--num_epochs", "1", "--threads", "1", "--log_dir", tmp_path / "exp #2"]  # a path as it is, not YAML
    (tmp_path / "exp #2").mkdir()
    (tmp_path / "exp #2" / "config.json").write_text("{}")  # of a command that did not get as far as training
    assert_one_line_error(compress("train", "--dataset", "digits", "--model_name", "SimpleMPL", *arguments),
                          "did you mean 'simple_mlp'?")
    mended = compress("train", "--dataset", "digits", "--model_name", "SimpleMLP", *arguments)
    assert mended.returncode == 0, mended.stderr
    assert (tmp_path / "exp #2" / "weights.pth").is_file()
    settings = (tmp_path / "exp #2" / "config.json").read_bytes()
    again = compress("train", "--dataset", "digits", "--model_name", "SimpleMLP", *arguments, "--num_workers", "1")
    assert again.returncode == 0 and (tmp_path / "exp #2" / "config.json").read_bytes() == settings
    (tmp_path / "exp #2" / "summary.json").write_text("[]")
    assert_one_line_error(compress("train", "--dataset", "digits", "--model_name", "SimpleMLP", *arguments),
                          "summary.json: damaged")


@pytest.mark.slow
def test_a_team_whose_first_process_fails_says_why_and_shows_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "compress", "train",
         "--config", "digits", "--threads", "1", "--log_dir", str(tmp_path)], cwd=PROJECT, capture_output=True, text=True,
        timeout=300, check=False)
    assert done.returncode != 0 and done.stderr.count("not a training's folder") == 1
    assert 'compress/training/run.py", line' not in done.stderr


@pytest.mark.parametrize(("flag", "package"), [("--use_wandb", "wandb"), ("--use_tensorboard", "tensorboard")])
def test_missing_packages_are_named_before_anything_trains(flag: str, package: str, compress: Compress, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest))
    assert_one_line_error(compress(*DIGITS, "--log_dir", tmp_path / "log", flag), f"pip install {package}")
    assert not (tmp_path / "log").exists()


def test_pretrained_weights_that_cannot_be_fetched(compress: Compress, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nobody listens there
    done = compress("train", "--dataset", "digits", "--model_name", "resnet18", "--pretrained", "--log_dir",
                    tmp_path / "log", "--threads", "1")
    assert_one_line_error(done, "pretrained weights cannot be fetched")


@pytest.mark.slow
def test_a_compiled_network_trains_as_an_eager_one_does(compress: Compress, tmp_path: Path) -> None:
    """At a rate at which training does not amplify rounding.

    At the recipe's rate of 0.1 two eager trainings, one from weights changed by 1e-7, differ by 1 % after an epoch, as much
    as a compiled one does; a compiled step's gradients are as close to those in float64 as an eager step's (3e-6).
    """
    rows = []
    for name, way in (("eager", "false"), ("compiled", "true")):
        done = compress(*DIGITS, "--log_dir", tmp_path / name, "--compile", way, "--lr", "0.0001")
        assert done.returncode == 0, done.stderr
        rows.append([float(row["train_loss"]) for row in read_csv(tmp_path / name / "metrics.csv")])
    eager, fused = rows
    assert fused == pytest.approx(eager, rel=1e-3)
    assert eager[0] - eager[-1] > 1e-2 * eager[0]  # the weights move, by ten times the tolerance


def test_help_lists_every_key(compress: Compress) -> None:
    done = compress("train", "--help")
    assert done.returncode == 0
    for key in TrainingRun.model_fields:
        assert f"--{key} = " in done.stdout
    for name in TrainingRun.names():
        assert f"--{name}" in done.stdout
