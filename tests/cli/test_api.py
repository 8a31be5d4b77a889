"""The verbs of `import compress`, and that the package is complete when it is installed."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import compress
from compress.pipeline.stages.prune import Prune
from compress.pruning.groups import widths
from metadata.errors import UserError
from tests.helpers.commands import PROJECT, SMALL

VERBS = ["evaluate_submission", "import_onnx", "load_model", "plan", "prune", "quantize_dynamic", "run", "train"]
LIGHT = "import compress, sys; print({*sys.argv[1:]} <= {*dir(compress)}, 'torch' in sys.modules, 'rich' in sys.modules)"


def test_import_is_light_and_lists_the_verbs() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, *VERBS], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]
    with pytest.raises(AttributeError, match="quantise"):
        compress.quantise  # type: ignore[attr-defined]  # noqa: B018


def test_the_stub_and_the_package_offer_the_same_names() -> None:
    stub = ast.parse((PROJECT / "compress" / "__init__.pyi").read_text())
    typed = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(typed) == VERBS and set(compress.__all__) == {"__version__", *VERBS}
    assert all(callable(getattr(compress, verb)) for verb in VERBS)
    from compress.quantization import quantize_dynamic
    assert compress.quantize_dynamic is quantize_dynamic


def test_plan_takes_settings_as_text_and_as_values(tmp_path: Path) -> None:
    text = compress.plan("slim_resnet18_digits", "prune.ratio=0.5", "name=half", f"run_dir={tmp_path}", quiet=True)
    values = compress.plan("slim_resnet18_digits", prune={"ratio": 0.5}, name="half", run_dir=tmp_path, quiet=True)
    assert text.config == values.config and text.config.name == "half"
    stages = dict(values.stages)
    assert stages["03-prune"].ratio == 0.5 and stages["03-prune"].criterion == "l2" and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="ratio"):
        compress.plan("slim_resnet18_digits", prune={"ration": 0.5}, quiet=True)


def test_run_continues_a_run_of_the_command_line(small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run, tmp_path / "small")
    outcome = compress.run("slim_resnet18_digits", *SMALL, run_dir=tmp_path, name="small", quiet=True)
    assert outcome.folder == tmp_path / "small" and outcome.results is not None
    assert outcome.results["total_score"] > 0 and outcome.rows[-1].split == "test"
    stage = "02-distill/stage.json"
    assert (tmp_path / "small" / stage).read_bytes() == (small_run / stage).read_bytes()  # nothing ran again


def test_train_returns_the_summary(tmp_path: Path) -> None:
    summary = compress.train("digits", num_epochs=1, model_options={"width": 8}, log_dir=tmp_path / "log", threads=1,
                             augment=["crop"], quiet=True)
    assert summary["epochs"] == 1 and summary["model"]["options"]["width"] == 8 and summary["test"]["images"] == 359
    assert (tmp_path / "log" / "weights.pth").is_file()
    with pytest.raises(UserError, match="num_epochs"):
        compress.train("digits", num_epoch=1)


def test_prune_returns_a_smaller_copy() -> None:
    from architectures.zoo import make
    model = make("slim_resnet18", num_classes=10, width=16, stem="small").eval()
    images, before = torch.rand(2, 3, 32, 32), widths(model)
    pruned = compress.prune(model, images, ratio=0.5)
    assert pruned(images).shape == (2, 10) and widths(model) == before
    assert widths(pruned)["conv1"] == 8 and sum(widths(pruned).values()) < sum(before.values())
    for wrong in ({"criterion": "l3"}, {"criterion": "taylor"}, {"ratio": 1.5}):
        with pytest.raises(UserError):
            compress.prune(model, images, **wrong)


def test_prune_has_the_defaults_of_the_stage() -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(compress.prune).parameters.items()}
    assert all(defaults[name] == getattr(Prune(), name) for name in ("ratio", "multiple", "criterion", "scope"))


def test_every_data_file_is_packaged() -> None:
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packaged = {path for package, patterns in settings["package-data"].items() for pattern in patterns
                for path in (PROJECT / package).glob(pattern)}
    found = {path for folder in ("architectures", "compress", "loaders", "metadata")
             for path in (PROJECT / folder).rglob("*")
             if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts}
    assert found == packaged and len(found) > 30


def test_every_requirement_is_listed_once() -> None:
    dynamic = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    lists = [PROJECT / name for name in ["requirements.txt", *dynamic["optional-dependencies"]["dev"]["file"]]]
    names = [re.split("[<>=]", line)[0] for path in lists for line in path.read_text().split()]
    assert len(names) == len(set(names)) > 20
    development = (PROJECT / "requirements-dev.txt").read_text().splitlines()
    assert development == [f"-r {path.relative_to(PROJECT)}" for path in lists]
