"""Trainings of the race on a Ray cluster: what a bench holds goes to files that all machines share."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from architectures.architecture import Architecture
from architectures.build import build
from architectures.weights import load_tensors
from architectures.zoo import make
from compress.search.bench import Bench, RememberedTargets
from compress.search.race import Heat, HeatResult, TrainAll
from compress.search.space import Space
from compress.training.data import training_data
from compress.training.distillation import TeacherLoss, cross_entropy, distill
from compress.training.mixup import Batch, Loss
from compress.training.precision import autocast_dtype
from compress.training.settings import TrainingSettings
from compress.training.targets import Targets, live_targets
from compress.training.trackers import Tracker
from compress.training.workers import Report, TaskOutcome, run_ray
from loaders.arrays import ArrayImages
from loaders.splits import Split
from metadata.files import read_json, write_json
from metadata.formats import write_tensors
from metadata.records import DatasetCard, ModelReference
from metadata.schemas import Strict

KIT, TENSORS = "kit.json", "checkpoint-kit.pth"  # the pipeline removes checkpoints once their stage is done


class Teaching(Strict):
    """How the networks of a search learn: from a teacher by name, or from labels alone.

    Args:
        teacher: that its weights belong to; None: labels alone.
        method: of distillation.
        settings: of all trainings.
    """

    teacher: ModelReference | None
    method: TeacherLoss
    settings: TrainingSettings

    def loss(self, teacher: nn.Module | None, device: torch.device, batches: Sequence[Batch] = ()) -> Loss:
        """Return the loss of all trainings.

        Args:
            teacher: the one that is named.
            device: to compute on.
            batches: that are asked for again and again, and no others; the teacher's answers are remembered.
        """
        smoothing = self.settings.label_smoothing
        if teacher is None:
            return cross_entropy(smoothing)
        targets: Targets = live_targets([teacher.to(device)], autocast_dtype(self.settings.precision, device))
        if batches:
            targets = RememberedTargets(targets, batches)
        return distill(targets, self.method.chosen(), smoothing)


class _Kit(Strict):
    """The file of a bench: what is not tensors."""

    teaching: Teaching
    card: DatasetCard
    architecture: Architecture
    seed: int


@dataclass(frozen=True, kw_only=True)
class ClusterHeat:
    """A training of the race, as sent to a machine of the cluster."""

    heat: Heat
    folder: Path


def cluster_trainer(address: str, teaching: Teaching, teacher: nn.Module | None, card: DatasetCard,
                    ) -> Callable[[Bench], TrainAll]:
    """Return a function that has the networks of a bench trained on a Ray cluster.

    The bench goes to files in its folder, which all machines must share. The training of a machine that is lost is
    repeated on another, from its last checkpoint.

    Args:
        address: see `compress.training.workers.run_ray`.
        teaching: how they learn.
        teacher: the teacher that it names.
        card: of the data.
    """
    def trainer(bench: Bench) -> TrainAll:
        _write_kit(bench, teaching, teacher, card)

        def train_all(heats: Sequence[Heat], on_result: Callable[[HeatResult], None]) -> None:
            def on_outcome(outcome: TaskOutcome[ClusterHeat, HeatResult]) -> None:
                on_result(outcome.result or HeatResult(id=outcome.task.heat.entrant.id, failure=outcome.failure))

            if heats:
                tasks = [ClusterHeat(heat=heat, folder=bench.folder.resolve()) for heat in heats]
                run_ray(train_on_cluster, tasks, address, on_outcome, None)
        return train_all
    return trainer


def train_on_cluster(task: ClusterHeat, report: Report) -> HeatResult:
    """Train a network of the race on the machine that this runs on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _read_kit(task.folder, device).train_heat(task.heat)


def _write_kit(bench: Bench, teaching: Teaching, teacher: nn.Module | None, card: DatasetCard) -> None:
    """Write what a bench holds; the tensors last, so that there are none of another kit."""
    splits = {"train": bench.data.train, "validation": bench.data.validation}
    kit = _Kit(teaching=teaching, card=card, architecture=bench.space.architecture, seed=bench.seed)
    write_json(bench.folder / KIT, kit.model_dump(mode="json"))
    write_tensors(bench.folder / TENSORS, {
        "student": bench.student.state_dict(), "scores": {name: dict(each) for name, each in bench.scores.items()},
        "teacher": None if teacher is None else {name: tensor.cpu() for name, tensor in teacher.state_dict().items()},
        **{name: split.images.batch(torch.arange(len(split))).cpu() for name, split in splits.items()},
        **{f"{name}_labels": split.labels.cpu() for name, split in splits.items()}})


def _read_kit(folder: Path, device: torch.device) -> Bench:
    """Return the bench that a folder holds, on a device."""
    kit: _Kit = read_json(folder / KIT, _Kit)
    tensors = load_tensors(folder / TENSORS)
    student = build(kit.architecture)
    student.load_state_dict(tensors["student"])
    teacher, reference = None, kit.teaching.teacher
    if reference is not None:
        teacher = make(reference.name, num_classes=reference.num_classes, **reference.options)
        teacher.load_state_dict(tensors["teacher"])
    train, validation = (Split(ArrayImages(tensors[name]), tensors[f"{name}_labels"]) for name in ("train", "validation"))
    return Bench(
        space=Space.of(kit.architecture, student.state_dict()), student=student.eval(), scores=tensors["scores"],
        data=training_data(train, validation, kit.card, kit.teaching.settings, seed=kit.seed, device=device),
        loss=kit.teaching.loss(teacher, device), settings=kit.teaching.settings, seed=kit.seed, device=device,
        folder=folder, tracker=Tracker(Console(file=io.StringIO())))
