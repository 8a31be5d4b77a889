"""The files of a training: the checkpoint that a training continues from, and the weights of the best epoch."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from architectures.weights import load_tensors
from compress.training.state import TrainingState
from metadata.errors import UserError, VerificationError, first_line
from metadata.formats import write_tensors


class DivergedError(UserError):
    """The loss or the weights are not finite any more. The message names the step and says what to do."""


@dataclass(kw_only=True)
class Checkpoints:
    """Writes and reads the files of one training.

    Args:
        path: the checkpoint.
        label: the training's name, for messages.
        seconds: time between checkpoints.
        writes: whether this process writes; the first of a team does.
        data: fingerprint of the data, which a checkpoint keeps; "" if it is not known.
    """

    path: Path
    label: str
    seconds: float
    writes: bool
    data: str = ""
    saved: float = field(default_factory=time.monotonic)

    @property
    def due(self) -> bool:
        """Whether the next checkpoint is due."""
        return time.monotonic() - self.saved > self.seconds

    def restore(self, state: TrainingState) -> bool:
        """Continue from the checkpoint; return whether there is one.

        Raises:
            UserError: the file is damaged, or of another training or other data.
        """
        if not self.path.is_file():
            return False
        content = _read(self.path)
        began_with = content.get("data", "") if isinstance(content, dict) else ""
        if began_with and self.data and began_with != self.data:
            raise UserError(f"{self.path}: the data are not those of the checkpoint (their hash is {self.data}, the "
                            f"checkpoint's {began_with}); bring the data back to continue, or start in another folder")
        try:
            state.load_state_dict(content)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"{self.path}: not a checkpoint of this training ({first_line(error)}); remove it to start "
                            "from the beginning") from error
        return True

    def save(self, state: TrainingState) -> None:
        """Write the checkpoint, and remove the weights of epochs that are not the best any more.

        Raises:
            DivergedError: the loss or the weights are not finite; the last good checkpoint stays.
        """
        self.saved = time.monotonic()
        if not self.writes:
            return
        self.check_finite(state)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in state.model.parameters()):
            raise self._diverged(state, "the weights are not finite any more")
        write_tensors(self.path, {**state.state_dict(), "data": self.data})
        for path in self.path.parent.glob(best_file(self.path, "*").name):
            if path != best_file(self.path, state.best_epoch):  # no checkpoint names this file any more
                path.unlink()

    def save_best(self, state: TrainingState) -> None:
        """Write the weights of the best epoch, which has just ended."""
        if self.writes:
            write_tensors(best_file(self.path, state.best_epoch), state.measured.state_dict())

    def load_best(self, state: TrainingState, model: nn.Module) -> None:
        """Load the weights of the best epoch into the model, in the process that wrote them."""
        if self.writes:
            model.load_state_dict(_read(best_file(self.path, state.best_epoch)))

    def check_finite(self, state: TrainingState, step: int | None = None) -> None:
        """Raise DivergedError if the loss is not finite at a step (the last one that is done unless given)."""
        if not math.isfinite(loss := float(state.loss_sum)):
            raise self._diverged(state, f"the loss is {loss}", step)

    def _diverged(self, state: TrainingState, what: str, step: int | None = None) -> DivergedError:
        kept = f"the last good state is kept in {self.path}" if self.path.is_file() else "nothing was saved yet"
        return DivergedError(f"{self.label}: {what} at step {step or state.step} (learning rate {state.lr:.3g}); lower lr, "
                             f"lengthen the warmup or set clip; {kept}")


def best_file(checkpoint: Path, epoch: int | str) -> Path:
    """Return the file with the weights of an epoch (counted from 1, "*" for any) beside a checkpoint."""
    label = checkpoint.stem.removeprefix("checkpoint").strip("-")  # a stage may have several trainings in its folder
    return checkpoint.with_name(f"best-{label}-{epoch}.pth" if label else f"best-{epoch}.pth")


def _read(path: Path) -> Any:
    try:
        return load_tensors(path)
    except VerificationError as error:
        raise UserError(f"{error}; it is damaged, remove the training's files to start from the beginning") from error
