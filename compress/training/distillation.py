"""The loss functions of a training: on labels alone, or with a teacher by one of several methods.

A method is one function of the student's and the teacher's logits, the labels and a temperature; `METHODS` names it, with
the temperature and the weight of its paper's experiments. Each is a mean over the batch, scaled by the temperature squared
where its paper does so, which keeps its gradients at the size of the labels' part. Methods that compare features instead of
logits are in `compress/training/features.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from compress.settings import Config
from compress.training.features import FEATURE_METHODS
from compress.training.mixup import Batch, Loss, of_both_labels
from compress.training.targets import Targets
from metadata.errors import UserError

MethodName = Literal["kd", "standardized", "dkd", "dist", "attention", "features"]
EPSILON = 1e-7  # of a standard deviation that may be 0


# ------------------------------------------------------------------------------------------------------- the methods


def kd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) of the softened distributions.

    The divergence is a sum over classes; torch's default reduction would be C times weaker.
    Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Args:
        student, teacher: (N, C) logits.
        labels: (N,) int64, unused.
        temperature: T > 0.
    """
    return temperature**2 * F.kl_div(F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1),
                                     reduction="batchmean", log_target=True)


def standardized_kd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return ten times `kd` of logits with mean 0 and standard deviation 1: the student need not copy their range.

    Ten times, so that alpha 0.9 gives the weights of the paper's experiments: 9, and 0.1 for the labels.
    Source: Sun et al. 2024, "Logit Standardization in Knowledge Distillation", algorithm 1.

    Args:
        student, teacher: (N, C) logits.
        labels: (N,) int64, unused.
        temperature: T > 0, in standard deviations.
    """
    def standard(logits: Tensor) -> Tensor:
        return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + EPSILON)
    return 10 * kd(standard(student), standard(teacher), labels, temperature)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return T^2 (TCKD + 8 NCKD): what the teacher says of the label against the rest, and how it ranks the rest.

    In `kd`, the second part is weighted by the teacher's doubt, and fades where the teacher is sure.
    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", eq. 7, without the warm-up of its experiments.

    Args:
        student, teacher: (N, C) logits of three classes or more.
        labels: (N,) int64.
        temperature: T > 0.
    """
    is_label = F.one_hot(labels, student.shape[1]).bool()

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithms of (label, rest), (N, 2), and of the distribution within the rest, (N, C - 1)."""
        every = F.log_softmax(logits / temperature, 1)
        rest = every[~is_label].view(len(every), -1)
        all_of_rest = rest.logsumexp(1, keepdim=True)
        return torch.cat([every[is_label][:, None], all_of_rest], 1), rest - all_of_rest

    parts = [F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
             for ours, theirs in zip(split(student), split(teacher), strict=True)]
    return temperature**2 * (parts[0] + 8 * parts[1])


def dist(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return 2 T^2 (d of each image's classes + d of each class's images), where d is one less Pearson's correlation.

    Relations are matched instead of numbers, which a small student of a strong teacher can do.
    Source: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", eq. 9 to 11, with the factors 2 and 2.

    Args:
        student, teacher: (N, C) logits.
        labels: (N,) int64, unused.
        temperature: T > 0.
    """
    ours, theirs = ((logits / temperature).softmax(1) for logits in (student, teacher))

    def distance(axis: int) -> Tensor:
        one, other = (part - part.mean(axis, keepdim=True) for part in (ours, theirs))
        return 1 - F.cosine_similarity(one, other, dim=axis).mean()
    return 2 * temperature**2 * (distance(1) + distance(0))


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of distillation, with the temperature and the weight of the teacher's part in its paper."""

    loss: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    temperature: float
    alpha: float


METHODS: dict[MethodName, Method] = {
    "kd": Method(loss=kd, temperature=4.0, alpha=0.9),
    "standardized": Method(loss=standardized_kd, temperature=2.0, alpha=0.9),
    "dkd": Method(loss=dkd, temperature=4.0, alpha=0.5), "dist": Method(loss=dist, temperature=4.0, alpha=0.5)}
assert {*METHODS, *FEATURE_METHODS} == {*get_args(MethodName)}


class TeacherLoss(Config):
    """Settings of a training with a teacher."""

    method: MethodName = Field("kd", description="of distillation: kd (soft targets), standardized (of standardized "
                               "logits), dkd (decoupled), dist (correlations); in distill alone: attention (where layers "
                               "look), features (projected)")
    temperature: float | None = Field(None, gt=0, description="softens both distributions; none given: the method's, "
                                      "2 for standardized, 4 for the others; features have none")
    alpha: float | None = Field(None, ge=0, le=1, description="weight of the teacher's loss, the labels' loss has the "
                                "rest; none given: the method's, 0.9 for kd and standardized, 0.5 for the others")

    @property
    def by_features(self) -> bool:
        """Whether the method compares features instead of logits."""
        return self.method in FEATURE_METHODS

    def check_classes(self, stage: str, classes: int) -> None:
        """Raise UserError for data of too few classes for the method."""
        if self.method == "dkd" and classes < 3:
            raise UserError(f"{stage}.method dkd: it ranks the classes beside the label, of which two classes have one; "
                            "set method kd")

    def chosen(self) -> Method:
        """Return the method, one by logits, with this temperature and weight."""
        given = METHODS[self.method]
        return Method(loss=given.loss, alpha=given.alpha if self.alpha is None else self.alpha,
                      temperature=given.temperature if self.temperature is None else self.temperature)


# ---------------------------------------------------------------------------------------------------- loss functions


def distill(targets: Targets, method: Method, label_smoothing: float) -> Loss:
    """Return the loss function of a training with a teacher: alpha of the method's, the rest of the labels'."""
    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.images)
        soft = targets(batch)

        def both(labels: Tensor) -> Tensor:
            hard = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
            return method.alpha * method.loss(logits, soft, labels, method.temperature) + (1 - method.alpha) * hard
        return of_both_labels(batch, both), logits
    return loss


def cross_entropy(label_smoothing: float) -> Loss:
    """Return the loss function of a training on labels alone."""
    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(batch.images)
        return of_both_labels(batch, lambda labels: F.cross_entropy(
            logits, labels, label_smoothing=label_smoothing)), logits
    return loss
