"""The verb `search`: limits in, the best model out."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.cli.pipeline import Overrides, RecipeName, print_outcome


def search(recipe: RecipeName, overrides: Overrides = None,
           latency_ms: Annotated[float | None, typer.Option("--latency_ms", help="largest latency at batch 1, in "
                                                            "milliseconds on this machine")] = None,
           size_kb: Annotated[float | None, typer.Option("--size_kb", help="largest weights file, in units of 1000 "
                                                         "bytes")] = None,
           min_accuracy: Annotated[float | None, typer.Option("--min_accuracy", help="smallest validation accuracy, a "
                                                              "fraction")] = None,
           minutes: Annotated[float | None, typer.Option("--minutes", help="of the search, over all its sittings; the "
                                                         "default is the stage's")] = None,
           backend: Annotated[str | None, typer.Option("--backend", help="auto, torch, onnxruntime or openvino")] = None,
           threads: Annotated[int | None, typer.Option("--threads", help="of one inference")] = None,
           ray: Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help="Ray cluster that trains candidates: "
                                                   "HOST:PORT, auto or local")] = None,
           update: Annotated[bool, typer.Option("--update", help="make finished stages again that changed settings, "
                                                "data, files or code affect")] = False) -> None:
    """Find the most accurate model that keeps limits of time and bytes. The same command continues a killed search."""
    from compress.pipeline.run import run_pipeline
    from compress.pipeline.search_recipe import search_config
    from compress.training.trackers import terminal

    console = terminal()
    settings = {"latency_ms": latency_ms, "size_kb": size_kb, "min_accuracy": min_accuracy, "minutes": minutes,
                "backend": backend, "threads": threads, "ray": ray}
    config = search_config(recipe, overrides or [], settings)
    print_outcome(console, run_pipeline(config, console, update))
