"""The bench on which the networks of a search train: the student, the data, the loss, and files to continue from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx

from architectures.architecture import Architecture
from architectures.build import build
from architectures.weights import read_weights
from compress.search.entrants import Entrant
from compress.search.race import Heat, HeatResult
from compress.search.space import Space
from compress.search.timed import in_steps, step_seconds
from compress.training.assessment import assess
from compress.training.data import Data
from compress.training.loop import train
from compress.training.mixup import Batch, Loss
from compress.training.settings import TrainingSettings
from compress.training.targets import Targets
from compress.training.trackers import Tracker
from metadata.errors import UserError
from metadata.formats import write_weights

WEIGHTS = "checkpoint-weights-{}-{}.pth"  # the pipeline removes checkpoints once their stage is done


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the networks of a search train with.

    Args:
        space: the sub-networks of the student.
        student: trained, on the CPU.
        scores: (units,) importance by group, by criterion.
        data: on the device.
        loss: with the teacher where there is one.
        settings: of all trainings, but for their lengths.
        seed: of the run.
        device: to train on.
        folder: of the files to continue from.
        tracker: shows progress.
    """

    space: Space
    student: fx.GraphModule
    scores: Mapping[str, Mapping[str, Tensor]]
    data: Data
    loss: Loss
    settings: TrainingSettings
    seed: int
    device: torch.device
    folder: Path
    tracker: Tracker

    def network(self, entrant: Entrant) -> tuple[fx.GraphModule, Architecture]:
        """Return a network as far as it is trained, on the CPU, and its layers."""
        if entrant.solver == "none":
            return copy.deepcopy(self.student), self.space.architecture
        architecture = self.space.shape(entrant.choice)
        path = self._weights(entrant.id, entrant.round - 1)
        if entrant.round == 0 or not path.is_file():
            return self.space.network(entrant.choice, self.scores[entrant.criterion]), architecture
        network = build(architecture)
        network.load_state_dict(read_weights(path))
        return network.eval(), architecture

    def pace(self, entrant: Entrant) -> float:
        """Return the seconds of a training step, measured on a few steps."""
        return step_seconds(self.network(entrant)[0], self.data, self.loss, self.settings, self.device)

    def train_all(self, heats: Sequence[Heat], on_result: Callable[[HeatResult], None]) -> None:
        """Train networks in this process, one after another."""
        for heat in heats:
            on_result(self.train_heat(heat))

    def train_heat(self, heat: Heat) -> HeatResult:
        """Train a network for a round, from where the round before it ended; what a killed one has done is kept."""
        network, _ = self.network(heat.entrant)
        checkpoint = self.folder / f"checkpoint-heat-{heat.entrant.id}-{heat.round}.pth"
        try:
            trained = train(network, self.data, self.loss, in_steps(self.settings, heat.steps, len(self.data.train)),
                            label=f"candidate {heat.entrant.id}, round {heat.round + 1}", seed=self.seed,
                            device=self.device, checkpoint=checkpoint, tracker=replace(self.tracker, folder=None))
        except UserError as error:  # a diverged training; others may fare better
            return HeatResult(id=heat.entrant.id, failure=str(error))
        found = assess(network, self.data.validation, self.data.preprocessing)
        write_weights(self._weights(heat.entrant.id, heat.round), network.cpu().state_dict())
        checkpoint.unlink(missing_ok=True)
        return HeatResult(id=heat.entrant.id, correct=found.correct, images=found.images, pace=trained.seconds / heat.steps)

    def _weights(self, number: int, round: int) -> Path:
        return self.folder / WEIGHTS.format(number, round)


class RememberedTargets:
    """What the teacher says of some batches that are asked for again and again.

    Args:
        targets: of the teacher.
        batches: that are remembered.
    """

    def __init__(self, targets: Targets, batches: Sequence[Batch]) -> None:
        self.known = {id(batch): (batch, targets(batch)) for batch in batches}  # the batches are kept: ids stay theirs

    def __call__(self, batch: Batch) -> Tensor:
        return self.known[id(batch)][1]


def fixed_batches(data: Data, device: torch.device, images: int, batch_size: int) -> list[Batch]:
    """Return batches of training images that stay the same, to measure losses on.

    Args:
        data: whose first images, in the order of a draw, are taken; augmented once.
        device: to compute on.
        images: number of images.
        batch_size: images a batch.
    """
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:images]
    ids = [part for part in order.split(batch_size) if len(part) == min(batch_size, len(order))]
    return list(data.batches(ids, view=0, size=0, device=device, memory_format=torch.contiguous_format))
