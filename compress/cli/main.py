"""The command line `python -m compress`, or `compress` once installed: collects the verbs and reports errors."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import typer

from compress.cli import models, packages, pipeline, scaling_laws, scaling_runs, search, training


def _with_homes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let the paths of a verb begin with `~`: shells leave it alone behind `=`, as in `--out=~/x`."""
    @functools.wraps(function)
    def expanded(**options: Any) -> Any:
        return function(**{key: Path(os.path.expanduser(value)) if isinstance(value, Path) else value
                           for key, value in options.items()})
    return expanded


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Compress image classifiers: distill, prune, quantize to int8, package, verify and score.")
verb: Callable[..., Any]
for verb in (pipeline.run, search.search, pipeline.plan, pipeline.recipes, pipeline.stages):
    app.command()(_with_homes(verb))
app.command(context_settings=training.FREE_FLAGS)(training.train)
app.command(name="mnist_challenge")(_with_homes(training.mnist_challenge))
app.command()(models.describe)
app.command(name="import")(_with_homes(models.import_model))
for verb in (packages.package, packages.export_data, packages.bundle):
    app.command(name=verb.__name__)(_with_homes(verb))

scaling = typer.Typer(no_args_is_help=True, rich_markup_mode=None,
                      help="Study how test loss scales. Run experiments over parameters, data and compute, and fit laws.")
for verb in (scaling_runs.run, scaling_runs.sweep, scaling_runs.plan, scaling_laws.fit, scaling_laws.predict):
    scaling.command()(_with_homes(verb))
app.add_typer(scaling, name="scaling")


def main() -> NoReturn:
    """Run the command line. Exit with 0, with 2 for a mistake of the user's, with 1 for a failed verification."""
    from metadata.errors import UserError

    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments, prog_name="python -m compress")
    except UserError as error:
        _fail(str(error), error.exit_code, debug)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = ("; no half-written file was left; free some space or choose another folder, and the same command "
                  "continues" if full else "")
        _fail(f"{error.filename or 'disk'}: {error.strerror or error}{advice}", 2, debug)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # at the edge alone: a mistake in the code that file:FILE:CLASS named is the user's
        if not (text := _of_own_code(error)):
            raise
        _fail(text, 2, debug)
    sys.exit(0)


def _of_own_code(error: BaseException) -> str:
    """Return what a user's file raised, in one line with its place; "" if the error is the toolkit's."""
    code = sys.modules.get("architectures.own_code")
    return code.own_error(error) if code else ""


def _fail(text: str, code: int, debug: bool) -> NoReturn:
    """Print one line on stderr and exit; with `debug`, raise the error that the caller is handling."""
    if debug:
        raise
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)
