"""The MNIST challenge: at least 99.4 % in each of the last five of at most 15 epochs, with fewer than 8,000 parameters.

Train the published models with the published settings and our models with our settings, check the three rules, and
compare. The test split is measured after each epoch for the log, as the challenge asks. Nothing is chosen by the test
split: not the epoch to stop at, not the epoch to keep, not the learning rate. The settings were chosen on 10,000 images
held out of the training split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from architectures.counting import count_macs
from compress.studies.mnist_comparison import write_comparison
from compress.studies.mnist_result import ChallengeResult, LAST, finished_results, read_result
from compress.training.assessment import learned_parameters
from compress.training.data import training_data
from compress.training.distillation import cross_entropy
from compress.training.flags import TrainingRun, validated
from compress.training.loggers import draw_curves
from compress.training.loop import train
from compress.training.malloc import keep_freed_memory
from compress.training.run import CHECKPOINT, SUMMARY, begin, claimed_log_dir, flags_named, prepare_training
from compress.training.trackers import Tracker
from loaders.content import read_hashes, write_hashes
from metadata.closest import closest
from metadata.errors import UserError
from metadata.files import write_json
from metadata.formats import read_csv, write_csv, write_weights
from metadata.machine import machine, usable_cores, versions


@dataclass(frozen=True, kw_only=True)
class ChallengeModel:
    """A model of the challenge with its training settings.

    Args:
        settings: keys of the training configuration.
        published: the test accuracy that the authors of the model state, in percent.
        seeds: the number of seeds in the recorded study.
        note: a remark for readers.
    """

    settings: dict[str, Any]
    published: float | None = None
    seeds: int = 5
    note: str = ""


# The authors train with batch size 32, Adam, ReduceLROnPlateau and rotations. Their scheduler monitors the test loss, which
# would be a choice by the test split; here the scheduler monitors the training loss.
PUBLISHED_WAY: dict[str, Any] = {
    "batch_size": 32, "optimizer": "adam", "lr": 0.001, "weight_decay": 0.0001, "schedule": "plateau", "warmup": 0.0,
    "patience": 3, "factor": 0.5, "augment": ["affine"], "affine_degrees": 7.0, "affine_scale": 0.0, "affine_shear": 0.0,
    "affine_shift": 0.0}

# Chosen on 10,000 images held out of the training split.
OUR_WAY: dict[str, Any] = {
    "batch_size": 64, "optimizer": "muon", "lr": 0.02, "adamw_lr": 0.01, "momentum": 0.9, "weight_decay": 0.0,
    "schedule": "linear", "warmup": 0.05, "anneal": 0.7, "lr_floor": 0.02, "ema": 0.998, "augment": ["affine"]}

MILD_AFFINE = {"affine_degrees": 8.0, "affine_scale": 0.08, "affine_shear": 0.08, "affine_shift": 1.5}

CHALLENGE_MODELS: dict[str, ChallengeModel] = {
    "mnist_model_ll": ChallengeModel(settings=PUBLISHED_WAY, published=99.36, seeds=3),
    "mnist_model_gap": ChallengeModel(settings=PUBLISHED_WAY, published=99.36, seeds=3,
                                      note="its logits pass a ReLU, as published"),
    "mnist_model_final": ChallengeModel(settings=PUBLISHED_WAY, published=99.40, seeds=3),
    "mnist_under_8k": ChallengeModel(settings={**OUR_WAY, **MILD_AFFINE}),
    "mnist_under_4k": ChallengeModel(settings={**OUR_WAY, **MILD_AFFINE, "lr": 0.012}),
}


def run_challenge(models: Sequence[str], seeds: Sequence[int] | None, data_root: Path | None, download: bool, folder: Path,
                  threads: int, epochs: int, console: Console) -> list[ChallengeResult]:
    """Train each model with each seed, continue interrupted trainings, and write the comparison.

    Args:
        models: names in CHALLENGE_MODELS.
        seeds: the seeds; None for the seeds of the recorded study.
        data_root: the folder that holds MNIST.
        download: let torchvision download MNIST.
        folder: the output folder; each model and seed gets a folder below it.
        threads: CPU threads; 0 for all.
        epochs: passes over the training split; fewer than the 15 of the challenge for a trial.
        console: progress is printed here.

    Raises:
        UserError: an unknown model (with the closest match), or missing data.
    """
    for name in models:
        if name not in CHALLENGE_MODELS:
            raise UserError(f"--model {name!r}: unknown{closest(name, [*CHALLENGE_MODELS, 'all'])} (known: all, "
                            f"{', '.join(CHALLENGE_MODELS)})")
    keep_freed_memory()
    finished_results(folder)  # finds a damaged summary before anything trains
    results = []
    for name in models:
        for seed in seeds if seeds is not None else range(CHALLENGE_MODELS[name].seeds):
            config = validated({
                **CHALLENGE_MODELS[name].settings, "dataset": "mnist", "data_root": data_root, "download": download,
                "model_name": name, "epochs": epochs, "validation_fraction": 0, "seed": seed, "threads": threads,
                "monitor": "train", "keep": "last", "precision": "float32",
                "log_dir": folder / name / f"seed{seed}"}, f"model {name}")
            results.append(_train(config, console))
    write_comparison(folder, {name: model.published for name, model in CHALLENGE_MODELS.items()}, console)
    return results


def _train(config: TrainingRun, console: Console) -> ChallengeResult:
    folder = config.log_dir
    with claimed_log_dir(config):
        if done := read_result(folder):
            console.print(f"{folder}: finished before", highlight=False)
            return done
        torch.set_num_threads(config.threads or usable_cores())
        device = torch.device("cpu")
        tracker = Tracker(console, folder)
        with flags_named():
            splits, model, options = prepare_training(config, tracker, hashes := read_hashes(folder))
        write_hashes(folder, hashes)
        begin(config, splits.card, tracker)
        # The test split is measured and decides nothing.
        data = training_data(splits.train, splits.open_test(), splits.card, config.training, seed=config.seed,
                             device=device)
        label = f"{config.model_name} seed {config.seed}"
        parameters = learned_parameters(model)
        console.print(f"{label}: {parameters:,} parameters", highlight=False)
        trained = train(model, data, cross_entropy(config.label_smoothing), config.training,
                        label=label, seed=config.seed, device=device, checkpoint=folder / CHECKPOINT, tracker=tracker)
        rows = [{key.replace("validation", "test"): value for key, value in row.items() if key != "training"}
                for row in read_csv(folder / "metrics.csv")]
        write_csv(folder / "epochs.csv", rows)
        draw_curves(folder / "curves.png", f"{label}, {parameters:,} parameters", rows, ("train", "test"))
        write_weights(folder / "weights.pth", model.state_dict())
        result = ChallengeResult(model=config.model_name, seed=config.seed, parameters=parameters,
                                 macs=count_macs(model, splits.card.input_shape), epochs=trained.epochs,
                                 seconds=trained.seconds,
                                 test_accuracies=[float(row["test_accuracy"]) for row in rows[-LAST:]])
        write_json(folder / SUMMARY, {"schema": 1, **result.to_json(), "options": options, "machine": machine(),
                                      "versions": versions()})
        (folder / CHECKPOINT).unlink(missing_ok=True)
        (folder / "metrics.csv").unlink(missing_ok=True)
        return result
