"""Loggers that take the metrics of an epoch beside the CSV: curves as PNG, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import netrc
import os
import time
from pathlib import Path
from typing import Any, Protocol

from metadata.errors import UserError, first_line
from metadata.formats import read_csv, write_figure

CURVE_SECONDS = 60.0  # between drawings of the curves while a training runs


class Logger(Protocol):
    """Takes the metrics of one training, epoch by epoch."""

    def start(self, done_epochs: int) -> None:
        """Begin or continue after a number of epochs; forget what was logged of later epochs."""

    def log(self, epoch: int, metrics: dict[str, float]) -> None:
        """Take the metrics of an epoch, counted from 1."""

    def close(self) -> None:
        """Finish the log."""


def require(package: str, flag: str) -> None:
    """Raise UserError if a package that a flag needs is missing."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{flag}: the package {package} is not installed; pip install {package}, or leave the flag out")


class Curves:
    """`curves.png` beside `metrics.csv`: loss, accuracy and learning rate over the epochs."""

    def __init__(self, folder: Path, title: str) -> None:
        self.folder, self.title = folder, title
        self.drawn = time.monotonic()

    def start(self, done_epochs: int) -> None:
        """Do nothing: every drawing is made from the CSV."""

    def log(self, epoch: int, metrics: dict[str, float]) -> None:
        if time.monotonic() - self.drawn > CURVE_SECONDS:
            self.close()

    def close(self) -> None:
        rows = read_csv(self.folder / "metrics.csv")
        if rows:
            draw_curves(self.folder / "curves.png", self.title, rows)
        self.drawn = time.monotonic()


class TensorBoard:
    """An event file in `tensorboard/` of the folder."""

    def __init__(self, folder: Path) -> None:
        require("tensorboard", "use_tensorboard")
        self.folder = folder / "tensorboard"

    def start(self, done_epochs: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(self.folder), purge_step=done_epochs + 1)

    def log(self, epoch: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases: offline, in `wandb/` of the folder, unless the user is logged in. It never asks."""

    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        require("wandb", "use_wandb")
        self.folder, self.project, self.config = folder, project, config

    def start(self, done_epochs: int) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb would report its own crashes to its makers
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        try:
            self.run = wandb.init(project=self.project, dir=str(self.folder), mode=mode, config=self.config,
                                  settings=wandb.Settings(console="off", x_disable_stats=True))
        except wandb.errors.Error as error:
            raise UserError(f"use_wandb: Weights & Biases did not start: {first_line(error)}") from error

    def log(self, epoch: int, metrics: dict[str, float]) -> None:
        self.run.log({"epoch": epoch, **metrics})

    def close(self) -> None:
        self.run.finish()


def logged_in() -> bool:
    """Return whether there is a key for Weights & Biases, in the environment or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def draw_curves(path: Path, title: str, rows: list[dict[str, str]],
                names: tuple[str, str] = ("train", "validation")) -> None:
    """Draw loss, accuracy and learning rate of one training over its epochs.

    Args:
        path: the PNG to write.
        title: what was trained.
        rows: rows of metrics.csv.
        names: the splits to draw, as in `<name>_loss` and `<name>_accuracy`.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, (loss, accuracy, lr) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    epochs = [int(row["epoch"]) for row in rows]
    marker = "." if len(rows) < 40 else None
    for index, name in enumerate(names):
        if rows[0].get(f"{name}_loss"):
            loss.plot(epochs, [float(row[f"{name}_loss"]) for row in rows], marker=marker, color=f"C{index}", label=name)
            accuracy.plot(epochs, [100 * float(row[f"{name}_accuracy"]) for row in rows], marker=marker,
                          color=f"C{index}", label=name)
    lr.plot(epochs, [float(row["lr"]) for row in rows], marker=marker, color="C2")
    losses = [float(line) for axis_line in loss.lines for line in axis_line.get_ydata()]
    loss.set(title="loss", yscale="log" if max(losses) > 10 * min(losses) > 0 else "linear")
    accuracy.set(title="accuracy (%)")
    lr.set(title="learning rate at the epoch's end")
    for axis in (loss, accuracy, lr):
        axis.set_xlabel("epoch")
        axis.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    loss.legend()
    accuracy.legend()
    figure.suptitle(title)
    write_figure(path, figure)
