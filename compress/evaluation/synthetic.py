"""Classification problems drawn from a seed: Gaussian prototypes (the data of the 2.5M-parameter task) and mixtures.

The data are rows of features, not images, so no recipe can name them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PUBLIC_SEED = 2025  # the public evaluator's data
SPLIT_SEEDS = (1337, 2026, 4242)  # train, validation, test of the public evaluator

Rows = tuple[Tensor, Tensor]  # (N, D) float32 inputs and (N,) int64 labels


@dataclass(frozen=True)
class Problem:
    """Three splits of rows, each (inputs (N, D) float32, labels (N,) int64)."""

    train: Rows
    validation: Rows
    test: Rows

    @property
    def num_classes(self) -> int:
        """The number of classes. Every class is in the training split."""
        return int(self.train[1].max()) + 1

    @property
    def input_dim(self) -> int:
        """D, the number of features."""
        return self.train[0].shape[1]


def prototype_problem(data_seed: int = PUBLIC_SEED, num_classes: int = 128, input_dim: int = 384,
                      per_class: tuple[int, int, int] = (16, 4, 8)) -> Problem:
    """Return the public task: each class is a prototype of length 2.5 with spherical noise of standard deviation 0.4.

    The order of the draws is the public evaluator's, so that the rows are the same to the bit. One generator serves a
    whole split: the rows of class 0 first, and the permutation of the rows last.

    Args:
        data_seed: 2025 gives the public data; another shifts the seeds of prototypes and splits by the difference.
        num_classes: C.
        input_dim: D.
        per_class: rows of each class in train, validation and test.
    """
    shift = data_seed - PUBLIC_SEED
    prototypes = torch.randn(num_classes, input_dim, generator=seeded_generator(data_seed))
    prototypes = prototypes / prototypes.norm(dim=1, keepdim=True) * 2.5

    def split(seed: int, rows: int) -> Rows:
        generator = seeded_generator(seed + shift)
        inputs = torch.cat([prototype + 0.4 * torch.randn(rows, input_dim, generator=generator)
                            for prototype in prototypes])
        return shuffled(inputs, torch.arange(num_classes).repeat_interleave(rows), generator)

    train, validation, test = (split(seed, rows) for seed, rows in zip(SPLIT_SEEDS, per_class, strict=True))
    return Problem(train, validation, test)


def mixture_problem(seed: int, num_classes: int = 10, input_dim: int = 16, clusters: int = 8,
                    per_class: tuple[int, int, int] = (90, 30, 100), noise: float = 0.6) -> Problem:
    """Return a problem on which every linear rule fails: each class is several Gaussian clusters around the same mean.

    A class's cluster centres are standard normal and then centred, so that all classes have mean zero and the nearest
    mean is no better than guessing.

    Args:
        seed: of the centres and rows; each split has its own generator.
        num_classes: C.
        input_dim: D.
        clusters: the number of clusters of each class, equally likely.
        per_class: rows of each class in train, validation and test.
        noise: standard deviation of every feature within a cluster; that of the centres is about 1.
    """
    centres = torch.randn(num_classes, clusters, input_dim, generator=seeded_generator(4 * seed))
    centres = centres - centres.mean(dim=1, keepdim=True)

    def split(index: int, rows: int) -> Rows:
        generator = seeded_generator(4 * seed + index)
        labels = torch.arange(num_classes).repeat_interleave(rows)
        chosen = torch.randint(clusters, (len(labels),), generator=generator)
        inputs = centres[labels, chosen] + noise * torch.randn(len(labels), input_dim, generator=generator)
        return shuffled(inputs, labels, generator)

    train, validation, test = (split(index, rows) for index, rows in enumerate(per_class, start=1))
    return Problem(train, validation, test)


def seeded_generator(seed: int) -> torch.Generator:
    """Return a new generator, so that the global one stays as it is."""
    return torch.Generator().manual_seed(seed)


def shuffled(inputs: Tensor, labels: Tensor, generator: torch.Generator) -> Rows:
    """Return rows and labels in one random order."""
    order = torch.randperm(len(labels), generator=generator)
    return inputs[order], labels[order]
