"""The verbs below `scaling`: studies of how the loss falls with parameters, data and compute."""

from __future__ import annotations

import typer

scaling = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                      help="Scaling-law studies: run, fit, extrapolate.")
