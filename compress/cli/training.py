"""Verbs that train one model: `train` and `mnist_challenge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# `train` reads its flags itself: every key of the training settings is one.
FREE_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def train(context: typer.Context) -> None:
    """Train a model. Takes --config NAME or FILE.yaml, and every setting as a flag (see `train --help`)."""
    if "--help" in context.args or not context.args:
        from compress.settings import recipe_names
        from compress.training.flags import TRAINING_RECIPES, help_lines

        typer.echo("Usage: python -m compress train --config NAME [--KEY VALUE]...\n\n"
                   "Train a model and measure it once on the test split, at the end. The same command continues an "
                   "interrupted training.\n"
                   f"NAME is a .yaml file or one of: {', '.join(recipe_names(TRAINING_RECIPES))}\n\n"
                   "Keys and their defaults:")
        for line in help_lines():
            typer.echo(line)
        return
    from compress.cli.tables import print_training
    from compress.training.trackers import terminal
    from compress.training.flags import resolve_training
    from compress.training.run import run_training

    console = terminal()
    config = resolve_training(context.args)
    summary = run_training(config, console)
    if summary:
        print_training(console, config.log_dir, summary)


def mnist_challenge(
        model: Annotated[str, typer.Option("--model", help="name of a model of the challenge, or all")] = "all",
        seeds: Annotated[str | None, typer.Option("--seeds", help="comma-separated seeds, such as 0,1,2; default: the "
                                                                  "seeds of the recorded study")] = None,
        data_root: Annotated[Path | None, typer.Option("--data_root", help="folder that holds MNIST")] = None,
        download: Annotated[bool, typer.Option("--download", help="let torchvision download MNIST")] = False,
        log_dir: Annotated[Path, typer.Option("--log_dir", help="folder to write")] = Path("runs/mnist_challenge"),
        threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: all")] = 0,
        epochs: Annotated[int, typer.Option("--epochs", min=1, help="epochs of each training; fewer for a trial")] = 15,
        verify: Annotated[bool, typer.Option("--verify", help="check the committed weights instead of training")] = False,
        ) -> None:
    """Train for the MNIST challenge. Its rules: at least 99.4 % in the last five of 15 epochs, below 8,000 weights.

    The weights are counted as parameters, biases included. Each of the five epochs must keep the bound.
    """
    from compress.training.trackers import terminal
    from compress.studies import mnist_challenge as challenge
    from metadata.errors import UserError

    if verify:
        from compress.studies.mnist_verification import verify_weights

        verify_weights(data_root, download, terminal())
        return
    try:
        numbers = [int(part) for part in seeds.split(",")] if seeds is not None else None
    except ValueError as error:
        raise UserError(f"--seeds {seeds!r}: expected whole numbers such as 0,1,2") from error
    models = list(challenge.CHALLENGE_MODELS) if model == "all" else [model]
    challenge.run_challenge(models, numbers, data_root, download, log_dir, threads, epochs, terminal())
