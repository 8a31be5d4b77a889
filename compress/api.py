"""The verbs of `import compress`: the command line's work as functions, for notebooks and other programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch import Tensor, fx, nn

from compress.pipeline import importing
from compress.pipeline.config import DataConfig, RunConfig, resolve
from compress.pipeline.importing import Imported
from compress.pipeline.plan import RunPlan, make_plan
from compress.pipeline.run import RunOutcome, run_pipeline
from compress.pruning import prune as pruning
from compress.pruning.importance import CRITERIA, NEEDS_GRADIENTS
from compress.quantization.dynamic import as_graph
from compress.training.flags import resolve_training
from compress.training.run import run_training
from compress.training.trackers import Tracker, terminal
from metadata.errors import UserError
from metadata.machine import usable_cores


def run(recipe: str | Path, *overrides: str, update: bool = False, quiet: bool = False, **settings: Any) -> RunOutcome:
    """Run a recipe from teacher to scored submission, or continue an interrupted run.

        outcome = compress.run("slim_resnet18_digits", "prune.ratio=0.5", name="half")
        outcome = compress.run("slim_resnet18_digits", prune={"ratio": 0.5}, name="half")
        outcome.results["total_score"], outcome.folder / "submission"

    Args:
        recipe: name of a packaged recipe, or path of a .yaml file.
        overrides: settings to change, written as on the command line, such as "prune.ratio=0.4".
        update: make finished stages again that changed settings, data, files or code affect.
        quiet: print no progress.
        settings: settings to change, as values. A mapping changes the keys that it names and no others.

    Raises:
        UserError: a wrong setting, missing data, a folder that is in use; the same call continues after the repair.
        VerificationError: the packaged model is not what it should be.
    """
    return run_pipeline(_resolved(recipe, overrides, settings), _console(quiet), update)


def plan(recipe: str | Path, *overrides: str, quiet: bool = False, **settings: Any) -> RunPlan:
    """Check a recipe and its data without training or writing anything. Takes the arguments of `run`.

    Return the plan: `stages` with their settings, `sketch.lines` with what each stage would do, `splits` with the data.

    Raises:
        UserError: whatever is wrong, in one line.
    """
    return make_plan(_resolved(recipe, overrides, settings), Tracker(_console(quiet)))


def train(config: str | Path | None = None, *, quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """Train a model, or continue an interrupted training; return the content of its summary.json.

        summary = compress.train("digits", num_epochs=3, log_dir="runs/short")
        summary["test"]["accuracy"]

    Args:
        config: name of a packaged training recipe, or path of a .yaml file; the defaults unless given.
        quiet: print no progress.
        settings: settings to change; the keys are those of `python -m compress train --help`.

    Raises:
        UserError: a wrong setting, missing data, a folder that is in use; the same call continues after the repair.
    """
    flags = [] if config is None else [f"--config={config}"]
    flags += [f"--{key}={value}" for key, value in settings.items() if isinstance(value, str | Path)]
    values = {key: value for key, value in settings.items() if not isinstance(value, str | Path)}
    return run_training(resolve_training(flags, values), _console(quiet))


def import_onnx(path: str | Path, out: str | Path, *, data: str | None = None, root: str | Path | None = None,
                input_shape: tuple[int, int, int] | None = None, **settings: Any) -> Imported:
    """Make a network of an ONNX classifier, compare it with ONNX Runtime, and write it as a folder; see `docs/doors_in.md`.

        found = compress.import_onnx("theirs.onnx", "theirs", data="image_folder", root="DIR")
        compress.run("compress_own", teacher={"model": "folder:theirs"}, data={"name": "image_folder", "root": "DIR"})

    Args:
        path: the file.
        out: folder to write; it must not exist.
        data: name of a data set, to compare its images and score the network and the file.
        root: folder of its files.
        input_shape: (C, H, W), for a file that leaves the size of its images open.
        settings: of the data, such as `mean`.

    Raises:
        UserError: the file cannot be read, has no network in the layer table, or gives other logits than its network.
    """
    wanted = None
    if data is not None:
        wanted = DataConfig.model_validate({"name": data, "root": root, **settings}).request(workers=usable_cores())
    return importing.import_onnx(Path(path), Path(out), data=wanted, input_shape=input_shape)


def prune(model: nn.Module, example_input: Tensor, *, ratio: float = 0.3, multiple: int = 8, criterion: str = "l2",
          scope: Literal["uniform", "global"] = "uniform", gradients: Callable[[nn.Module], None] | None = None,
          ) -> fx.GraphModule:
    """Return a copy of a model with whole channels removed. Train the copy afterwards to recover the accuracy.

    The copy is a graph with the original layer names. Its state dict and `architectures.describe.describe` rebuild it.

    Args:
        model: a model that torch.fx can trace and whose layers are in the layer table; it is left alone.
        example_input: (N, C, H, W) float32.
        ratio: share of the channels to remove, in (0, 1).
        multiple: the remaining channels of a layer are rounded to a multiple of this; odd widths are slow.
        criterion: importance of a group of channels: l1, l2, bn_scale, fpgm, taylor or random.
        scope: "uniform" removes the same share of every layer, "global" ranks the channels of the whole network.
        gradients: fills the gradients of a module; "taylor" needs them.

    Raises:
        UserError: the model is outside the layer table, a layer would lose all channels, or nothing could be removed.
    """
    if criterion not in CRITERIA:
        raise UserError(f"criterion {criterion!r}: expected one of {', '.join(CRITERIA)}")
    if criterion in NEEDS_GRADIENTS and gradients is None:
        raise UserError(f"criterion {criterion!r} needs gradients; pass a function that fills them")
    if not 0 < ratio < 1 or multiple < 1 or scope not in ("uniform", "global"):
        raise UserError(f"ratio {ratio}, multiple {multiple}, scope {scope!r}: expected a ratio between 0 and 1, a "
                        "positive multiple, and the scope uniform or global")
    _, channels, height, width = example_input.shape
    graph = as_graph(model, (channels, height, width))
    return pruning.prune(graph, example_input[:1], ratio=ratio, multiple=multiple, criterion=criterion, scope=scope,
                         gradients=gradients)


def _resolved(recipe: str | Path, overrides: tuple[str, ...], settings: dict[str, Any]) -> RunConfig:
    return resolve(str(recipe), [*overrides, *_assignments(settings)])


def _assignments(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested settings as pairs of the command line's `a.b` and a value."""
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found += _assignments(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _console(quiet: bool) -> Console:
    return Console(quiet=True) if quiet else terminal()
