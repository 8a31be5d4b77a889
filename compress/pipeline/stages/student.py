"""Stage `student`: take a model as it is, with its weights, as what the next stages prune, finetune and quantize."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import nn

from architectures.named import has_weights, remarks
from architectures.zoo import family_modules, fitted_options, make
from compress.pipeline.own_models import as_student, content_of_model
from compress.pipeline.stage import Context, Sketch, Stage, TeacherModel, TorchModel
from compress.training.data import seeded
from metadata.errors import UserError
from metadata.records import DatasetCard


class Student(Stage):
    """The teacher itself, or another trained model, without distillation."""

    model: str | None = Field(None, description="the model by name: onnx:FILE, folder:DIR, file:FILE:CLASS, or a "
                                                "pretrained one; the teacher unless given")
    options: dict[str, Any] = Field({}, description="options of the model")
    pretrained: bool = Field(False, description="the zoo's weights (a download unless they are cached)")

    def modules(self) -> list[str]:
        return family_modules(self.model) if self.model else []

    def reads(self) -> dict[str, Any]:
        return content_of_model(self.model) if self.model else {}

    def check(self, sketch: Sketch) -> None:
        if self.model is None and sketch.teacher is None:
            if sketch.teachers:
                return  # what is wrong with it is told already
            raise UserError("student: no stage before it gives a teacher; name a model")
        if self.model and not (self.pretrained or has_weights(self.model)):
            raise UserError(f"student.model {self.model}: it would be untrained; set pretrained: true, name a file or "
                            "folder, or train it by the stage distill")
        with seeded(sketch.seed, "student"):
            module = self._make(sketch.card, pretrained=False) if self.model else make(
                sketch.teacher[0], num_classes=sketch.card.num_classes, **sketch.teacher[1])  # type: ignore[index]
        architecture, sketch.model = as_student(module, sketch.card, self.model or "the teacher")
        text = f"{self.model or 'the teacher'} as it is, {len(architecture.layers)} layers"
        sketch.lines.append("; ".join([text, *(remarks(module) if self.model else [])]))  # the teacher's stage says its own

    def run(self, model: TeacherModel | None, context: Context) -> TorchModel:
        card = context.splits.card
        if self.model:
            with seeded(context.seed, "student"):
                module = self._make(card, self.pretrained)
            for text in remarks(module):
                context.tracker.say(f"  student.model {self.model}: {text}")
        else:
            assert model is not None
            module = model.module.cpu()
        architecture, student = as_student(module, card, self.model or "the teacher")
        return TorchModel(student, architecture)

    def _make(self, card: DatasetCard, pretrained: bool) -> nn.Module:
        assert self.model is not None
        return make(self.model, num_classes=card.num_classes, pretrained=pretrained,
                    **fitted_options(self.model, self.options, card.input_shape))
