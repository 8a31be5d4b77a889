"""Stage `finetune`: train a student further, such as after pruning; optionally with the teacher or quantization-aware."""

from __future__ import annotations

import copy

from pydantic import Field
from torch import fx

from architectures.describe import carry_over, describe
from compress.pipeline.stage import Context, Sketch, Stage, TeacherModel, TorchModel
from compress.quantization.aware import prepare_aware, restored
from compress.quantization.weights import DEFAULT_FORM, WeightForm
from compress.training.assessment import accuracy_of
from compress.training.data import Data
from compress.training.distillation import TeacherLoss, cross_entropy, distill
from compress.training.loop import train
from compress.training.mixup import Loss
from compress.training.precision import autocast_dtype
from compress.training.settings import TrainingSettings
from compress.training.targets import live_targets
from metadata.errors import UserError

CALIBRATION_IMAGES, CALIBRATION_BATCH = 512, 128
HARM = 0.005  # of the validation images: quantization-aware training that loses more of them is warned of


class Finetune(TeacherLoss, Stage):
    """Train the same network further."""

    history = "finetuning"

    teacher: bool = Field(False, description="distill from the run's teacher, by method, temperature and alpha")
    quantization_aware: bool = Field(False, description="train with weights and activations rounded as in static int8")
    weights: WeightForm = Field(DEFAULT_FORM, description="quantization-aware: the form of the weights, as in "
                                "quantize_static")
    freeze_after: float = Field(0.5, ge=0, le=1, description="quantization-aware: fraction of the steps after which "
                                "batch norm statistics and activation ranges are frozen")
    train: TrainingSettings = TrainingSettings(epochs=5, lr=0.01)

    def check(self, sketch: Sketch) -> None:
        sketch.refuse_int8("finetune")
        sketch.check_training("finetune", self.train)
        for needed, keys in (("quantization_aware", ("weights", "freeze_after")), ("teacher", TeacherLoss.model_fields)):
            for key in keys:
                if not getattr(self, needed) and getattr(self, key) != type(self).model_fields[key].default:
                    raise UserError(f"finetune.{key}: the setting has no effect without {needed}: true")
        self.check_classes("finetune", sketch.card.num_classes)
        if self.by_features:
            raise UserError(f"finetune.method {self.method}: features are compared by the stage distill alone; set kd, "
                            "standardized, dkd or dist")
        if self.quantization_aware and self.train.precision not in ("auto", "float32"):
            raise UserError(f"finetune.train.precision: {self.train.precision} cannot hold the values of the 8-bit grids; "
                            "with quantization_aware set auto or float32")
        sketch.lines.append(f"{self.train.epochs} epochs" + (" with the teacher" if self.teacher else "")
                            + (f", quantization-aware, {self.weights} weights" if self.quantization_aware else ""))

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        settings = context.usable(self.train)
        if self.quantization_aware:
            settings = settings.model_copy(update={"precision": "float32"})
        loss = cross_entropy(self.train.label_smoothing)
        if self.teacher:
            teacher = context.latest(TeacherModel)
            if teacher is None:
                raise UserError("finetune.teacher: true, but no stage before it gives a teacher")
            dtype = autocast_dtype(settings.precision, context.device)
            targets = live_targets([teacher.module.to(context.device)], dtype)
            loss = distill(targets, self.chosen(), self.train.label_smoothing)
        data = context.data(self.train)
        if self.quantization_aware:
            module = self._train_rounded(model.module, data, loss, settings, context)
        else:
            module = copy.deepcopy(model.module)
            self._train(module, data, loss, settings, context)
        steps = [*model.architecture.compression_steps, self.history]
        return TorchModel(module, carry_over(describe(module, model.architecture.input_shape), model.architecture,
                                             compression_steps=steps))

    def _train(self, module: fx.GraphModule, data: Data, loss: Loss, settings: TrainingSettings, context: Context) -> None:
        context.training_seconds += train(
            module, data, loss, settings, label="finetune", seed=context.seed, device=context.device,
            checkpoint=context.folder / "checkpoint.pth", tracker=context.tracker).seconds

    def _train_rounded(self, model: fx.GraphModule, data: Data, loss: Loss, settings: TrainingSettings,
                       context: Context) -> fx.GraphModule:
        """Train the model rounded as static int8 will compute it, and return the float model with the trained weights."""
        # Forward passes: one for each part of an accumulated batch, and with SAM two.
        passes = settings.total_steps(len(data.train)) * settings.accumulate * (2 if settings.optimizer == "sam" else 1)
        rounded = prepare_aware(copy.deepcopy(model).to(context.device),
                          context.examples(CALIBRATION_IMAGES).split(CALIBRATION_BATCH),
                          freeze_after=round(self.freeze_after * passes), weights=self.weights)
        before = accuracy_of(rounded, data.validation, data.preprocessing)
        self._train(rounded, data, loss, settings, context)
        after = accuracy_of(rounded, data.validation, data.preprocessing)
        context.note("simulated_int8", {"accuracy_post_training": before, "accuracy": after})  # on the validation split
        if (lost := before - after) > HARM:
            context.warn(f"quantization-aware training lost {round(lost * len(data.validation))} of {len(data.validation)} "
                         f"validation images: as int8, {after:.2%} are right after it, {before:.2%} before; lower "
                         "finetune.train.lr, or leave it out")
        return restored(rounded, model)
