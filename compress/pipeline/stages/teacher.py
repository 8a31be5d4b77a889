"""Stage `teacher`: train a model, take one from a zoo or a file of one's own, or open a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from architectures.checkpoints import Checkpoint, class_permutation, open_checkpoint
from architectures.heads import reorder_classes
from architectures.named import has_weights, is_own, remarks
from architectures.onnx_network.runtime import RunOnnxFile
from architectures.pretrained import pretrained_input, pretrained_warning
from architectures.zoo import check_forward, family_modules, fitted_options, make, without_values
from compress.pipeline.own_models import content_of_model
from compress.pipeline.stage import Context, Sketch, Stage, TeacherModel
from compress.training.assessment import accuracy_of
from compress.training.data import seeded
from compress.training.distillation import cross_entropy
from compress.training.loop import train
from compress.training.settings import TrainingSettings
from metadata.errors import UserError
from metadata.records import DatasetCard, ModelReference


class Teacher(Stage):
    """A trained model of any kind: the project's own, torchvision's or timm's, traceable or not. There may be several."""

    model: str = Field("slim_resnet18", description="a model of the project, torchvision or timm, by name, or "
                                                 "file:FILE:CLASS, onnx:FILE, folder:DIR")
    options: dict[str, Any] = Field({}, description="options of the model, such as width or stem")
    pretrained: bool = Field(False, description="start from the zoo's weights (a download unless they are cached); "
                                                "a checkpoint takes precedence")
    checkpoint: Path | None = Field(None, description="start from this file: a state dict, bare or among other things, of "
                                                "torch.save or of safetensors")
    checkpoint_key: str | None = Field(None, description="key of the state dict in the checkpoint, such as "
                                                         "model_ema; the first that fits unless given")
    train: TrainingSettings = Field(TrainingSettings(), description="epochs: 0 takes the weights as they are")
    floor: float = Field(0.5, ge=0, le=1, description="validation accuracy below which the run warns loudly")

    WHERE: ClassVar = frozenset({"floor"})  # it decides on a warning alone

    def modules(self) -> list[str]:
        return family_modules(self.model)

    def reads(self) -> dict[str, Any]:
        return content_of_model(self.model)

    def check(self, sketch: Sketch) -> None:
        sketch.teachers += 1
        if not (self.checkpoint or self.pretrained or self.train.epochs or has_weights(self.model)):
            raise UserError("teacher: the teacher would be untrained; give a checkpoint, pretrained: true, or epochs")
        if self.pretrained and is_own(self.model):
            raise UserError(f"teacher.pretrained: true, but {self.model} is a file of one's own, without weights to "
                            "fetch; leave pretrained out")
        sketch.check_training("teacher", self.train)
        options = self._fitted(sketch.card)
        with without_values(), torch.random.fork_rng(devices=[]):
            module = make(self.model, num_classes=sketch.card.num_classes, **options)
        check_forward(module, f"teacher {self.model}", sketch.card.input_shape, sketch.card.num_classes,
                      "; for auxiliary heads try teacher.options.aux_logits=false")
        sketch.teacher = self.model, options
        if isinstance(module, RunOnnxFile) and (self.train.epochs or self.checkpoint):
            raise UserError(f"teacher {self.model}: {module.remarks[-1]}; set teacher.train.epochs=0, and no checkpoint")
        notes, warnings = self._try_checkpoint(module, sketch.card)
        sketch.warnings += warnings
        sketch.warnings += self._pretrained_warnings(sketch.card)
        if self._pretrained and not self.train.epochs:
            classes = pretrained_input(self.model, self.options).num_classes
            if sketch.card.num_classes != classes:
                raise UserError(f"teacher {self.model}: its pretrained weights have {classes} classes, the data has "
                                f"{sketch.card.num_classes}; set teacher.train.epochs to train a new head, or pass a "
                                "checkpoint")
        source = "zoo weights" if self._pretrained else "its own file" if is_own(self.model) else "scratch"
        if self.checkpoint:
            source = f"checkpoint {self.checkpoint}" + (f" ({'; '.join(notes)})" if notes else "")
        parameters = sum(parameter.numel() for parameter in module.parameters())
        text = f"{self.model} ({parameters:,} parameters) from {source}, {self.train.epochs} epochs"
        sketch.lines.append("; ".join([text, *remarks(module)]))

    def run(self, model: TeacherModel | None, context: Context) -> TeacherModel:
        card = context.splits.card
        options = self._fitted(card)
        reference = ModelReference(name=self.model, num_classes=card.num_classes, options=options)
        with seeded(context.seed, "teacher"):
            module = make(self.model, num_classes=card.num_classes, pretrained=self._pretrained, **options)
        for text in remarks(module):
            context.tracker.say(f"  teacher.model {self.model}: {text}")
        for text in self._pretrained_warnings(card):
            context.warn(text)
        if self.checkpoint:
            notes, warnings = _load(self._open_checkpoint(module, card), module, card)
            for text in notes:
                context.tracker.say(f"  teacher.checkpoint {self.checkpoint}: {text}")
            for text in warnings:
                context.warn(f"teacher.checkpoint {self.checkpoint}: {text}")
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

    def _fitted(self, card: DatasetCard) -> dict[str, Any]:
        return fitted_options(self.model, self.options, card.input_shape)

    @property
    def _pretrained(self) -> bool:
        return self.pretrained and self.checkpoint is None

    def _pretrained_warnings(self, card: DatasetCard) -> list[str]:
        """Return a line on the images that the zoo's weights were trained on, if the data's are others."""
        if not self._pretrained:
            return []
        text = pretrained_warning(self.model, self.options, card.preprocessing, lambda key: f"data.{key}=")
        return [text] if text else []

    def _try_checkpoint(self, empty: nn.Module, card: DatasetCard) -> tuple[list[str], list[str]]:
        """Return the notes and warnings about the checkpoint. `empty` is the module on the meta device."""
        if not self.checkpoint:
            return [], []
        opened = self._open_checkpoint(empty, card)
        if opened.class_names and class_permutation(opened.class_names, card.class_names):
            with torch.random.fork_rng(devices=[]):  # only a module with weights shows whether its classes can be reordered
                empty = make(self.model, num_classes=card.num_classes, **self._fitted(card))
        try:
            notes, warnings = _load(opened, empty, card)
        except UserError as error:
            raise UserError(f"teacher.checkpoint {self.checkpoint}: {error}") from error
        return notes, [f"teacher.checkpoint {self.checkpoint}: {text}" for text in warnings]

    def _open_checkpoint(self, module: nn.Module, card: DatasetCard) -> Checkpoint:
        assert self.checkpoint is not None
        try:
            return open_checkpoint(self.checkpoint, module, key=self.checkpoint_key, num_classes=card.num_classes)
        except UserError as error:
            raise UserError(f"teacher.checkpoint {error}") from error


def _load(opened: Checkpoint, module: nn.Module, card: DatasetCard) -> tuple[list[str], list[str]]:
    """Load a checkpoint into a module, with its classes in the data's order. Return notes and warnings.

    Raises:
        UserError: the classes are in another order, and the module's last layer cannot be reordered.
    """
    if not any(parameter.is_meta for parameter in module.parameters()):
        module.load_state_dict(opened.weights)
    stated, wanted = opened.class_names, card.class_names
    if stated is None:
        return opened.notes, _order_in_doubt(wanted)
    if stated == wanted:
        return opened.notes, []
    order = class_permutation(stated, wanted)
    if order is None:
        theirs, ours = next(((a, b) for a, b in zip(stated, wanted, strict=False) if a != b), (len(stated), len(wanted)))
        return opened.notes, [f"it names other classes than the data ({theirs!r} where the data has {ours!r}); its logits "
                              "are taken in the order of the data's classes, sorted by name"]
    if order == list(range(len(order))):  # the names differ in spelling alone
        return opened.notes, []
    example = torch.randn(2, *card.input_shape, generator=torch.Generator().manual_seed(0))
    if not reorder_classes(module, order, example):
        raise UserError(f"its classes are the data's in another order (class 0 is {stated[0]!r}, the data's is "
                        f"{wanted[0]!r}), and the model's last layer cannot be reordered; reorder it before you save the "
                        "checkpoint")
    return [*opened.notes, "its classes are in another order and are put into the data's, by name (class 0 is "
                           f"{stated[0]!r} in it, {wanted[0]!r} in the data)"], []


def _order_in_doubt(names: list[str]) -> list[str]:
    """Return a warning where training scripts number these classes differently: sorted as text, or by the numbers in it."""
    def by_number(name: str) -> list[Any]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]

    other = sorted(names, key=by_number)
    if names != sorted(names) or names == other:
        return []
    return ["it names no classes; its logits are taken in the order of the data's, sorted as text "
            f"({', '.join(names[:3])}, ...), as torchvision does; timm sorts by number and regardless of case "
            f"({', '.join(other[:3])}, ...)"]
