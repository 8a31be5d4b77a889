"""One experiment of a scaling study: its network, its subset, its counts, its files, and that it can be interrupted."""

from __future__ import annotations

import io
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from architectures.zoo import make
from compress.studies.scaling import experiment, images, plans
from compress.studies.scaling.experiment import run_experiment
from compress.studies.scaling.images import StudyImages, prepare_images, subset
from compress.studies.scaling.plans import Point
from compress.studies.scaling.results import COLUMNS, CURVE, Results
from compress.training.workers import process_context
from compress.training.data import Data
from compress.training.distillation import cross_entropy
from compress.training.loop import train
from compress.training.settings import TrainingSettings
from compress.training.trackers import Tracker
from loaders.arrays import ArrayImages
from loaders.augment import Augmenter
from loaders.splits import Split
from metadata.errors import UserError
from metadata.formats import read_csv
from metadata.schemas import Preprocessing
from tests.helpers.commands import Compress, assert_one_line_error
from tests.helpers.folders import draw_folder
from tests.helpers.sweeps import without_seconds

CPU = torch.device("cpu")


def quiet() -> Tracker:
    return Tracker(Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> StudyImages:
    return images.read(prepare_images(Results(tmp_path_factory.mktemp("digits")), "digits", None, False, quiet()))


def run(base_dir: Path, **changes: object) -> dict[str, object]:
    settings: dict[str, object] = dict(seed=0, batch_size=64, num_epochs=13, test_freq=2, width=4, depth=1,
                                       dataset_size=200, dataset="digits", base_dir=base_dir, threads=1)
    return run_experiment(**(settings | changes))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(("width", "depth"), [(4, 1), (8, 2), (3, 3)])
def test_network_has_three_stages_that_double_in_width(width: int, depth: int) -> None:
    model = make("scaling_cnn", num_classes=10, width=width, depth=depth)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [w for w in (width, 2 * width, 4 * width) for _ in range(depth)]
    expected, channels = 4 * width * 10 + 10, 3
    for stage in (width, 2 * width, 4 * width):
        for _ in range(depth):
            expected, channels = expected + 9 * channels * stage + 2 * stage, stage
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    sizes = []
    for convolution in convolutions:
        convolution.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[2]))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [32] * depth + [16] * depth + [8] * depth


@pytest.mark.parametrize("size", [130, 129, 40, 1438], ids=["a partial batch", "one over", "less than a batch", "all"])
def test_flops_are_those_of_the_whole_training_as_torch_counts_them(digits: StudyImages, tmp_path: Path, size: int) -> None:
    point = Point(width=3, depth=2, batch_size=64, num_epochs=2, dataset_size=size, dataset="digits")
    data = experiment.data_of(point, digits, CPU)
    data = replace(data, validation=images.taken(data.validation, torch.arange(0)))
    with FlopCounterMode(display=False) as counter:
        train(experiment.network(point, digits), data, cross_entropy(0.0), point.training, label="flops",
              seed=0, device=CPU, checkpoint=tmp_path / "checkpoint.pth", tracker=quiet())
    assert experiment.total_flops(point, digits) == counter.get_total_flops()
    steps = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"]
    assert experiment.facts(point, digits)["steps"] == steps == 2 * {130: 3, 129: 2, 40: 1, 1438: 23}[size]
    assert experiment.facts(point, digits)["C_proxy"] == 2 * size * experiment.parameters_of(3, 2, digits)


def test_flops_of_measuring_are_a_forward_pass_each_time(digits: StudyImages) -> None:
    point = Point(width=3, depth=1, num_epochs=7, test_freq=3, dataset_size=100, dataset="digits")
    model = experiment.network(point, digits).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(len(digits.test), 3, 8, 8))
    assert experiment.measuring_flops(point, digits) == 3 * counter.get_total_flops()  # after epochs 3, 6 and 7


# -------------------------------------------------------------------------------------------------- the engine's share


def test_engine_keeps_the_last_partial_batch_and_weighs_it_by_its_images(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (70, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(ArrayImages(pixels), torch.arange(70) % 3)
    data = Data(train=split, validation=split, augmenter=Augmenter(names=[], size=(8, 8), padding=0, seed=0, samples=70),
                preprocessing=Preprocessing(mode="RGB", resize=8, crop=8, mean=[0.5] * 3, std=[0.3] * 3))
    seen: list[int] = []
    losses: list[float] = []

    def loss(model: nn.Module, batch: object) -> tuple[torch.Tensor, torch.Tensor]:
        value, logits = cross_entropy(0.0)(model, batch)  # type: ignore[arg-type]
        seen.append(len(logits))
        losses.append(float(value.detach()))
        return value, logits

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    tracker = Tracker(Console(file=io.StringIO()), tmp_path)
    settings = TrainingSettings(epochs=5, batch_size=32, drop_last=False, measure_every=2, monitor="train", warmup=0.0,
                                compile=False)
    train(model, data, loss, settings, label="partial", seed=0, device=CPU, checkpoint=tmp_path / "c.pth", tracker=tracker)
    assert seen == [32, 32, 6] * 5
    rows = read_csv(tmp_path / "metrics.csv")
    assert [row["epoch"] for row in rows if row["validation_loss"]] == ["2", "4", "5"]
    for row, (one, two, three) in zip(rows, zip(losses[::3], losses[1::3], losses[2::3], strict=True), strict=True):
        assert float(row["train_loss"]) == pytest.approx((32 * one + 32 * two + 6 * three) / 70, rel=1e-5)
    assert settings.steps(0, 65) == (32, 2) and TrainingSettings(batch_size=32).steps(0, 70) == (32, 2)
    with pytest.raises(UserError, match="cannot be shared by 2 processes"):
        settings.check_batches("partial", 70, 2)


# ---------------------------------------------------------------------------------------------------------- the subset


def test_subsets_are_balanced_nested_and_drawn_by_the_seed(digits: StudyImages) -> None:
    labels = digits.train.labels
    before: set[int] = set()
    for size in (3, 10, 64, 500, 1437, len(labels)):
        ids = subset(labels, size, seed=0)
        assert len(set(ids.tolist())) == size and before <= set(ids.tolist())
        shares = torch.bincount(labels[ids], minlength=10) - size * torch.bincount(labels) / len(labels)
        assert float(shares.abs().max()) < 1.5
        before = set(ids.tolist())
    assert torch.equal(subset(labels, 64, 0), subset(labels, 64, 0))
    assert not torch.equal(subset(labels, 64, 0), subset(labels, 64, 1))
    equal = torch.arange(10).repeat_interleave(30)
    assert torch.bincount(equal[subset(equal, 100, 3)]).tolist() == [10] * 10
    assert len({tuple(equal[subset(equal, 4, seed)].tolist()) for seed in range(5)}) > 1  # not always the first classes


def test_images_are_decoded_once_and_are_the_loaders(tmp_path: Path) -> None:
    from loaders.catalog import load
    from loaders.request import Request

    root = draw_folder(tmp_path / "data", 3, 5, size=8)
    results = Results(tmp_path)
    results.create()
    folder = prepare_images(results, "Image-Folder", root, False, quiet())
    request = Request(name="image_folder", root=root, validation_fraction=0)
    splits, cached = load(request), images.read(folder)
    for own, theirs in ((cached.train, splits.train), (cached.test, splits.open_test())):
        assert torch.equal(own.labels, theirs.labels)
        everything = torch.arange(len(theirs))
        assert torch.equal(own.images.batch(everything), theirs.images.batch(everything))
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare_images(results, "image_folder", root, False, quiet()) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    other = draw_folder(tmp_path / "other", 3, 5, size=8, seed=1)
    with pytest.raises(UserError, match="holds results of other images by the name image_folder"):
        prepare_images(results, "image_folder", other, False, quiet())


# ------------------------------------------------------------------------------------------------------ an experiment


def test_files_of_an_experiment_and_that_it_is_deterministic(tmp_path: Path) -> None:
    row = run(tmp_path / "a")
    results = tmp_path / "a" / "results"
    table = read_csv(results / "final_data.csv")
    assert tuple(table[0]) == COLUMNS and len(table) == 1
    curve = read_csv(results / "runs" / f"{row['id']}.csv")
    assert tuple(curve[0]) == CURVE
    assert [int(entry["epoch"]) for entry in curve] == [2, 4, 6, 8, 10, 12, 13]
    losses, accuracies = ([float(entry[key]) for entry in curve] for key in ("test_loss", "test_acc"))
    found = table[0]
    assert float(found["final_test_loss_avg_last5"]) == pytest.approx(sum(losses[-5:]) / 5)
    assert float(found["final_test_acc_avg_last5"]) == pytest.approx(sum(accuracies[-5:]) / 5)
    assert float(found["best_test_loss"]) == min(losses) and float(found["best_test_acc"]) == max(accuracies) <= 1
    assert (found["steps"], found["status"], found["message"]) == (str(13 * 4), "done", "")
    assert not list((results / "checkpoints").iterdir())

    again = run(tmp_path / "b")
    assert again["id"] == row["id"]
    for name in ("final_data.csv", f"runs/{row['id']}.csv"):
        assert without_seconds(results / name) == without_seconds(tmp_path / "b" / "results" / name)
    before = (results / "final_data.csv").read_bytes()
    assert run(tmp_path / "a")["id"] == row["id"] and (results / "final_data.csv").read_bytes() == before
    other = run(tmp_path / "a", seed=1)
    assert other["final_test_loss_avg_last5"] != row["final_test_loss_avg_last5"]
    assert [entry["id"] for entry in read_csv(results / "final_data.csv")] == [row["id"], other["id"]]


def test_every_part_of_the_configuration_is_in_the_id() -> None:
    point = Point()
    changed = [point.model_copy(update={key: "other" if key == "dataset" else getattr(point, key) + 1})
               for key in Point.model_fields]
    assert len({point.id, *(other.id for other in changed)}) == 1 + len(Point.model_fields)
    assert point.id.startswith("w32-d2-D50000-e100-s0-")


def test_an_experiment_learns(tmp_path: Path) -> None:
    row = run(tmp_path, width=8, dataset_size=1400, num_epochs=25, test_freq=1)
    assert float(str(row["final_test_acc_avg_last5"])) > 0.8


def test_a_diverged_run_is_a_row_with_its_message(compress: Compress, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "TRAINING", plans.TRAINING.model_copy(update={"lr": 1e30}))
    row = run(tmp_path)
    found, = read_csv(tmp_path / "results" / "final_data.csv")
    assert row["status"] == found["status"] == "diverged" and "the loss is" in found["message"]
    assert "step" in found["message"] and "kept" not in found["message"]
    assert found["final_test_loss_avg_last5"] == "" and int(found["N"]) > 0
    assert not list((tmp_path / "results" / "checkpoints").iterdir())
    before = (tmp_path / "results" / "final_data.csv").read_bytes()
    assert run(tmp_path)["status"] == "diverged" and (tmp_path / "results" / "final_data.csv").read_bytes() == before
    for width in ("4", "3"):  # that one, and a new one
        done = compress("scaling", "run", "--batch_size", "64", "--num_epochs", "13", "--test_freq", "2", "--width", width,
                        "--depth", "1", "--dataset_size", "200", "--dataset", "digits", "--base_dir", tmp_path,
                        "--threads", "1")
        assert_one_line_error(done, f"w{width}-", "diverged: ", "the loss is", "left out of fits", code=1)
        assert "row:" in done.stdout and "test loss" not in done.stdout


@pytest.mark.slow
def test_a_killed_experiment_continues_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    settings = dict(width=4, depth=2, dataset_size=1000, num_epochs=12, batch_size=64, test_freq=3)
    row = run(tmp_path / "whole", **settings)
    results = Results(tmp_path / "killed")
    checkpoint = results.unfinished(str(row["id"])) / experiment.CHECKPOINT
    chance = random.Random(0)
    process = process_context(run_experiment.__module__).Process(
        target=run_experiment, kwargs=settings | {"seed": 0, "dataset": "digits", "base_dir": tmp_path / "killed",
                                                  "threads": 1, "checkpoint_seconds": 0})
    process.start()
    while not checkpoint.is_file():
        assert process.is_alive()
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.3))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert checkpoint.is_file() and not results.rows()
    again = run(tmp_path / "killed", **settings)
    assert again["id"] == row["id"] and not checkpoint.exists()
    for name in ("final_data.csv", f"runs/{row['id']}.csv"):
        assert without_seconds(tmp_path / "whole" / "results" / name) == without_seconds(results.folder / name)


@pytest.mark.parametrize(("flags", "said"), [
    (["--width", "0"], "width: Input should be greater than or equal to 1, got 0"),
    (["--depth", "-1"], "depth: Input should be"), (["--dataset_size", "0"], "dataset_size: Input should be"),
    (["--num_epochs", "0"], "num_epochs: Input should be"), (["--test_freq", "0"], "test_freq: Input should be"),
    (["--batch_size", "1"], "batch_size: Input should be"), (["--seed", "-1"], "seed: Input should be"),
    (["--dataset_size", "1439"], "dataset_size 1,439: digits has 1,438 training images"),
    (["--dataset", "digit"], "did you mean 'digits'"), (["--device", "gpu"], "expected auto, cpu or cuda"),
    (["--base_dir", "FILE"], "cannot be made (Not a directory)")])
def test_bad_input_gets_one_line(compress: Compress, tmp_path: Path, flags: list[str], said: str) -> None:
    (tmp_path / "file").write_text("")
    flags = [str(tmp_path / "file") if flag == "FILE" else flag for flag in flags]
    arguments = ["--dataset", "digits", "--base_dir", str(tmp_path / "out"), "--dataset_size", "100", *flags]
    assert_one_line_error(compress("scaling", "run", *arguments), said)
    assert not list(tmp_path.glob("out/results/*.csv"))
