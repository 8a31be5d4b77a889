"""Stage `teacher`: train a model, take one from a zoo, or open a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from architectures.weights import load_tensors
from architectures.zoo import check_forward, make
from compress.pipeline.stage import Context, Sketch, Stage, TeacherModel
from compress.training.assessment import accuracy_of
from compress.training.data import seeded
from compress.training.distillation import cross_entropy
from compress.training.loop import train
from compress.training.settings import TrainingSettings
from metadata.errors import UserError, VerificationError, first_line
from metadata.records import ModelReference


class Teacher(Stage):
    """A trained model of any kind: the project's own, torchvision's or timm's, traceable or not."""

    model: str = Field("slim_resnet18", description="a model of the project, torchvision or timm, by name")
    options: dict[str, Any] = Field({}, description="options of the model, such as width or stem")
    pretrained: bool = Field(False, description="start from the zoo's weights (a download unless they are cached); "
                                                "a checkpoint takes precedence")
    checkpoint: Path | None = Field(None, description="start from this .pth or .safetensors state dict")
    train: TrainingSettings = Field(TrainingSettings(), description="epochs: 0 takes the weights as they are")
    floor: float = Field(0.5, ge=0, le=1, description="validation accuracy below which the run warns loudly")

    def check(self, sketch: Sketch) -> None:
        if not (self.checkpoint or self.pretrained or self.train.epochs):
            raise UserError("teacher: the teacher would be untrained; give a checkpoint, pretrained: true, or epochs")
        sketch.check_training("teacher", self.train)
        with torch.device("meta"):
            module = make(self.model, num_classes=sketch.card.num_classes, **self.options)
        check_forward(module, f"teacher {self.model}", sketch.card.input_shape, sketch.card.num_classes,
                      "; for auxiliary heads try teacher.options.aux_logits=false")
        if self.checkpoint:
            _check_checkpoint(self._read_checkpoint(), module, self.checkpoint, sketch.card.num_classes)
        if self._pretrained and not self.train.epochs and sketch.card.num_classes != 1000:
            raise UserError(f"teacher {self.model}: its pretrained weights have 1000 classes, the data has "
                            f"{sketch.card.num_classes}; set teacher.train.epochs to train a new head, or pass a "
                            "checkpoint")
        source = f"checkpoint {self.checkpoint}" if self.checkpoint else "zoo weights" if self._pretrained else "scratch"
        parameters = sum(parameter.numel() for parameter in module.parameters())
        sketch.lines.append(f"{self.model} ({parameters:,} parameters) from {source}, {self.train.epochs} epochs")

    def run(self, model: None, context: Context) -> TeacherModel:
        card = context.splits.card
        reference = ModelReference(name=self.model, num_classes=card.num_classes, options=self.options)
        with seeded(context.seed, "teacher"):
            module = make(self.model, num_classes=card.num_classes, pretrained=self._pretrained, **self.options)
        if self.checkpoint:
            weights = self._read_checkpoint()
            _check_checkpoint(weights, module, self.checkpoint, card.num_classes)
            module.load_state_dict(weights)
        data = context.data(self.train)
        if self.train.epochs:
            context.training_seconds += train(
                module, data, cross_entropy(self.train.label_smoothing), context.usable(self.train),
                label="teacher", seed=context.seed, device=context.device, checkpoint=context.folder / "checkpoint.pth",
                tracker=context.tracker).seconds
        accuracy = accuracy_of(module.to(context.device), data.validation, card.preprocessing)
        if accuracy < self.floor:
            context.warn(f"the teacher's validation accuracy is {accuracy:.1%}, below teacher.floor ({self.floor:.0%}): a "
                         "student will learn little from this teacher")
        return TeacherModel(module.eval(), reference)

    @property
    def _pretrained(self) -> bool:
        return self.pretrained and self.checkpoint is None

    def _read_checkpoint(self) -> dict[str, torch.Tensor]:
        assert self.checkpoint is not None
        try:
            if self.checkpoint.suffix == ".safetensors":
                return _read_safetensors(self.checkpoint)
            return _state_dict(load_tensors(self.checkpoint), self.checkpoint)
        except VerificationError as error:
            raise UserError(f"teacher.checkpoint {error}") from error


def _state_dict(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the state dict in a checkpoint: bare, or under a key that training scripts commonly use."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"teacher.checkpoint {path}: expected a state dict (names to tensors), bare or under "
                        "'state_dict' or 'model'")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}  # DataParallel's prefix


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        weights: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"teacher.checkpoint {path}: not a safetensors file: {first_line(error)}") from error
    return weights


def _check_checkpoint(weights: dict[str, torch.Tensor], module: nn.Module, path: Path, num_classes: int) -> None:
    expected = module.state_dict()
    for name in expected.keys() ^ weights.keys():
        which = "is missing from" if name in expected else "is unknown to the model but in"
        raise UserError(f"teacher.checkpoint {path}: tensor {name} {which} the checkpoint; is teacher.model right?")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            head = (f"; the teacher has {tensor.shape[0]} classes, the data has {num_classes}"
                    if expected[name].shape[:1] == (num_classes,) else "")
            raise UserError(f"teacher.checkpoint {path}: tensor {name} is {list(tensor.shape)}, expected "
                            f"{list(expected[name].shape)}{head}")
