"""`export.format` in a run: what is measured, packaged and scored, what is redone, and what a plan refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compress.evaluation.file_formats import FILE_FORMATS
from tests.helpers.commands import Compress, assert_one_line_error
from tests.helpers.ledgers import ledger

FORMATS = ("openvino", "torch_export", "litert", "executorch")
INT8 = "  - quantize_static: {max_drop: 0.9, budget_seconds: 0.001, allow_slower: true}\n"


@pytest.fixture
def ending(tiny_recipe: Path, tiny_run: Path, tmp_path: Path, compress: Compress):  # type: ignore[no-untyped-def]
    """Runs the tiny recipe with other stages behind its finetuning, which is finished."""
    shutil.copytree(tiny_run, tmp_path / "tiny")

    def run(stages: str, *flags: str, verb: str = "run"):  # type: ignore[no-untyped-def]
        recipe = tmp_path / "tiny.yaml"
        recipe.write_text(tiny_recipe.read_text().split("  - quantize_dynamic")[0] + stages)
        return compress(verb, recipe, f"run_dir={tmp_path}", *flags)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_measured_packaged_and_scored(name: str, ending, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    runtime = FILE_FORMATS[name].runtimes[name]
    pytest.importorskip(runtime.module)
    done = ending(f"  - export: {{format: {name}}}\n  - package\n  - evaluate\n", "--update")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "04-finetune" not in done.stdout and done.stdout.count("finished before, skipped") == 4
    folder = tmp_path / "tiny"
    note = json.loads((folder / "05-export" / "stage.json").read_text())["notes"]["format"]
    assert note["name"] == name and note["largest_difference"] <= 1e-4 * note["largest_logit"]
    metadata = json.loads((folder / "submission" / "model_metadata.json").read_text())
    assert (metadata["model_format"], metadata["runtime"]) == (name, name)
    rows = {row["stage"]: row for row in ledger(folder)}
    results = json.loads((folder / "results.json").read_text())
    assert results["details"]["backend"] == name
    weights = sum(record["bytes"] for file, record in metadata["files"].items() if file.startswith("compressed_"))
    assert int(rows["export"]["size_bytes"]) == int(rows["package"]["size_bytes"]) == weights == note["bytes"]
    assert results["details"]["bytes"]["weights"] == weights
    assert rows["export"]["macs"] == rows["package"]["macs"] == rows["finetune"]["macs"]
    card = (folder / "submission" / "README.md").read_text()
    assert f"compressed_slimresnet18{FILE_FORMATS[name].suffix}" in card
    assert runtime.package in (folder / "submission" / "requirements.txt").read_text()
    again = ending(f"  - export: {{format: {name}}}\n  - package\n  - evaluate\n")
    assert again.returncode == 0 and again.stdout.count("finished before, skipped") == 7
    other = ending("  - export\n  - package\n  - evaluate\n")
    assert_one_line_error(other, f"export.format: {name} -> onnx", "--update")


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_int8_keeps_the_format_and_another_export_changes_it(name: str, ending, tmp_path: Path  # type: ignore[no-untyped-def]
                                                             ) -> None:
    pytest.importorskip(FILE_FORMATS[name].runtimes[name].module)
    done = ending(f"  - export: {{format: {name}}}\n{INT8}  - package\n  - evaluate\n", "--update")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "tiny"
    note = json.loads((folder / "06-quantize_static" / "stage.json").read_text())["notes"]["format"]
    assert note["same_class"] >= 0.995 * note["images"]
    metadata = json.loads((folder / "submission" / "model_metadata.json").read_text())
    assert metadata["model_format"] == name and metadata["quantization"]["scheme"] == "static_int8"
    rows = {row["stage"]: row for row in ledger(folder)}
    assert int(rows["quantize_static"]["size_bytes"]) < int(rows["export"]["size_bytes"])
    other = "torch_export" if name == "openvino" else "openvino"
    stages = f"  - export: {{format: {name}}}\n{INT8}  - export: {{format: {other}}}\n  - package\n  - evaluate\n"
    done = ending(stages, "--update")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished before, skipped") == 6  # the search is not repeated
    assert json.loads((folder / "results.json").read_text())["details"]["backend"] == other


@pytest.mark.parametrize(("stages", "parts"), [
    ("  - export: {format: tflite}\n", ("format", "'litert'", "'openvino'")),  # the names that there are
    ("  - export\n  - export\n", ("export.format onnx: the model has this format already",)),
    ("  - quantize_dynamic\n  - export: {format: openvino}\n", ("the model is int8 by then",)),
    ("  - export: {format: openvino}\n  - package: {layout: hub}\n", ("package.layout hub", "toolkit layout")),
    ("  - package: {layout: hub, license: my own}\n", ("license", "my own"))])
def test_a_plan_refuses(stages: str, parts: tuple[str, ...], ending) -> None:  # type: ignore[no-untyped-def]
    assert_one_line_error(ending(stages, verb="plan"), *parts)


def test_what_a_runtime_cannot_do_is_said_in_the_plan(two_stages: Path, tmp_path: Path, compress: Compress) -> None:
    pytest.importorskip(FILE_FORMATS["litert"].runtimes["litert"].module)
    (tmp_path / "dilated.py").write_text(
        "from torch import nn\n\n\ndef net(num_classes):\n    return nn.Sequential(\n"
        "        nn.Conv2d(3, 8, 3), nn.MaxPool2d(2, dilation=2), nn.Flatten(), nn.Linear(32, num_classes))\n")
    student = [f"distill.model=file:{tmp_path / 'dilated.py'}:net", "distill.options={}"]
    two_stages.write_text(two_stages.read_text() + "  - export: {format: onnx}\n")
    assert compress("plan", two_stages, *student).returncode == 0
    assert_one_line_error(compress("plan", two_stages, *student, "export.format=litert"),
                          "export.format litert: node 1: MaxPool: with dilation", "keep export.format onnx")
