"""`python -m compress train`: train a model, write its weights and curves, and measure the test split once."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from architectures.counting import count_macs
from architectures.describe import lower
from architectures.named import LAYERS, is_own, remarks
from architectures.onnx_network.runtime import RunOnnxFile
from architectures.pretrained import pretrained_warning
from architectures.zoo import check_forward, families, fitted_options, make, own_name, without_values
from compress.training.assessment import assess, learned_parameters
from compress.training.checkpoints import best_file
from compress.training.data import check_sizes, seeded, shrunk_size, training_data
from compress.training.distillation import cross_entropy
from compress.training.distributed import Team, joined
from compress.training.flags import TrainingRun, validated
from compress.training.loggers import Curves, Logger, TensorBoard, WeightsAndBiases
from compress.training.loop import Trained, train
from compress.training.malloc import keep_freed_memory
from compress.training.precision import autocast_dtype, usable
from compress.training.trackers import Tracker
from loaders.catalog import load
from loaders.content import HASHES, Content, content_changes, read_hashes, write_hashes
from loaders.images import center_crop, normalize
from loaders.request import FileHashes
from loaders.splits import Splits
from metadata.errors import UserError, some_of
from metadata.files import write_json
from metadata.formats import write_weights
from metadata.locks import locked, remove_leftovers
from metadata.machine import machine, usable_cores, versions
from metadata.records import DatasetCard

SETTINGS, SUMMARY, CHECKPOINT = "config.json", "summary.json", "checkpoint.pth"
SMALL_IMAGE = 64  # pixels up to which `stem: auto` takes the small stem
RESERVED = {"name", "num_classes", "pretrained", "known"}  # arguments of `make` that are not the model's own
UNDECODED_GB = 1e-9  # memory for images that are to be listed and not decoded
LOOKED_AT = 5000  # training images that a model may see before it trains, such as for whitening


def run_training(config: TrainingRun, console: Console) -> dict[str, Any]:
    """Train as the settings say, or what is left of the training, and return the content of summary.json.

    Under torchrun, every process calls this function; the first one alone writes and prints.

    Raises:
        UserError: a mistake of the user. Nothing is lost, and the corrected command continues the training.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch sees no CUDA device; use device cpu or auto")
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    keep_freed_memory()
    with joined(cuda) as team, ExitStack() as stack:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(config.threads or max(1, usable_cores() // local))
        tracker = Tracker(console if team.first else Console(quiet=True))
        loggers, summary = [], None
        if team.first:
            loggers = _loggers(config)
            stack.enter_context(claimed_log_dir(config))
            summary = read_summary(config.log_dir)
        finished, = team.of_first([float(summary is not None)])
        if finished:
            if team.first:
                _check_finished(config, tracker)
            tracker.say(f"{config.log_dir}: finished before")
            return summary or {}
        return _train(config, team, tracker, loggers)


def _train(config: TrainingRun, team: Team, tracker: Tracker, loggers: list[Logger]) -> dict[str, Any]:
    with team.first_goes_first(), flags_named():  # one process fetches what is missing
        splits, model, options = prepare_training(config, tracker, hashes := read_hashes(config.log_dir))
        if team.first:
            write_hashes(config.log_dir, hashes)
    for text in splits.warnings:
        tracker.warn(text)
    card, folder, device = splits.card, config.log_dir, team.device
    settings = usable(config.training, device, tracker.warn)
    settings.check_batches("train", len(splits.train), team.size)
    if team.first:
        tracker = replace(tracker, folder=folder, loggers=loggers)
        begin(config, splits.card, tracker)
    tracker.say(f"{config.model_name} ({learned_parameters(model):,} parameters) on {card.name} "
                f"({len(splits.train):,} images, {len(splits.validation):,} held out, {list(card.input_shape)}), "
                f"{config.epochs} epochs on {device}" + (f", {team.size} processes" if team.size > 1 else ""))
    if team.size > 1 and device.type == "cpu" and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        tracker.warn("on CPUs each process normalizes by its own share of a batch: with batch norms, the result is not "
                     "that of one process")
    try:
        data = training_data(splits.train, splits.validation, card, settings, seed=config.seed, device=device)
        trained = train(model, data, cross_entropy(settings.label_smoothing), settings, label="train", seed=config.seed,
                        device=device, checkpoint=folder / CHECKPOINT, tracker=tracker, team=team)
    finally:
        for logger in loggers:
            logger.close()
    if not team.first:
        return {}
    if team.size > 1:  # on CUDA its batch norms were replaced by synchronized ones
        weights = model.state_dict()
        model = make(own_name(config.model_name), num_classes=card.num_classes, **options).to(device)
        model.load_state_dict(weights)
    with flags_named():
        return _conclude(config, splits, model.eval(), options, trained, autocast_dtype(settings.precision, device))


# The loaders' name of a setting, and the flag of this command.
_FLAGS = {
    "data.download=true": "--download", "data.skip_unreadable=true": "--skip_unreadable", "data.root=": "--data_root ",
    "data.root": "--data_root", "data.name": "--dataset", "data.num_classes": "--num_classes",
    "data.image_size": "--image_size", "data.resize and data.crop": "--resize and --crop", "data.channels": "--channels",
    "data.resize": "--resize", "data.crop": "--crop", "data.test_fraction": "--test_fraction",
    "data.image_root=": "--image_root ", "data.columns=": "--columns "}


@contextmanager
def flags_named() -> Iterator[None]:
    """Let errors of the loaders name the flags of this command instead of a recipe's keys."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for key, flag in _FLAGS.items():
            text = text.replace(key, flag)
        raise type(error)(text) from error


def prepare_training(config: TrainingRun, tracker: Tracker, hashes: FileHashes,
                     ) -> tuple[Splits, nn.Module, dict[str, Any]]:
    """Return the data, the untrained (or pretrained) model, and the options that the model was made with.

    Gray images get three channels where the model takes nothing else, unless the settings say one. `hashes` are those of an
    earlier start, and get the new ones.

    Raises:
        UserError: the data is missing, the model is unknown, or their shapes do not fit.
    """
    with tracker.progress("reading images") as advance:
        request = config.request(hashes=hashes, on_progress=advance)
        splits = load(request)
        card = splits.card
        options = _options(config, card)
        try:
            _check(config, options, card)
        except UserError:
            if card.input_shape[0] != 1 or config.channels == 1:
                raise
            coloured = card.model_copy(update={"input_shape": (3, *card.input_shape[1:])})
            options = _options(config, coloured)
            _check(config, options, coloured)
            splits = load(replace(request, channels=3))
    if config.pretrained:
        text = pretrained_warning(own_name(config.model_name), options, splits.card.preprocessing, lambda key: f"--{key}=")
        if text:
            tracker.warn(text + (" --channels=3" if splits.card.input_shape != card.input_shape else ""))
    with seeded(config.seed, "model"):
        model = make(own_name(config.model_name), num_classes=card.num_classes, pretrained=config.pretrained, **options)
    if isinstance(model, RunOnnxFile) and config.epochs:
        raise UserError(f"model_name {config.model_name}: {model.remarks[-1]}; such a file cannot be trained")
    for text in remarks(model):
        tracker.say(f"model_name {config.model_name}: {text}")
    look = getattr(model, "initialize_from", None)  # of networks whose first weights depend on their images
    if look and not config.pretrained:
        some = torch.arange(0, len(splits.train), max(1, len(splits.train) // LOOKED_AT))
        images = center_crop(splits.train.images.batch(some), splits.card.input_shape[1:])
        look(normalize(images, splits.card.preprocessing))
    return splits, model, options


def _options(config: TrainingRun, card: DatasetCard) -> dict[str, Any]:
    """Return the model's options: those given, and those that follow from the data."""
    options = dict(config.model_options)
    if taken := RESERVED & options.keys():
        raise UserError(f"model_options: {min(taken)} is a setting of its own, or comes from the data")
    _, height, width = card.input_shape
    name = own_name(config.model_name)
    if is_own(name):
        return fitted_options(name, options, card.input_shape)
    if name in families():
        takes = inspect.signature(families()[name]).parameters
        options = fitted_options(name, options, card.input_shape)
        if "stem" not in takes or (config.stem == "auto" and "stem" in options):
            return options
    small = config.stem == "small" or (config.stem == "auto" and max(height, width) <= SMALL_IMAGE
                                       and not config.pretrained)
    if not small or "stem" in options:
        return options
    if config.stem == "auto":
        try:  # only ResNets have a small stem
            with without_values():
                make(name, num_classes=2, **options, stem="small")
        except UserError:
            return options
    return {**options, "stem": "small"}


def _check(config: TrainingRun, options: dict[str, Any], card: DatasetCard) -> None:
    with without_values():
        module = make(own_name(config.model_name), num_classes=card.num_classes, **options)
    check_forward(module, f"model_name {config.model_name}", card.input_shape, card.num_classes)
    check_sizes(config, card.input_shape)
    for side in sorted(set(config.size_schedule.values())):
        check_forward(module, f"model_name {config.model_name}, size_schedule {side}", (
            card.input_shape[0], *shrunk_size(card.input_shape[1:], side)), card.num_classes)


def _loggers(config: TrainingRun) -> list[Logger]:
    """Return the loggers: curves always, the others as asked for. A missing package is an error before anything trains."""
    loggers: list[Logger] = [Curves(config.log_dir, f"{config.model_name} on {config.dataset}")]
    if config.use_tensorboard:
        loggers.append(TensorBoard(config.log_dir))
    if config.use_wandb:
        loggers.append(WeightsAndBiases(config.log_dir, config.wandb_project, config.model_dump(mode="json")))
    return loggers


@contextmanager
def claimed_log_dir(config: TrainingRun) -> Iterator[None]:
    """Claim the log folder for this process; remove the folder again if nothing was written into it.

    Raises:
        UserError: the folder holds another training (with the keys that differ), or something else, or is in use.
    """
    folder = config.log_dir
    files = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if files & {CHECKPOINT, SUMMARY, "metrics.csv"}:  # a training has begun
        if changed := config.difference(_settings_in(folder)):
            raise UserError(f"{folder} already holds another training ({some_of(changed)}); choose --log_dir OTHER, or "
                            "give the same settings to continue it")
    elif {name for name in files if not name.endswith(".part")} - {".lock", HASHES, SETTINGS, "wandb", "tensorboard"}:
        raise UserError(f"{folder}: already there and not a training's folder; choose --log_dir OTHER")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "choose --log_dir OTHER"):
        remove_leftovers(folder)
        try:
            yield
        finally:
            if not files and {entry.name for entry in folder.iterdir()} <= {".lock", HASHES}:
                for name in (".lock", HASHES):
                    (folder / name).unlink(missing_ok=True)
                folder.rmdir()


def _settings_in(folder: Path) -> TrainingRun:
    path = folder / SETTINGS
    try:
        return validated(json.loads(path.read_text())["config"], str(path))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not a training's settings, but the folder holds one's files; move it away, or choose "
                        "--log_dir OTHER") from error


def begin(config: TrainingRun, card: DatasetCard, tracker: Tracker) -> None:
    """Write the settings and the content of the data into the log folder, or compare the data of a training that continues.

    Raises:
        UserError: the data are not those that the training began with.
    """
    if (config.log_dir / CHECKPOINT).is_file():
        _check_data(config.log_dir, card.content, "the checkpoint", tracker)
    else:
        write_json(config.log_dir / SETTINGS, {"schema": 1, "config": config.model_dump(mode="json"), "data": card.content,
                                               "machine": machine(), "versions": versions()})


def _check_finished(config: TrainingRun, tracker: Tracker) -> None:
    """Raise UserError if the data are other ones than those that a finished training began with."""
    pattern = config.data_root is not None and any(sign in str(config.data_root) for sign in "*?[{")
    if config.data_root is not None and not pattern and not config.data_root.exists():
        tracker.warn(f"--data_root {config.data_root} is not there: the data are not compared with those of the training")
        return
    hashes = read_hashes(config.log_dir)
    with flags_named(), tracker.progress("reading images") as advance:
        request = replace(config.request(hashes=hashes, on_progress=advance), memory_limit_gb=UNDECODED_GB)
        content = load(request).card.content
    write_hashes(config.log_dir, hashes)
    _check_data(config.log_dir, content, "the finished training", tracker)


def _check_data(folder: Path, now: Content, whose: str, tracker: Tracker) -> None:
    before = json.loads((folder / SETTINGS).read_text()).get("data")
    if before is None:
        tracker.warn(f"{folder} began with an earlier version of the toolkit, which did not record its data: see yourself "
                     "that they are the same")
    elif changed := content_changes(before, now):
        raise UserError(f"{folder}: the data are not those of {whose}: {some_of(changed)}; bring the data back, or choose "
                        "--log_dir OTHER")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the content of summary.json of a finished training, or None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / SUMMARY
    if not path.is_file():
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
        if summary["schema"] != 1:
            raise ValueError
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: damaged, or of another version; remove it to measure the training again, or the folder "
                        "to start from the beginning") from error
    return summary


def _conclude(config: TrainingRun, splits: Splits, model: nn.Module, options: dict[str, Any], trained: Trained,
              dtype: torch.dtype | None) -> dict[str, Any]:
    """Write the weights and their measurements; this opens the test split for the first time."""
    folder, card = config.log_dir, splits.card
    device = next(model.parameters()).device
    measured = {}
    for name, split in (("validation", splits.validation), ("test", splits.open_test())):
        if len(split):
            found = assess(model, split.to(device), card.preprocessing, dtype)
            measured[name] = {"loss": found.loss, "accuracy": found.accuracy, "correct": found.correct,
                              "images": found.images}
    model.cpu()
    write_weights(folder / "weights.pth", model.state_dict())
    with suppress(UserError):  # a network outside the layer table can be a teacher by its name, options and weights
        lowered = lower(model, card.input_shape)
        if lowered.weights.keys() != model.state_dict().keys():
            write_weights(folder / LAYERS, lowered.weights)
        write_json(folder / "architecture.json", lowered.architecture.to_json())
    write_json(folder / "card.json", card.model_dump(mode="json"))
    summary = {
        "schema": 1, "model": {"name": own_name(config.model_name), "options": options, "num_classes": card.num_classes},
        "parameters": learned_parameters(model), "macs": count_macs(model, card.input_shape),
        "epochs": trained.epochs, "kept_epoch": trained.kept_epoch, "seconds": round(trained.seconds, 2),
        "images_per_second": round(len(splits.train) * trained.epochs / max(trained.seconds, 1e-9), 1), **measured,
        "machine": machine(), "versions": versions()}
    write_json(folder / SUMMARY, summary)
    for path in (folder / CHECKPOINT, *folder.glob(best_file(folder / CHECKPOINT, "*").name)):
        path.unlink(missing_ok=True)
    return summary
