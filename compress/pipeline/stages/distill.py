"""Stage `distill`: train a student on the teacher's logits and the labels; optionally a control without the teacher."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import fx, nn

from architectures.architecture import Architecture
from architectures.describe import carry_over, describe
from architectures.named import remarks, without_place
from architectures.onnx_network.runtime import RunOnnxFile
from architectures.zoo import family_modules, fitted_options, make
from compress.pipeline.own_models import as_student, content_of_model
from compress.pipeline.stage import Context, Sketch, Stage, TeacherModel, TorchModel
from compress.training.assessment import accuracy_of
from compress.training.data import seeded
from compress.training.distillation import TeacherLoss, cross_entropy, distill
from compress.training.features import FEATURE_ALPHA, learner_by_features, pairs_of
from compress.training.loop import train
from compress.training.mixup import Loss
from compress.training.precision import autocast_dtype
from compress.training.settings import TrainingSettings
from compress.training.targets import Targets, TopLogits, cached_targets, live_targets
from metadata.errors import UserError
from metadata.machine import memory_bytes
from metadata.records import DatasetCard


class Distill(TeacherLoss, Stage):
    """Knowledge distillation, by logits or by features."""

    history = "knowledge_distillation"

    model: str = Field("slim_resnet18", description="the student by name, or file:FILE:CLASS, onnx:FILE, folder:DIR; "
                                                 "it must be traceable")
    options: dict[str, Any] = Field({}, description="options of the student, such as width or stem")
    teachers: int = Field(1, ge=1, le=16, description="how many of the stages teacher before it teach, the latest ones: by "
                                                      "the mean of their logits")
    cache_views: int = Field(0, ge=0, description="augmented views of each image whose teacher outputs are computed "
                                                  "once and cached; 0: the teacher runs on every batch")
    control: bool = Field(False, description="also train the same student without the teacher, to show the gain")
    train: TrainingSettings = TrainingSettings()

    def modules(self) -> list[str]:
        return family_modules(self.model)

    def reads(self) -> dict[str, Any]:
        return content_of_model(self.model)

    def check(self, sketch: Sketch) -> None:
        sketch.check_training("distill", self.train)
        if self.teachers > sketch.teachers:
            raise UserError(f"distill.teachers {self.teachers}: there are {sketch.teachers} stages teacher before it; add "
                            "one for each")
        if self.cache_views and self.train.views:
            raise UserError("distill.cache_views: the teacher's outputs are kept for this number of views, so that "
                            "train.views must be 0; set one of the two")
        if self.by_features:
            self._check_features(sketch)
        self.check_classes("distill", sketch.card.num_classes)
        self._check_cache(sketch.card)
        architecture, student, notes = self._student(sketch.card, sketch.seed)
        sketch.model = student.eval()
        control = ", and a control without the teacher" if self.control else ""
        text = f"{architecture.model_type} with {len(architecture.layers)} layers, {self.train.epochs} epochs{control}"
        sketch.lines.append("; ".join([text, *notes]))

    def run(self, model: TeacherModel, context: Context) -> TorchModel:
        data = context.data(self.train)
        settings = context.usable(self.train)
        if self.cache_views:
            settings = settings.model_copy(update={"views": self.cache_views})
        dtype = autocast_dtype(settings.precision, context.device)
        taught_by = [output for output in context.outputs if isinstance(output, TeacherModel)][-self.teachers:]
        teachers = [teacher.module.to(context.device) for teacher in taught_by]
        targets: Targets = live_targets(teachers, dtype)
        if self.cache_views:
            cache = cached_targets(teachers, data, self.cache_views, context.folder / "teacher_logits.pth", dtype,
                                   context.device, context.tracker, self.cache_temperature(settings))
            context.note("cached_teacher_outputs", list(cache.logits.shape))
            if isinstance(cache.logits, TopLogits):
                context.note("cached_teacher_outputs_kept", cache.logits.values.shape[2])
            targets = cache

        def trained(label: str, loss: Loss | None) -> tuple[TorchModel, float, float]:
            architecture, student, notes = self._student(context.splits.card, context.seed)
            for text in notes:
                context.tracker.say(f"  distill.model {self.model}, {label}: {text}")
            learner: nn.Module = student
            if loss is None:
                learner, loss = self._by_features(architecture, student, teachers[0], dtype, context)
            outcome = train(
                learner, data, loss, settings, label=label, seed=context.seed, device=context.device,
                checkpoint=context.folder / f"checkpoint-{label}.pth", tracker=context.tracker)
            details = {"teacher": ", ".join(without_place(teacher.reference.name) for teacher in taught_by),
                       "epochs": self.train.epochs, "optimizer": self.train.optimizer, "lr": self.train.lr,
                       "batch_size": self.train.batch_size,
                       "method": self.method, **self._weights(),
                       "dataset": context.splits.card.name, "seed": context.seed}
            described = carry_over(describe(student, architecture.input_shape), architecture,
                                   compression_steps=[self.history], training_details=details)
            accuracy = accuracy_of(student, data.validation, data.preprocessing)
            return TorchModel(student, described), accuracy, outcome.seconds

        smoothing = self.train.label_smoothing
        student, accuracy, context.training_seconds = trained(
            "student", None if self.by_features else distill(targets, self.chosen(), smoothing))
        if self.control:
            control, without, seconds = trained("control", cross_entropy(smoothing))
            context.extra_models["control"] = control, seconds
            gain, images = accuracy - without, len(data.validation)
            context.note("gain_over_control", {"fraction": round(gain, 4), "images": round(gain * images)})
            if gain <= 0:
                context.warn(f"the teacher did not help: {accuracy:.2%} of {images} validation images are right with "
                             f"it, {without:.2%} without (a difference of {round(-gain * images)} images)")
        return student

    def cache_temperature(self, settings: TrainingSettings) -> float | None:
        """Return the temperature at which alone cached outputs will be used, None where more of them is asked for.

        Only plain soft targets, of images that are not mixed, ask for nothing but the softened distribution.
        """
        plain = self.method == "kd" and not (settings.mixup or settings.cutmix)
        return self.chosen().temperature if plain else None

    def _check_cache(self, card: DatasetCard) -> None:
        """Raise UserError where the teacher's outputs would fill this machine's memory."""
        needed = self.cache_views * card.counts.get("train", 0) * card.num_classes * 2
        if needed > (most := memory_bytes() // 2):
            raise UserError(f"distill.cache_views {self.cache_views}: the outputs would take {needed / 1e9:,.1f} GB, "
                            f"expected at most {most / 1e9:,.1f} GB, half of this machine's memory; set fewer views, or 0")

    def _check_features(self, sketch: Sketch) -> None:
        """Raise UserError for settings that a method by features cannot take."""
        for key, needed in (("cache_views", 0), ("teachers", 1), ("temperature", None)):
            if getattr(self, key) != needed:
                raise UserError(f"distill.{key}: the method {self.method} compares the features of one teacher on every "
                                "batch, without a temperature; leave the setting out, or set method kd")
        if self.train.size_schedule:
            raise UserError(f"distill.train.size_schedule: the method {self.method} pairs layers by height and width, "
                            "which must not change; leave the schedule out, or set method kd")
        if sketch.teacher is None:
            return  # what is wrong with the teacher is told already
        with torch.random.fork_rng(devices=[]):  # with values: one's own networks have them, and cannot mix with others
            teacher = make(sketch.teacher[0], num_classes=sketch.card.num_classes, **sketch.teacher[1])
        if isinstance(teacher, RunOnnxFile):
            raise UserError(f"distill.method {self.method}: the teacher {sketch.teacher[0]} is run by ONNX Runtime, which "
                            "gives logits alone; set method kd")
        architecture, _, _ = self._student(sketch.card, sketch.seed)
        try:
            pairs_of(architecture, teacher.eval(), torch.zeros(1, *sketch.card.input_shape))
        except UserError as error:
            raise UserError(f"distill.method {self.method}: {error}") from error

    def _by_features(self, architecture: Architecture, student: fx.GraphModule, teacher: nn.Module,
                     dtype: torch.dtype | None, context: Context) -> tuple[nn.Module, Loss]:
        """Return the student with its features, and the loss function that compares them with the teacher's."""
        learner, loss, pairs = learner_by_features(
            self.method, student, architecture, teacher, alpha=self._weights()["alpha"],
            label_smoothing=self.train.label_smoothing, seed=context.seed, device=context.device, dtype=dtype)
        context.note("compared_features", {pair.layer: pair.place.module for pair in pairs})
        return learner, loss

    def _weights(self) -> dict[str, float]:
        """Return temperature and alpha as they count."""
        if self.by_features:
            return {"alpha": FEATURE_ALPHA if self.alpha is None else self.alpha}
        return {"temperature": self.chosen().temperature, "alpha": self.chosen().alpha}

    def _student(self, card: DatasetCard, seed: int) -> tuple[Architecture, fx.GraphModule, list[str]]:
        """Return the untrained student as a graph, and remarks on it; fresh weights depend on the seed alone."""
        with seeded(seed, "student"):
            module = make(self.model, num_classes=card.num_classes,
                          **fitted_options(self.model, self.options, card.input_shape))
        architecture, student = as_student(module, card, self.model)
        return architecture, student.train(), remarks(module)
