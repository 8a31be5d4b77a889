"""Verbs that fit scaling laws to recorded runs: `scaling fit`, `scaling predict`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Target(StrEnum):
    """The quantity that is fitted."""

    loss = "loss"
    error = "error"


class FormName(StrEnum):
    """The joint forms."""

    additive = "additive"
    bounded = "bounded"
    kaplan = "kaplan"
    overfitting = "overfitting"


TargetOption = Annotated[Target, typer.Option("--target", help="quantity to fit; error is 1 - accuracy, a fraction")]
Classes = Annotated[int | None, typer.Option("--classes", min=2, help="number of classes K; the bounded form is limited by "
                                                                      "ln K, or by 1 - 1/K")]
NColumn = Annotated[str | None, typer.Option("--n_column", help="column of N, if its name is unusual")]
DColumn = Annotated[str | None, typer.Option("--d_column", help="column of D, if its name is unusual")]
DFromCompute = Annotated[bool, typer.Option("--d_from_compute", help="compute D = C / (6 N) from the column of training "
                                                                     "FLOP")]
LossColumn = Annotated[str | None, typer.Option(
    "--loss_column", help="column of the loss; with --target error: of the error, or of the accuracy if its name has acc")]
AccuracyColumn = Annotated[str | None, typer.Option(
    "--accuracy_column", help="with --target error: column of the accuracy, whatever its name")]
FormOption = Annotated[FormName | None, typer.Option(
    "--form", help="joint form to use; default: the form with the lowest held-out error")]
DataSet = Annotated[str | None, typer.Option("--dataset", help="use the rows of this data set, if the file has several")]
Epochs = Annotated[float | None, typer.Option("--num_epochs", help="epochs in C = N * D * epochs; default: the median")]


def fit(data: Annotated[Path, typer.Argument(metavar="CSV", help="runs with columns for N, D and the loss, such as "
                                                                 "results/final_data.csv")],
        target: TargetOption = Target.loss, classes: Classes = None,
        output: Annotated[Path | None, typer.Option("--output", help="folder to write; default: `fit` or `fit_error` "
                                                                     "beside the CSV")] = None,
        n_column: NColumn = None, d_column: DColumn = None, loss_column: LossColumn = None,
        accuracy_column: AccuracyColumn = None, dataset: DataSet = None, form: FormOption = None, num_epochs: Epochs = None,
        replicates: Annotated[int, typer.Option("--bootstrap", min=50, help="number of bootstrap replicates")] = 1000,
        seed: Annotated[int, typer.Option("--seed", min=0, help="seed of the bootstrap")] = 0,
        d_from_compute: DFromCompute = False,
        no_plots: Annotated[bool, typer.Option("--no_plots", help="write tables only")] = False) -> None:
    """Fit scaling laws to runs. Rank the forms by their error on held-out points, and plot them."""
    from compress.training.trackers import terminal
    from compress.studies.scaling import summary
    from compress.studies.scaling.analysis import analyse
    from compress.studies.scaling.runs import read_runs

    console = terminal()
    runs = read_runs(data, target.value, n_column, d_column, loss_column, dataset, accuracy_column,
                     d_from_compute)
    analysis = analyse(runs, classes, form.value if form else None, _positive("--num_epochs", num_epochs), replicates, seed)
    summary.print_summary(console, analysis)
    folder = output or data.parent / ("fit" if target is Target.loss else f"fit_{target.value}")
    plots = summary.write_all(analysis, folder, not no_plots)
    console.print(f"written: {folder / 'summary.md'}, fit.json"
                  f"{f' and {len(plots)} plots (PNG and SVG)' if plots else ''}", highlight=False,
                  soft_wrap=True)


def predict(
        dataset_size: Annotated[float, typer.Option("--dataset_size", help="number of training images D")],
        width: Annotated[int | None, typer.Option("--width", min=1, help="width of the CNN")] = None,
        depth: Annotated[int | None, typer.Option("--depth", min=1, help="depth of the CNN; default: the runs', or 2")
                         ] = None,
        parameters: Annotated[float | None, typer.Option("--parameters", help="number of parameters N, instead of --width")
                              ] = None,
        num_epochs: Epochs = None,
        data: Annotated[Path, typer.Option("--data", help="runs to fit")] = Path("results/final_data.csv"),
        target: TargetOption = Target.loss, classes: Classes = None, n_column: NColumn = None, d_column: DColumn = None,
        loss_column: LossColumn = None, accuracy_column: AccuracyColumn = None, dataset: DataSet = None,
        form: FormOption = None, d_from_compute: DFromCompute = False) -> None:
    """Predict the loss of a new configuration. Give a 95 % interval with it."""
    from compress.training.trackers import terminal
    from compress.studies.scaling.analysis import fit_for_prediction
    from compress.studies.scaling.plans import make_point
    from compress.studies.scaling.summary import print_prediction
    from compress.studies.scaling.runs import read_runs
    from metadata.errors import UserError

    if (width is None) == (parameters is None):
        raise UserError("expected either --width (with --depth) or --parameters N")
    d = _positive("--dataset_size", dataset_size)
    epochs = _positive("--num_epochs", num_epochs)
    runs = read_runs(data, target.value, n_column, d_column, loss_column, dataset, accuracy_column,
                     d_from_compute)
    depth, network = depth or runs.depth or 2, ""
    if width is not None:
        make_point("scaling predict", width=width, depth=depth)  # refuses sizes that no study can have
        n: float | None = float(_parameters_of(width, depth, classes or runs.classes, runs.dataset))
        network = f"width {width}, depth {depth}: "
    else:
        n = _positive("--parameters", parameters)
    assert n is not None and d is not None
    chosen, forms, ranking = fit_for_prediction(runs, classes, form.value if form else None)
    print_prediction(terminal(), runs, chosen, forms, ranking, n, d, epochs, network)


def _positive(flag: str, value: float | None) -> float | None:
    """Return the value of a flag; raise UserError unless it is positive and of a plausible size."""
    from compress.studies.scaling.runs import LARGEST, SMALLEST
    from metadata.errors import UserError

    if value is not None and not 0 < value < float("inf"):
        raise UserError(f"{flag} {value:g}: expected a positive number")
    if value is not None and not SMALLEST <= value <= LARGEST:
        raise UserError(f"{flag} {value:g}: expected a number from {SMALLEST:g} to {LARGEST:g}")
    return value


def _parameters_of(width: int, depth: int, classes: int | None, dataset: str | None) -> int:
    """Return the parameters of the study's CNN. Its first layer depends on whether the images are grey."""
    from architectures.zoo import make, without_values
    from compress.training.assessment import learned_parameters
    from metadata.errors import UserError
    from metadata.records import dataset_cards

    if classes is None:
        raise UserError("--width: the number of classes decides the parameters of the last layer; give it with --classes")
    grey = dataset_cards().get(dataset or "", {}).get("preprocessing", {}).get("mode") == "L"
    with without_values():  # nothing is allocated
        return learned_parameters(make("scaling_cnn", num_classes=classes, width=width, depth=depth,
                                       in_channels=1 if grey else 3))
