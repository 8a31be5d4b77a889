"""Stage `finetune`: train on, after something was taken away; with the teacher if asked."""

from __future__ import annotations

import copy

from pydantic import Field

from architectures.describe import carry_over, describe
from compress.config import TrainConfig
from compress.distillation import cross_entropy, distill, live_targets
from compress.stage import Context, Sketch, Stage, TeacherModel, TorchModel, training_recipe
from compress.training import train
from model_loader import UserError


class Finetune(Stage):
    """Further training of the same network."""

    history = "finetuning"

    teacher: bool = Field(False, description="distill from the run's teacher, with the settings below")
    temperature: float = Field(4.0, gt=0, description="with the teacher")
    alpha: float = Field(0.9, ge=0, le=1, description="with the teacher")
    train: TrainConfig = TrainConfig(epochs=5, lr=0.01)

    def check(self, sketch: Sketch) -> None:
        sketch.refuse_int8("finetune")
        sketch.lines.append(f"{self.train.epochs} epochs" + (" with the teacher" if self.teacher else ""))

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        recipe = training_recipe(self.train, context.device)
        loss = cross_entropy(self.train.label_smoothing)
        if self.teacher:
            teacher = context.latest(TeacherModel)
            if teacher is None:
                raise UserError("finetune.teacher: true, but no stage before it gives a teacher")
            targets = live_targets(teacher.module.to(context.device), recipe.autocast)
            loss = distill(targets, self.temperature, self.alpha, self.train.label_smoothing)
        module = copy.deepcopy(model.module)
        context.training_seconds += train(
            module, context.data(self.train), loss, recipe, label="finetune", seed=context.seed, device=context.device,
            checkpoint=context.folder / "checkpoint.pth", tracker=context.tracker).seconds
        steps = [*model.architecture.compression_steps, self.history]
        return TorchModel(module, carry_over(describe(module, model.architecture.input_shape), model.architecture,
                                             compression_steps=steps))
