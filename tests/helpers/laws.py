"""Planted scaling laws, and the tables of runs that follow them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from compress.studies.scaling.fitting import Observations
from compress.studies.scaling.forms import Array, Form, joint_forms

LN10 = math.log(10)
Law = Callable[[Array, Array], Array]


def additive(e: float = 0.5, a: float = 8.0, b: float = 20.0, alpha: float = 0.35, beta: float = 0.45) -> Law:
    return lambda n, d: e + a * n**-alpha + b * d**-beta


def bounded(e: float = 0.3, a: float = 25.0, b: float = 30.0, alpha: float = 0.35, beta: float = 0.45) -> Law:
    def law(n: Array, d: Array) -> Array:
        h = a * n**-alpha + b * d**-beta
        return np.asarray(e + (LN10 - e) * h / (1 + h))
    return law


def kaplan(nc: float = 3e4, dc: float = 2e3, alpha_n: float = 0.3, alpha_d: float = 0.4) -> Law:
    return lambda n, d: ((nc / n)**(alpha_n / alpha_d) + dc / d)**alpha_d


def overfitting(e: float = 0.3, a: float = 8.0, b: float = 2.0, alpha: float = 0.35, beta: float = 0.6, gamma: float = 0.25
                ) -> Law:
    return lambda n, d: e + a * n**-alpha + b * n**gamma * d**-beta


def planted(law: Law, noise: float = 0.0, seed: int = 0, n_levels: int = 6, d_levels: int = 4, epochs: float = 1.0
            ) -> Observations:
    """A grid of two decades in N and D, with multiplicative log-normal noise."""
    n, d = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e4, 1e6, n_levels), np.geomspace(500, 5e4, d_levels)))
    noisy = np.log(law(n, d)) + noise * np.random.default_rng(seed).normal(size=len(n))
    return Observations(values={"N": n, "D": d, "C": n * d * epochs}, log_loss=noisy, runs=np.ones(len(n)))


def forms(data: Observations, ceiling: float | None = LN10) -> dict[str, Form]:
    return {form.name: form for form in joint_forms(data.values, data.log_loss, ceiling)}


def foreign(path: Path, points: list[tuple[float, float, float]], header: str = "N,D,loss") -> Path:
    path.write_text("\n".join([header, *(",".join(f"{value:.10g}" for value in point) for point in points)]) + "\n")
    return path


def grid(n_levels: int = 5, d_levels: int = 4) -> list[tuple[float, float, float]]:
    return [(float(n), float(d), 1.7 + 400 * n**-0.34 + 410 * d**-0.28)
            for n in np.geomspace(1e7, 1e10, n_levels) for d in np.geomspace(1e8, 1e11, d_levels)]
