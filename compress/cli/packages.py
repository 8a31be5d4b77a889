"""Verbs that write files for other people: `package`, `export_data`, `bundle`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NewFolder = Annotated[Path, typer.Option("--out", help="folder to write; it must not exist")]


def package(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run, such as runs/my_run")],
            out: NewFolder,
            layout: Annotated[str | None, typer.Option(help="toolkit, challenge or hub; default: the recipe's")] = None,
            username: Annotated[str | None, typer.Option(help="of the challenge layout; default: the recipe's")] = None,
            teamname: Annotated[str | None, typer.Option(help="of the challenge layout; default: the recipe's")] = None,
            license_name: Annotated[str | None, typer.Option("--license", help="hub layout: apache-2.0, ...")] = None,
            base_model: Annotated[str | None, typer.Option("--base_model", help="of the hub layout: the Hub's name of the "
                                                           "model that this one was made from")] = None) -> None:
    """Package a run's last model again. Choose another folder, another layout or both."""
    from compress.pipeline.repackage import package_run

    given = {"layout": layout, "username": username, "teamname": teamname, "license": license_name,
             "base_model": base_model}
    package_run(run_folder, out, {key: value for key, value in given.items() if value is not None})
    typer.echo(f"submission: {out}")


def export_data(name: Annotated[str, typer.Argument(help="name of a data set, see loaders/")], out: NewFolder,
                root: Annotated[Path | None, typer.Option(help="folder that holds the data set's files")] = None,
                download: Annotated[bool, typer.Option("--download", help="download a missing data set")] = False,
                test_fraction: Annotated[float, typer.Option("--test_fraction", help="share of the images that is the test "
                                                             "split, where the data have none")] = 0.2,
                image_root: Annotated[Path | None, typer.Option("--image_root", help="folder that a CSV's paths are "
                                                                "relative to")] = None,
                columns: Annotated[str, typer.Option(help="a table's columns, such as file,species")] = "") -> None:
    """Write a test split as an image folder. The evaluator reads it.

    Original image files are copied. Images that have none are written as PNG.
    """
    from compress.training.trackers import Tracker, terminal
    from loaders.splits import write_image_folder
    from loaders.catalog import load
    from loaders.request import Request
    from metadata.errors import UserError

    if out.exists():
        raise UserError(f"--out {out}: already there; nothing was written")
    tracker = Tracker(terminal())
    with tracker.progress("reading images") as advance:
        splits = load(Request(name=name, root=root, download=download, on_progress=advance, test_fraction=test_fraction,
                              image_root=image_root, columns=[part.strip() for part in columns.split(",") if part.strip()]))
        test = splits.open_test()
    for text in splits.warnings:
        tracker.warn(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_image_folder(test, splits.card.class_names, out)
    typer.echo(f"{len(test)} images in {splits.card.num_classes} classes: {out}")


def bundle(out: Annotated[Path, typer.Option("--out", help="file to write, such as model_loader.py")]) -> None:
    """Write the evaluator as one file. The file needs nothing else of the toolkit."""
    from compress.packaging.bundle import write_bundle

    write_bundle(out)
    typer.echo(f"evaluator: {out}")
