"""How likely a count of right answers is for the best rule that there can be, on a draw of the 2.5M-parameter task."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from compress.evaluation.synthetic import LENGTH, NOISE, Problem

IMPLAUSIBLE = 1e-4  # a smaller probability is flagged


def log_bessel(order: float, argument: Tensor) -> Tensor:
    """Return log I_order(argument) for an order of at least 10, to six digits.

    Source: DLMF 10.41.3, the uniform expansion for large orders, with its first two corrections.
    """
    z = argument / order
    root = (1 + z * z).sqrt()
    t = 1 / root
    first = (3 * t - 5 * t**3) / 24
    second = (81 * t**2 - 462 * t**4 + 385 * t**6) / 1152
    return (order * (root + torch.log(z / (1 + root))) - 0.5 * torch.log(2 * torch.pi * order * root)
            + torch.log1p(first / order + second / order**2))


def bayes_probabilities(problem: Problem) -> Tensor:
    """Return (N, C) float64: the probability of each class for each test row, given the training and validation rows.

    This is the Bayes rule of the task. A class's prototype m lies anywhere on the sphere of radius LENGTH, and the rows of
    the class are m plus Gaussian noise of standard deviation NOISE. Given the sum s of the class's rows, m / LENGTH has the
    density of von Mises and Fisher with the parameter k(s) = LENGTH |s| / NOISE^2 around s. A new row x of the class then
    has the density C(k(s)) / C(k(s + x)) times a factor that all classes share, where C(k) = k^v / I_v(k) normalises that
    density up to a constant, and v = D / 2 - 1. All classes are equally likely.

    Source: Mardia and Jupp 2000, "Directional Statistics", 9.3.2 (the density) and 12.4 (the conjugate prior).
    """
    inputs = torch.cat([problem.train[0], problem.validation[0]]).double()
    labels = torch.cat([problem.train[1], problem.validation[1]])
    sums = torch.zeros(problem.num_classes, problem.input_dim, dtype=torch.float64).index_add_(0, labels, inputs)
    rows, order = problem.test[0].double(), problem.input_dim / 2 - 1

    def log_constant(squared_length: Tensor) -> Tensor:
        k = LENGTH / NOISE**2 * squared_length.clamp(min=1e-12).sqrt()
        return order * k.log() - log_bessel(order, k)

    squares = (sums * sums).sum(1)
    joined = squares + 2 * rows @ sums.T + (rows * rows).sum(1, keepdim=True)
    return (log_constant(squares) - log_constant(joined)).softmax(1)


def count_distribution(probabilities: Iterable[float]) -> np.ndarray:
    """Return the distribution of the number of successes, from 0 on: the exact convolution (Poisson binomial)."""
    parts = [np.ones(1), *(np.array([1 - p, p]) for p in probabilities)]
    while len(parts) > 1:  # in pairs: the long ones are few
        parts = [*map(np.convolve, parts[::2], parts[1::2]), *parts[len(parts) // 2 * 2:]]
    return parts[0]


def bayes_distribution(problem: Problem) -> np.ndarray:
    """Return the distribution of the number of test rows that the Bayes rule gets right, from 0 on.

    A rule that knows only the training and validation rows, and is asked for one test row, is right with at most the
    largest of that row's probabilities. So no rule's number of right answers is larger than a draw from this distribution,
    if the rows are independent. They are not quite: test rows of a class share what the rule got wrong about the prototype.
    `benchmarks/pareto_study.py` measures how the Bayes rule's true counts are distributed, and docs/pareto_task.md says
    what came out.
    """
    return count_distribution(bayes_probabilities(problem).max(1).values.tolist())


def at_least(distribution: np.ndarray, correct: int) -> float:
    """Return the probability of at least so many right answers."""
    return float(min(1.0, distribution[correct:].sum()))
