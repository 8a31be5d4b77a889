"""Losses on logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float,
                      label_smoothing: float = 0.0) -> Tensor:
    """alpha T^2 KL(teacher || student) at temperature T, plus (1 - alpha) cross-entropy with the labels.

    The divergence is a mean over the batch of a sum over classes; torch's default reduction would be C times weaker.
    T^2 keeps the gradients of the soft part at the size of the hard part's.
    Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Args:
        student: (N, C) logits.
        teacher: (N, C) logits.
        labels: (N,) int64.
        temperature: T > 0.
        alpha: weight of the soft part in [0, 1].
        label_smoothing: of the cross-entropy.
    """
    soft = F.kl_div(F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1),
                    reduction="batchmean", log_target=True) * temperature**2
    hard = F.cross_entropy(student, labels, label_smoothing=label_smoothing)
    return alpha * soft + (1 - alpha) * hard
