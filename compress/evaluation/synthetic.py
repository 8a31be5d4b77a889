"""Classification problems drawn from a seed: Gaussian prototypes (the data of the 2.5M-parameter task) and mixtures.

The data are rows of features, not images, so no recipe can name them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PUBLIC_SEED = 2025  # the public evaluator's data
SPLIT_SEEDS = (1337, 2026, 4242)  # train, validation, test of the public evaluator
LENGTH, NOISE = 2.5, 0.4  # of a prototype; standard deviation of every feature around it
PER_CLASS = (16, 4, 8)  # rows of each class in train, validation, test

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
                      per_class: tuple[int, int, int] = PER_CLASS) -> Problem:
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
    prototypes = prototypes / prototypes.norm(dim=1, keepdim=True) * LENGTH

    def split(seed: int, rows: int) -> Rows:
        generator = seeded_generator(seed + shift)
        inputs = torch.cat([prototype + NOISE * torch.randn(rows, input_dim, generator=generator)
                            for prototype in prototypes])
        return shuffled(inputs, torch.arange(num_classes).repeat_interleave(rows), generator)

    train, validation, test = (split(seed, rows) for seed, rows in zip(SPLIT_SEEDS, per_class, strict=True))
    return Problem(train, validation, test)


def secret_problem(salt: bytes, draw: int, num_classes: int = 128, input_dim: int = 384,
                   per_class: tuple[int, int, int] = PER_CLASS) -> Problem:
    """Return a draw of the same task that nobody without the salt can rebuild.

    torch's generator on the CPU is seeded with 32 bits only, which a search finds. Here the prototypes and each split have
    a Philox generator of their own, whose key is 128 bits of SHA-256 over the salt, the number of the draw and the name of
    the part. A solution that worked out the generator of its training rows would still have to invert SHA-256 for that of
    the test rows.

    Args:
        salt: 16 random bytes.
        draw: its number; each number gives an independent draw.
        num_classes: C.
        input_dim: D.
        per_class: rows of each class in train, validation and test.
    """
    def generator(part: str) -> np.random.Generator:
        digest = hashlib.sha256(b"%s/%d/%s" % (salt, draw, part.encode())).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))

    prototypes = generator("prototypes").standard_normal((num_classes, input_dim))
    prototypes *= LENGTH / np.linalg.norm(prototypes, axis=1, keepdims=True)

    def split(part: str, rows: int) -> Rows:
        source = generator(part)
        labels = np.repeat(np.arange(num_classes), rows)
        inputs = prototypes[labels] + NOISE * source.standard_normal((len(labels), input_dim))
        order = source.permutation(len(labels))
        return torch.from_numpy(inputs[order].astype(np.float32)), torch.from_numpy(labels[order])

    train, validation, test = (split(part, rows) for part, rows in zip(("train", "validation", "test"), per_class,
                                                                       strict=True))
    return Problem(train, validation, test)


def data_sha256(problem: Problem) -> str:
    """Return the SHA-256 over inputs and labels of all splits, which tells whether a repeated draw is the same."""
    digest = hashlib.sha256()
    for inputs, labels in (problem.train, problem.validation, problem.test):
        digest.update(inputs.numpy().tobytes())
        digest.update(labels.numpy().tobytes())
    return digest.hexdigest()


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
