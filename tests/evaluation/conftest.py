"""Submissions of other kinds, made from the small run's own: ONNX files, and folders with their own model.py."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import model_loader
from compress.packaging.export import export as export_layers
from compress.packaging.onnx_package import OnnxPackage
from compress.pipeline.stage import TorchModel
from metadata.records import DatasetCard
from tests.helpers.sharing import shared_folder
from tests.helpers.verdicts import Evaluate
from tests.helpers.walls import WEAK_FLAGS

QUICK = ["--runs", "20", "--warmup", "2"]


@pytest.fixture
def evaluate(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Runs the evaluator's command line: exit code, result, stderr."""
    def run(folder: Path, *flags: str, data: Path = few) -> tuple[int, dict[str, Any], str]:
        output = tmp_path / "results.json"
        before = sorted(tmp_path.iterdir())
        code = model_loader.main(["--submission_dir", str(folder), "--data_dir", str(data), "--output_file", str(output),
                                  *QUICK, *flags, *(WEAK_FLAGS if "--allow_code" in flags else [])])
        assert sorted(tmp_path.iterdir()) == sorted({*before, output}), "something half-written was left"
        return code, json.loads(output.read_text()), capsys.readouterr().err
    return run


@pytest.fixture(scope="session")
def original(submission: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A submission in the original style: model.py, a state dict under some name, loose metadata."""
    def write(folder: Path) -> None:
        shutil.copy(submission / "model.py", folder)
        shutil.copy(next(submission.glob("*.pth")), folder / "best_weights.pth")
        card = json.loads((submission / "model_metadata.json").read_text())
        (folder / "metadata.json").write_text(json.dumps({
            "model_format": "pth", "model_name": "SlimResNet18", "team": "ada", "num_classes": 10,
            "preprocessing": card["preprocessing"]}))

    return shared_folder(tmp_path_factory, "original", write)


def export(folder: Path, path: Path) -> None:
    """The float student of a run as ONNX."""
    student = TorchModel.load(folder / "04-finetune")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the exporter without onnxscript
        wrapped = torch.nn.Sequential(student.module).eval()  # that exporter takes an fx module's graph for its own
        torch.onnx.export(wrapped, (torch.zeros(1, *student.architecture.input_shape),), str(path), dynamo=False,
                          input_names=["image"], dynamic_axes={"image": {0: "n"}}, opset_version=17)


@pytest.fixture(scope="session")
def onnx_package(small_run: Path, submission: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float student as the toolkit packages ONNX files."""
    def write(folder: Path) -> None:
        student = TorchModel.load(small_run / "04-finetune")
        model, architecture = export_layers(student.module, student.architecture)
        stated = json.loads((submission / "model_metadata.json").read_text())
        card = DatasetCard(name="digits", class_names=stated["class_names"], input_shape=architecture.input_shape,
                           preprocessing=stated["preprocessing"])
        measured = stated["accuracy"] | stated["latency"] | {"accuracy": stated["accuracy"]["fraction"]}
        OnnxPackage(architecture=architecture, card=card, name="student", measured=measured,
                    content=model.SerializeToString()).write(folder / "package")

    return shared_folder(tmp_path_factory, "onnx_package", write) / "package"


@pytest.fixture(scope="session")
def onnx_submission(small_run: Path, original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float student as one ONNX file with loose metadata."""
    def write(folder: Path) -> None:
        export(small_run, folder / "model.onnx")
        metadata = json.loads((original / "metadata.json").read_text())
        (folder / "model_metadata.json").write_text(json.dumps(metadata | {"model_format": "ONNX"}))

    return shared_folder(tmp_path_factory, "onnx", write)
