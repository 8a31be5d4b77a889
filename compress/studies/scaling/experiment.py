"""One experiment: train a CNN of a given width and depth on a subset of a given size, to the end of the schedule.

The test split is measured during the training, but nothing is chosen by it: not the epoch to stop at, not the epoch to
keep, not the learning rate.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from architectures.counting import count_macs
from architectures.families.scaling_cnn import ScalingCNN
from architectures.zoo import make, without_values
from compress.studies.scaling import images as study_images
from compress.studies.scaling.images import StudyImages
from compress.studies.scaling.plans import Point, make_point
from compress.studies.scaling.results import CURVE, OVER, Results, ResultRow
from compress.training.assessment import learned_parameters
from compress.training.checkpoints import DivergedError
from compress.training.data import Data, seeded, training_data
from compress.training.distillation import cross_entropy
from compress.training.loop import train
from compress.training.malloc import keep_freed_memory
from compress.training.trackers import Tracker
from loaders.catalog import set_name
from metadata.errors import UserError
from metadata.files import write_atomically
from metadata.formats import read_csv, write_csv
from metadata.locks import remove_leftovers
from metadata.machine import usable_cores

CHECKPOINT, METRICS = "checkpoint.pth", "metrics.csv"
LAST = 5  # the final figures are means over this number of measured epochs


def run_experiment(seed: int, batch_size: int, num_epochs: int, test_freq: int, width: int, depth: int, dataset_size: int,
                   *, dataset: str = "cifar10", data_root: Path | None = None, base_dir: Path = Path("."),
                   device: str = "auto", threads: int = 0, download: bool = False, checkpoint_seconds: float = 20.0,
                   console: Console | None = None) -> ResultRow:
    """Run one experiment, or continue an interrupted one, and return its row of base_dir/results/final_data.csv.

    Args:
        seed: the seed of the subset, the initial weights, the order and the augmentation.
        batch_size: images per step; the last batch of an epoch may be smaller.
        num_epochs: passes over the subset.
        test_freq: epochs between measurements of the test split, which is also measured after the last epoch.
        width: channels of the first stage.
        depth: convolution blocks per stage.
        dataset_size: the number of training images, a subset drawn class by class.
        dataset: the name of the data set; see loaders/.
        data_root: the folder that holds its files.
        base_dir: results are written to results/ below this folder.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads; 0 for all that the process may use.
        download: let torchvision download a missing data set.
        checkpoint_seconds: seconds between checkpoints.
        console: progress is printed here; None prints nothing.

    Raises:
        UserError: a size out of range, missing data, too few images, or the same experiment in another process.
    """
    point = make_point("scaling run", seed=seed, batch_size=batch_size, num_epochs=num_epochs, test_freq=test_freq,
                       width=width, depth=depth, dataset_size=dataset_size, dataset=set_name(dataset))
    results = Results(base_dir)
    place = chosen_device(device)
    results.create()
    tracker = Tracker(console or Console(quiet=True))
    folder = study_images.prepare_images(results, point.dataset, data_root, download, tracker)
    torch.set_num_threads(threads or usable_cores())
    return run_point(point, results, folder, place, tracker, checkpoint_seconds)


def run_point(point: Point, results: Results, images_folder: Path, device: torch.device, tracker: Tracker,
              checkpoint_seconds: float = 20.0, patience_seconds: float = 0.0) -> ResultRow:
    """Run one experiment whose images are prepared, or continue an interrupted one.

    Args:
        point: the configuration.
        results: the files of the study.
        images_folder: the folder that `prepare_images` returned.
        device: the device to train on.
        tracker: reports progress; its folder is not used.
        checkpoint_seconds: seconds between checkpoints.
        patience_seconds: how long to wait for another process that runs the same point.

    Raises:
        BusyError: another process still runs the same point.
        UserError: too few images, or a damaged checkpoint.
    """
    with results.claimed(point.id, patience_seconds):
        before = results.rows().get(point.id)
        if before and before["status"] in OVER:
            results.forget_progress(point.id)  # a process killed right after it wrote the row leaves them
            tracker.say(f"{point.id}: finished before")
            return dict(before)
        keep_freed_memory()
        images = study_images.read(images_folder)
        images.check_size(point.dataset_size)
        row = _train(point, results, images, device, tracker, checkpoint_seconds)
        results.record(row)
        results.forget_progress(point.id)
        return row


def chosen_device(device: str) -> torch.device:
    """Return the device; raise UserError if it is not available."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r}: expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch sees no CUDA device; use device cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass
class _Measured(Tracker):
    """A tracker that writes only the measured epochs."""

    outer: Tracker | None = None

    def epoch(self, label: str, **metrics: Any) -> None:
        """Add a measured epoch to metrics.csv."""
        if "validation_loss" in metrics:
            super().epoch(label, **metrics)

    def progress(self, what: str, unit: str = "images") -> Any:
        """Show progress as the outer tracker does."""
        assert self.outer
        return self.outer.progress(what, unit)


def _train(point: Point, results: Results, images: StudyImages, device: torch.device, tracker: Tracker,
           checkpoint_seconds: float) -> ResultRow:
    folder = results.unfinished(point.id)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    model = network(point, images)
    row = facts(point, images)
    tracker.say(f"{point.id}: {row['N']:,} parameters, {point.dataset_size:,} images, {row['steps']:,} steps on {device}")
    status, message, seconds = "done", "", None
    settings = point.training.model_copy(update={"checkpoint_seconds": checkpoint_seconds})
    try:
        seconds = train(model, data_of(point, images, device), cross_entropy(0.0), settings,
                        label=point.shape, seed=point.seed, device=device, checkpoint=folder / CHECKPOINT,
                        tracker=_Measured(tracker.console, folder, outer=tracker)).seconds
    except DivergedError as error:
        status, message = "diverged", str(error).partition(";")[0]
        tracker.warn(message)
    renamed = dict(zip(("epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"), CURVE,
                       strict=True))
    curve = [{renamed[key]: value for key, value in entry.items() if key in renamed}
             for entry in read_csv(folder / METRICS)]
    if curve:
        write_csv(results.curve(point.id), curve)
    else:  # the training diverged before the first measurement
        write_atomically(results.curve(point.id), (",".join(CURVE) + "\n").encode())
    losses, accuracies = ([float(entry[key]) for entry in curve] for key in ("test_loss", "test_acc"))
    if status == "done":
        row |= {"final_test_loss_avg_last5": statistics.mean(losses[-LAST:]),
                "final_test_acc_avg_last5": statistics.mean(accuracies[-LAST:])}
    if curve:
        row |= {"best_test_loss": min(losses), "best_test_acc": max(accuracies)}
    return row | {"status": status, "message": message, "seconds": round(seconds, 2) if seconds is not None else ""}


def network(point: Point, images: StudyImages) -> ScalingCNN:
    """Return the network of a point with its initial weights."""
    with seeded(point.seed, "weights"):
        model = make("scaling_cnn", num_classes=images.card.num_classes, width=point.width, depth=point.depth,
                     in_channels=images.card.input_shape[0])
    assert isinstance(model, ScalingCNN)
    return model


def data_of(point: Point, images: StudyImages, device: torch.device) -> Data:
    """Return the point's subset, augmented, and the test split, which is measured and decides nothing."""
    split = study_images.taken(images.train, study_images.subset(images.train.labels, point.dataset_size, point.seed))
    return training_data(split, images.test, images.card, point.training, seed=point.seed, device=device)


def facts(point: Point, images: StudyImages) -> ResultRow:
    """Return the columns of a row that are known before the training."""
    shape, classes = images.card.input_shape, images.card.num_classes
    parameters = _network_facts(point.width, point.depth, shape, classes)[0]
    steps = point.training.total_steps(point.dataset_size)
    return {"width": point.width, "depth": point.depth, "seed": point.seed, "batch_size": point.batch_size,
            "N": parameters, "D": point.dataset_size, "epochs": point.num_epochs, "steps": steps,
            "C_proxy": parameters * point.dataset_size * point.num_epochs, "total_flops": total_flops(point, images),
            "id": point.id, "dataset": point.dataset, "test_freq": point.test_freq}


def parameters_of(width: int, depth: int, images: StudyImages) -> int:
    """Return N: weights, biases, and scales and shifts of norms, without the running statistics of norms."""
    return _network_facts(width, depth, images.card.input_shape, images.card.num_classes)[0]


def total_flops(point: Point, images: StudyImages) -> int:
    """Return the floating-point operations of convolutions and matrix products in training, 2 a multiply-add.

    For each training image, also in the last partial batch of an epoch, the forward pass of a layer, the gradient of its
    weights and the gradient of its input cost the same. The input of the first layer is the image and needs no gradient.
    Measuring the test split is not included. Source: agrees with torch.utils.flop_counter.
    """
    batch_size, steps = point.training.steps(0, point.dataset_size)
    trained = min(point.dataset_size, batch_size * steps)  # a last batch of one image is left out
    return trained * point.num_epochs * flops_an_image(point.width, point.depth, images.card.input_shape,
                                                       images.card.num_classes)


def flops_an_image(width: int, depth: int, shape: tuple[int, int, int], classes: int) -> int:
    """Return the floating-point operations of training on one image; see `total_flops`."""
    _, macs, first = _network_facts(width, depth, shape, classes)
    return 2 * (3 * macs - first)


def measuring_flops(point: Point, images: StudyImages) -> int:
    """Return the floating-point operations of all measurements of the test split, 2 a multiply-add."""
    _, macs, _ = _network_facts(point.width, point.depth, images.card.input_shape, images.card.num_classes)
    return 2 * macs * len(images.test) * point.training.measurements()


@cache
def _network_facts(width: int, depth: int, shape: tuple[int, int, int], classes: int) -> tuple[int, int, int]:
    """Return parameters, multiply-adds of the forward pass of one image, and those of the first convolution."""
    with without_values():  # allocates no memory and computes nothing
        model = make("scaling_cnn", num_classes=classes, width=width, depth=depth, in_channels=shape[0]).eval()
    return learned_parameters(model), count_macs(model, shape), count_macs(model.get_submodule("stage1.0.conv"), shape)
