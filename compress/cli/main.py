"""The command line: `python -m compress VERB`. Imports torch only inside the verbs, so that --help answers at once."""

from __future__ import annotations

import inspect
import errno
import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from compress.cli.scaling import scaling
from compress.cli.scaling_fit import fit, predict

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  rich_markup_mode=None,
                  help="Teacher in; distilled, pruned, int8, packaged, verified and scored submission out.")
for verb in (fit, predict):
    scaling.command()(verb)
app.add_typer(scaling, name="scaling")
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as prune.ratio=0.4 seed=1")]
Recipe = Annotated[str, typer.Argument(help="a recipe's name (see `recipes`), or the path of a .yaml file")]


@app.command()
def run(recipe: Recipe, overrides: Overrides = None,
        update: Annotated[bool, typer.Option("--update", help="redo the stages that changed settings touch")] = False,
        ) -> None:
    """Run a recipe end to end; the same command continues an interrupted run."""
    from compress.pipeline import report
    from compress.pipeline.config import resolve
    from compress.pipeline.run import run_pipeline

    console = report.terminal()
    outcome = run_pipeline(resolve(recipe, overrides or []), console, update)
    report.print_table(console, outcome.rows)
    for text in outcome.warnings:
        console.print(f"warning: {text}", style="bold red", highlight=False)
    if outcome.results:
        console.print(f"total score {outcome.results['total_score']:.3f}, guarded "
                      f"{outcome.results['details']['guarded_score']:.3f}", highlight=False)
    submission = outcome.folder / "submission"
    for what, path in (("submission", submission), ("results", outcome.folder / "results.json"),
                       ("report", outcome.folder / "report.md"), ("plot", outcome.folder / "plot.png")):
        if path.exists():
            console.print(f"{what + ':':12}{path}", highlight=False, soft_wrap=True)


@app.command()
def plan(recipe: Recipe, overrides: Overrides = None) -> None:
    """Check a recipe and its data, and print what would run; trains nothing, writes nothing."""
    from compress.pipeline import report
    from compress.pipeline.config import resolve
    from compress.pipeline.plan import make_plan
    from compress.training.trackers import Tracker

    console = report.terminal()
    planned = make_plan(resolve(recipe, overrides or []), Tracker(console))
    card = planned.splits.card
    console.print(f"{planned.config.recipe}: {card.name}, {card.num_classes} classes, {list(card.input_shape)}, "
                  f"{card.counts}", highlight=False)
    for (name, stage), line in zip(planned.stages, planned.sketch.lines, strict=True):
        console.print(f"{name:22}{line}", highlight=False, soft_wrap=True)
        console.print(f"{'':22}{json.dumps(stage.model_dump(mode='json'))}", style="dim", highlight=False, soft_wrap=True)
    for text in planned.splits.warnings:
        console.print(f"warning: {text}", style="bold red", highlight=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Train a model: --config NAME or FILE.yaml, and any key as a flag (see `train --help`)."""
    if "--help" in context.args or not context.args:
        from compress.settings import recipe_names
        from compress.training.train_config import TRAINING_RECIPES, help_lines

        typer.echo("python -m compress train --config NAME [--KEY VALUE]...\n\n"
                   "Trains a model and measures it on the test split once, at the end; the same command continues an "
                   "interrupted training.\n"
                   f"NAME is a .yaml file or one of: {', '.join(recipe_names(TRAINING_RECIPES))}\n\n"
                   "Keys and their defaults:")
        for line in help_lines():
            typer.echo(line)
        return
    from compress.pipeline import report
    from compress.training.run import run_training
    from compress.training.train_config import resolve_training

    console = report.terminal()
    config = resolve_training(context.args)
    summary = run_training(config, console)
    if summary:
        report.print_training(console, config.log_dir, summary)


@app.command(name="mnist_challenge")
def mnist_challenge(
        model: Annotated[str, typer.Option("--model", help="a model of the challenge, or all")] = "all",
        seeds: Annotated[str | None, typer.Option("--seeds", help="such as 0,1,2; as recorded unless given")] = None,
        data_root: Annotated[Path | None, typer.Option("--data_root", help="where MNIST is")] = None,
        download: Annotated[bool, typer.Option("--download", help="let torchvision fetch MNIST")] = False,
        log_dir: Annotated[Path, typer.Option("--log_dir", help="the folder that is written")
                           ] = Path("runs/mnist_challenge"),
        threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: all")] = 0,
        epochs: Annotated[int, typer.Option("--epochs", min=1, help="fewer for a trial")] = 15,
        verify: Annotated[bool, typer.Option("--verify", help="check the committed weights; trains nothing")] = False,
        ) -> None:
    """The MNIST challenge: 99.4 % over the last five of 15 epochs, below 8,000 parameters."""
    from compress.pipeline import report
    from compress.studies import mnist_challenge as challenge
    from metadata.errors import UserError

    if verify:
        challenge.verify(data_root, download, report.terminal())
        return
    try:
        numbers = [int(part) for part in seeds.split(",")] if seeds is not None else None
    except ValueError as error:
        raise UserError(f"--seeds {seeds!r}: expected whole numbers such as 0,1,2") from error
    models = list(challenge.ENTRIES) if model == "all" else [model]
    challenge.run_challenge(models, numbers, data_root, download, log_dir, threads, epochs, report.terminal())


@app.command()
def recipes() -> None:
    """List the packaged recipes."""
    from compress.settings import RECIPES, recipe_names

    for name in recipe_names():
        first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
        typer.echo(f"{name:30}{first.removeprefix('#').strip()}")


@app.command()
def stages() -> None:
    """List the stages and their settings."""
    from compress.pipeline.stage import stage_class, stage_names
    from compress.settings import Config

    def show(kind: type[Config], indent: str) -> None:
        for key, info in kind.model_fields.items():
            if isinstance(info.annotation, type) and issubclass(info.annotation, Config):
                typer.echo(f"{indent}{key}: {info.description or ''}".rstrip())
                show(info.annotation, indent + "  ")
            else:
                typer.echo(f"{indent}{key} = {info.default!r}  {info.description or ''}".rstrip())

    for name in stage_names():
        kind = stage_class(name)
        typer.echo(f"{name}: {(kind.__doc__ or '').strip().splitlines()[0]}")
        show(kind, "    ")


@app.command()
def describe(model: Annotated[str, typer.Argument(help="a model's name, a stage's folder or a submission")],
             options: Annotated[list[str] | None, typer.Argument(
                 metavar="[KEY=VALUE]...", help="num_classes, input_shape=3,32,32 and the model's own")] = None) -> None:
    """Print a model's architecture JSON."""
    import yaml

    from architectures.describe import describe as describe_module
    from architectures.layers import Architecture
    from architectures.zoo import families, make
    from metadata.errors import UserError
    from metadata.files import read_json
    from metadata.schemas import ARCHITECTURE_FILE

    folder = Path(model)
    if folder.is_dir():
        path = next((folder / name for name in (ARCHITECTURE_FILE, "architecture.json") if (folder / name).is_file()), None)
        if path is None:
            raise UserError(f"{folder}: no {ARCHITECTURE_FILE} or architecture.json in it")
        architecture: Architecture = read_json(path, Architecture)
    else:
        settings: dict[str, Any] = {}
        for option in options or []:
            key, equals, value = option.partition("=")
            if not equals:
                raise UserError(f"{option!r}: expected key=value, such as width=16")
            try:
                settings[key] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UserError(f"{option!r}: not a YAML value") from error
        shape_text = str(settings.pop("input_shape", "3,224,224"))
        try:
            channels, height, width = (int(part) for part in shape_text.split(","))
        except ValueError as error:
            raise UserError(f"input_shape: expected three whole numbers such as 3,224,224, got {shape_text!r}") from error
        num_classes = settings.pop("num_classes", 1000)
        if not isinstance(num_classes, int) or min(num_classes, channels, height, width) < 1:
            raise UserError("num_classes and input_shape: expected positive whole numbers")
        if model in families() and "input_shape" in inspect.signature(families()[model]).parameters:
            settings["input_shape"] = (channels, height, width)  # a network of linear layers is built for one shape
        architecture = describe_module(make(model, num_classes=num_classes, **settings), (channels, height, width))
    typer.echo(json.dumps(architecture.to_json(), indent=2))


@app.command()
def package(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder, such as runs/my_run")],
            out: Annotated[Path, typer.Option("--out", help="the folder to write; it must not exist")],
            layout: Annotated[str | None, typer.Option(help="toolkit or challenge; the recipe's unless given")] = None,
            username: Annotated[str | None, typer.Option(help="challenge layout; the recipe's unless given")] = None,
            teamname: Annotated[str | None, typer.Option(help="challenge layout; the recipe's unless given")] = None,
            ) -> None:
    """Package a finished run's last model again, elsewhere or in another layout."""
    from compress.pipeline.run import package_run

    given = {"layout": layout, "username": username, "teamname": teamname}
    package_run(run_folder, out, {key: value for key, value in given.items() if value is not None})
    typer.echo(f"submission: {out}")


@app.command(name="export_data")
def export_data(name: Annotated[str, typer.Argument(help="a data set, see loaders/")],
                out: Annotated[Path, typer.Option("--out", help="the folder to write; it must not exist")],
                root: Annotated[Path | None, typer.Option(help="where the set's files are")] = None,
                download: Annotated[bool, typer.Option("--download", help="fetch a missing set")] = False) -> None:
    """Write a data set's test split as an image folder for the evaluator: its own image files, or one PNG an image."""
    from compress.pipeline import report
    from compress.training.trackers import Tracker
    from loaders.arrays import write_image_folder
    from loaders.catalog import load
    from loaders.request import Request
    from metadata.errors import UserError

    if out.exists():
        raise UserError(f"--out {out}: already there; nothing was written")
    with Tracker(report.terminal()).progress("reading images") as advance:
        splits = load(Request(name=name, root=root, download=download, on_progress=advance))
        test = splits.open_test()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_image_folder(test, splits.card.class_names, out)
    typer.echo(f"{len(test)} images in {splits.card.num_classes} classes: {out}")


def main() -> NoReturn:
    """Runs the command line: exit 0, 2 for the user's mistake, 1 for a failed verification."""
    from metadata.errors import UserError

    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments, prog_name="python -m compress")
    except UserError as error:
        _fail(str(error), error.exit_code, debug)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = ("; nothing half-written was left, make room or choose another folder, and the same command continues"
                  if full else "")
        _fail(f"{error.filename or 'disk'}: {error.strerror or error}{advice}", 2, debug)
    sys.exit(0)


def _fail(text: str, code: int, debug: bool) -> NoReturn:
    if debug:
        raise  # the handler that calls this has the error at hand
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)
