"""Export formats: each answers as its ONNX file does, float and int8, keeps sizes and names, and says what it cannot do."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from architectures.build import build
from architectures.describe import describe
from architectures.layers.table import LAYER_TABLE
from architectures.onnx_files import read_onnx
from compress.evaluation.file_formats import FILE_FORMATS
from compress.evaluation.runtime import Runtime
from compress.evaluation.runtimes import open_file, open_here, preferred_backend
from compress.evaluation.submission import read_submission
from compress.packaging.export import check_labels, check_same
from compress.packaging.format_package import FormatPackage
from compress.packaging.formats.base import export_format, format_module, format_names
from compress.packaging.onnx_in_torch import OPERATORS, OnnxInTorch
from compress.pipeline.stages.export import Export
from compress.quantization.static import layers_of
from metadata.errors import UserError, VerificationError
from metadata.records import DatasetCard
from metadata.schemas import Preprocessing
from tests.helpers.commands import PROJECT
from tests.helpers.little import Little, little, SHAPE
from tests.helpers.static_int8 import images, on_onnxruntime

QUICK = ["litert", "openvino", "torch_export"]


@functools.cache
def network(int8: bool) -> onnx.ModelProto:
    return little(int8)


@functools.cache
def converted(name: str, int8: bool) -> dict[str, bytes]:
    """The network in a format: suffix -> file."""
    return export_format(name).convert(network(int8))


def opened(name: str, int8: bool, folder: Path) -> Runtime:
    """The network in a format, on the evaluator's runtime."""
    for suffix, content in converted(name, int8).items():
        (folder / f"model{suffix}").write_bytes(content)
    return open_file(folder / f"model{export_format(name).suffix}", SHAPE, Preprocessing())


@pytest.fixture
def float_model() -> onnx.ModelProto:
    return network(False)


@pytest.mark.parametrize("name", [*QUICK, pytest.param("executorch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_each_format_answers_as_its_onnx_file(name: str, int8: bool, tmp_path: Path) -> None:
    pytest.importorskip(FILE_FORMATS[name].runtimes[name].module)
    model = network(int8)
    runtime = opened(name, int8, tmp_path)
    inputs = images(4)
    expected, got = on_onnxruntime(model, precise=True), torch.from_numpy(runtime(inputs))
    if int8:
        assert float((expected - got).abs().max()) < 0.02 * float(expected.abs().max())
    else:
        check_same(expected, got, 1e-4)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    known = read_onnx(tmp_path / "model.onnx", SHAPE)
    assert runtime.macs == known.macs
    # Scales and zero points are shared or not; those of a .tflite file belong to its tensors, and are none of their own.
    assert runtime.parameters["all"] == pytest.approx(known.parameters, rel=0.12 if name == "litert" else 0.06)
    if name == "openvino":
        assert runtime.file.layers == known.layers  # type: ignore[attr-defined]
    if name == "torch_export":  # torch's own reader has the same answers
        own = export_format(name).open
        assert own
        with torch.inference_mode():
            assert torch.allclose(own(tmp_path / "model.pt2")(torch.from_numpy(inputs)), got, atol=1e-6)


def test_the_settings_formats_and_runtimes_have_the_same_names() -> None:
    assert set(get_args(Export.model_fields["format"].annotation)) == set(format_names())
    assert set(format_names()) == set(FILE_FORMATS)
    for name in set(format_names()) - {"onnx"}:
        found = importlib.import_module(format_module(name)).FORMAT  # also of a format that is not installed
        assert FILE_FORMATS[name].suffix == found.suffix


def test_every_operator_that_a_layer_writes_has_a_form_in_torch() -> None:
    written = {operator for row in LAYER_TABLE.values() for operator in row.operators}
    assert written - set(OPERATORS) == set()


def test_an_operator_without_a_form_is_named(float_model: onnx.ModelProto) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(float_model)
    other.graph.node.append(helper.make_node("NonZero", ["input"], ["places"], name="odd"))
    with pytest.raises(UserError, match="operator NonZero of node 'odd'"):
        OnnxInTorch(other)


def test_labels_are_held_to_a_share() -> None:
    expected = torch.eye(4).repeat(50, 1)
    got = expected.clone()
    got[0] = got[1]
    assert check_labels(expected, got, 0.995, "X")["same_class"] == 199
    got[2] = got[1]
    for wrong in (got, expected * torch.nan):
        with pytest.raises(VerificationError, match="the X file gives"):
            check_labels(expected, wrong, 0.995, "X")


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.import_module(format_module("openvino"))
    monkeypatch.setattr(known, "FORMAT", dataclasses.replace(known.FORMAT, modules={"openvino_of_the_moon": "openvino"}))
    with pytest.raises(UserError, match=r"export.format openvino: not installed; pip install openvino$"):
        export_format("openvino")


def test_writing_an_ir_reports_to_nobody(float_model: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(float_model.SerializeToString())
    script = """
import sys, time
import onnx
from compress.packaging.formats.openvino import write_openvino
calls = []
sys.addaudithook(lambda event, args: calls.append(event) if event.startswith(("socket.", "urllib.", "http.")) else None)
assert set(write_openvino(onnx.load(sys.argv[1]))) == {".xml", ".bin"}
time.sleep(1)
assert not calls, calls
print("quiet")
"""
    done = subprocess.run([sys.executable, "-c", script, path], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "quiet", done.stderr


def test_one_image_and_many_have_the_same_answers(tmp_path: Path) -> None:
    inputs = images(5)
    for name in QUICK:
        runtime = opened(name, False, tmp_path)
        assert np.allclose(np.concatenate([runtime(one[None]) for one in inputs]), runtime(inputs), atol=1e-5)


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_a_package_states_what_its_file_holds(int8: bool, tmp_path: Path) -> None:
    model = network(int8)
    card = DatasetCard(name="noise", class_names=[str(index) for index in range(10)], input_shape=SHAPE,
                       preprocessing=Preprocessing(resize=32, crop=32))
    described = describe(build(describe(Little(), SHAPE)), SHAPE)
    layers = {node.name: "int8: static" if int8 else "float32: not quantized" for node in layers_of(network(False))}
    measured = {"correct": 1, "images": 2, "accuracy": 0.5, "latency_ms": 1.0, "latency_p5_ms": 1.0, "latency_p95_ms": 1.0}
    folder = tmp_path / "package"

    def write(layers: dict[str, str]) -> None:
        FormatPackage(architecture=described, card=card, name="little", measured=measured, format="openvino",
                      files=converted("openvino", int8), scheme="static_int8" if int8 else "none",
                      layers=layers).write(folder)

    write(layers)
    files = read_submission(folder)
    assert [path.name for path in files.data_files] == ["compressed_little.bin"]
    assert files.counted["data_beside_the_weights"] == (folder / "compressed_little.bin").stat().st_size
    runtime = open_here(files, preferred_backend(files), 1)
    expected = on_onnxruntime(model, precise=True)
    assert float((torch.from_numpy(runtime(images(4))) - expected).abs().max()) < 0.02 * float(expected.abs().max())
    card_text = (folder / "README.md").read_text()
    assert "| format | OpenVINO IR |" in card_text and 'openvino.compile_model("compressed_little.xml"' in card_text
    shutil.rmtree(folder)
    write({**layers, "fc": "float32: claimed"})
    if int8:
        with pytest.raises(VerificationError, match=r"is not what the layers are \(fc\)"):
            open_here(read_submission(folder), "openvino", 1)
