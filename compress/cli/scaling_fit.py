"""`scaling fit` and `scaling predict`: laws fitted to a CSV of runs, and what they say about a run that was not made."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Target(StrEnum):
    """What is fitted."""

    loss = "loss"
    error = "error"


class FormName(StrEnum):
    """The joint forms."""

    additive = "additive"
    bounded = "bounded"
    kaplan = "kaplan"
    overfitting = "overfitting"


TargetOption = Annotated[Target, typer.Option("--target", help="error is 1 - accuracy, a fraction")]
Classes = Annotated[int | None, typer.Option("--classes", min=2, help="K: the bounded form ends at ln K, or 1 - 1/K")]
NColumn = Annotated[str | None, typer.Option("--n_column", help="the column of N, if its name is unusual")]
DColumn = Annotated[str | None, typer.Option("--d_column", help="the column of D")]
LossColumn = Annotated[str | None, typer.Option("--loss_column", help="of the loss; with --target error, of the "
                                                                 "error, or of the accuracy if its name has acc")]
AccuracyColumn = Annotated[str | None, typer.Option("--accuracy_column", help="with --target error: of the accuracy, "
                                                                              "whatever its name")]
FormOption = Annotated[FormName | None, typer.Option("--form", help="the joint form to use; the best on held-out points "
                                                                    "unless given")]
DataSet = Annotated[str | None, typer.Option("--dataset", help="the rows of one data set, where the file has several")]
Epochs = Annotated[float | None, typer.Option("--num_epochs", help="C = N * D * epochs; the runs' median unless given")]


def fit(data: Annotated[Path, typer.Argument(metavar="CSV", help="runs with columns for N, D and the loss, such as "
                                                                 "results/final_data.csv")],
        target: TargetOption = Target.loss, classes: Classes = None,
        output: Annotated[Path | None, typer.Option("--output", help="the folder that is written; `fit` or `fit_error` "
                                                                     "beside the CSV")] = None,
        n_column: NColumn = None, d_column: DColumn = None, loss_column: LossColumn = None,
        accuracy_column: AccuracyColumn = None, dataset: DataSet = None, form: FormOption = None, num_epochs: Epochs = None,
        replicates: Annotated[int, typer.Option("--bootstrap", min=50, help="replicates")] = 1000,
        seed: Annotated[int, typer.Option("--seed", min=0, help="of the bootstrap")] = 0,
        no_plots: Annotated[bool, typer.Option("--no_plots", help="tables alone")] = False) -> None:
    """Fit scaling laws, rank them by what they did not see, and draw them."""
    from compress.pipeline import report
    from compress.studies.scaling import summary
    from compress.studies.scaling.analysis import analyse
    from compress.studies.scaling.table import read_runs

    console = report.terminal()
    runs = read_runs(data, target.value, n_column, d_column, loss_column, dataset, accuracy_column)
    analysis = analyse(runs, classes, form.value if form else None, _positive("--num_epochs", num_epochs), replicates, seed)
    summary.print_summary(console, analysis)
    folder = output or data.parent / ("fit" if target is Target.loss else f"fit_{target.value}")
    plots = summary.write_all(analysis, folder, not no_plots)
    console.print(f"written: {folder / 'summary.md'}, fit.json"
                  f"{f' and {len(plots)} plots (PNG and SVG)' if plots else ''}", highlight=False,
                  soft_wrap=True)


def predict(
        dataset_size: Annotated[float, typer.Option("--dataset_size", help="D: training examples")],
        width: Annotated[int | None, typer.Option("--width", min=1, help="of the study's CNN")] = None,
        depth: Annotated[int | None, typer.Option("--depth", min=1, help="of the study's CNN; that of the runs, or 2")
                         ] = None,
        parameters: Annotated[float | None, typer.Option("--parameters", help="N, instead of --width")] = None,
        num_epochs: Epochs = None,
        data: Annotated[Path, typer.Option("--data", help="the runs to fit")] = Path("results/final_data.csv"),
        target: TargetOption = Target.loss, classes: Classes = None, n_column: NColumn = None, d_column: DColumn = None,
        loss_column: LossColumn = None, accuracy_column: AccuracyColumn = None, dataset: DataSet = None,
        form: FormOption = None) -> None:
    """Predict the loss of a configuration that was not run, with its 95 % interval."""
    from compress.pipeline import report
    from compress.studies.scaling.analysis import fit_for_prediction
    from compress.studies.scaling.plans import make_point
    from compress.studies.scaling.summary import print_prediction
    from compress.studies.scaling.table import read_runs
    from metadata.errors import UserError

    if (width is None) == (parameters is None):
        raise UserError("expected either --width (with --depth) or --parameters N")
    d = _positive("--dataset_size", dataset_size)
    epochs = _positive("--num_epochs", num_epochs)
    runs = read_runs(data, target.value, n_column, d_column, loss_column, dataset, accuracy_column)
    depth, network = depth or runs.depth or 2, ""
    if width is not None:
        make_point("scaling predict", width=width, depth=depth)  # refuses what no study can have
        n: float | None = float(_parameters_of(width, depth, classes or runs.classes, runs.dataset))
        network = f"width {width}, depth {depth}: "
    else:
        n = _positive("--parameters", parameters)
    assert n is not None and d is not None
    chosen, forms, ranking = fit_for_prediction(runs, classes, form.value if form else None)
    print_prediction(report.terminal(), runs, chosen, forms, ranking, n, d, epochs, network)


def _positive(flag: str, value: float | None) -> float | None:
    from compress.studies.scaling.table import LARGEST, SMALLEST
    from metadata.errors import UserError

    if value is not None and not 0 < value < float("inf"):
        raise UserError(f"{flag} {value:g}: expected a positive number")
    if value is not None and not SMALLEST <= value <= LARGEST:
        raise UserError(f"{flag} {value:g}: expected a number from {SMALLEST:g} to {LARGEST:g}")
    return value


def _parameters_of(width: int, depth: int, classes: int | None, dataset: str | None) -> int:
    """Parameters of the study's CNN, whose first layer depends on whether the images are grey."""
    import torch

    from architectures.zoo import make
    from compress.training.assessment import learned_parameters
    from metadata.errors import UserError
    from metadata.records import dataset_cards

    if classes is None:
        raise UserError("--width: the number of classes decides the parameters of the last layer; give it with --classes")
    grey = dataset_cards().get(dataset or "", {}).get("preprocessing", {}).get("mode") == "L"
    with torch.device("meta"):  # nothing is allocated
        return learned_parameters(make("scaling_cnn", num_classes=classes, width=width, depth=depth,
                                       in_channels=1 if grey else 3))
