"""The command line's other verbs, and that help needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compress.pipeline.stage import stage_names
from compress.settings import recipe_names
from tests.helpers.commands import Compress, PROJECT, assert_one_line_error, run_compress


HEAVY = {"torch", "torchvision", "matplotlib", "plotly", "sklearn", "scipy"}
EVERY_HELP = """
import sys
from compress.cli.main import app, scaling
verbs = [[]] + [[command.name or command.callback.__name__] for command in app.registered_commands]
verbs += [["scaling"]] + [["scaling", command.name or command.callback.__name__] for command in scaling.registered_commands]
for verb in verbs:
    if verb != ["train"]:  # it lists the training settings
        app(args=[*verb, "--help"], standalone_mode=False)
print(*sys.modules, sep="\\n", file=sys.stderr)
"""


def test_help_does_not_import_torch() -> None:
    done = subprocess.run([sys.executable, "-c", EVERY_HELP], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("Usage:") == 18, done.stderr
    imported = set(done.stderr.split())
    assert "typer" in imported and not imported & HEAVY


@pytest.mark.parametrize("verb", ["", "run", "scaling fit"])
def test_help_of_the_module(verb: str) -> None:
    done = run_compress(*verb.split(), "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"Usage: python -m compress {verb}".rstrip())


def test_recipes_and_stages_list_everything(compress: Compress) -> None:
    listed = compress("recipes").stdout
    assert all(name in listed for name in recipe_names())
    listed = compress("stages").stdout
    assert all(f"\n{name}: " in f"\n{listed}" for name in stage_names()) and "ratio = 0.3" in listed
    finetune = listed[listed.index("\nfinetune: "):listed.index("\npackage: ")]
    assert "epochs = 5 " in finetune and "lr = 0.01 " in finetune  # the stage's own defaults, not those of all trainings


def test_plan_trains_nothing_and_writes_nothing(compress: Compress, tmp_path: Path) -> None:
    done = compress("plan", "slim_resnet18_digits", f"run_dir={tmp_path / 'runs'}")
    assert done.returncode == 0 and not (tmp_path / "runs").exists()
    for name in ("01-teacher", "02-distill", "03-prune", "07-evaluate"):
        assert name in done.stdout
    assert "MACs" in done.stdout and "21 of 21 layers to int8" in done.stdout


def test_describe_prints_architecture_json(compress: Compress, submission: Path) -> None:
    from architectures.build import check_shapes
    from architectures.architecture import Architecture
    done = compress("describe", "slim_resnet18", "num_classes=100", "width=16", "input_shape=3,32,32", "stem=small")
    architecture = Architecture.model_validate(json.loads(done.stdout))
    assert architecture.num_classes == 100 and check_shapes(architecture)["conv1"] == (16, 32, 32)
    packaged = json.loads(compress("describe", submission).stdout)
    assert packaged["compression_steps"][-1] == "dynamic_quantization"
    mlp = json.loads(compress("describe", "simple_mlp", "num_classes=7", "hidden=[16]", "input_shape=3,32,32").stdout)
    assert mlp["input_shape"] == [3, 32, 32] and mlp["layers"][1]["in_features"] == 3072
    assert_one_line_error(compress("describe", "slim_resnet17"), "did you mean 'slim_resnet18'")
    assert_one_line_error(compress("describe", "slim_resnet18", "input_shape=3x32"), "input_shape")
    assert_one_line_error(compress("describe", "slim_resnet18", "input_shape=3,99999999,64"),
                          "input_shape 3,99999999,64: expected at most 268,435,456 numbers an image")
    assert_one_line_error(compress("describe", "slim_resnet18", "num_classes=many"), "num_classes")


def test_export_data(compress: Compress, tmp_path: Path) -> None:
    done = compress("export_data", "digits", "--out", tmp_path / "test")
    assert done.returncode == 0 and len(list((tmp_path / "test").glob("*/*.png"))) == 359
    assert_one_line_error(compress("export_data", "digits", "--out", tmp_path / "test"), "already there")
    assert_one_line_error(compress("export_data", "mnist", "--out", tmp_path / "x", "--root", tmp_path),
                          "download=true")


def test_unknown_verbs_and_options_exit_2(compress: Compress) -> None:
    for arguments in (["rum"], ["run"], ["run", "slim_resnet18_digits", "--fast"]):
        done = compress(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_debug_shows_the_traceback() -> None:
    done = run_compress("--debug", "plan", "nothing")
    assert done.returncode != 0 and "Traceback" in done.stderr and "UserError" in done.stderr
