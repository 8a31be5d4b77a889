"""The writer of `.tflite` files: float networks answer as in torch, int8 ones as ONNX Runtime's exact integers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

from architectures.describe import lower
from compress.evaluation.litert_files import read_litert
from compress.evaluation.runtimes import answering, open_file
from compress.packaging.export import check_same, export
from compress.packaging import onnx_in_torch
from compress.packaging.litert.operators import OPERATORS, check_litert, write_litert
from compress.pipeline.stage import TorchModel
from compress.quantization.static import Calibration, quantize_static, StaticSettings
from loaders.images import read_images
from loaders.listing import list_images
from metadata.errors import UserError
from metadata.files import read_json
from metadata.schemas import METADATA_FILE, ModelMetadata, Preprocessing
from tests.helpers.qdq import run
from tests.helpers.static_int8 import float_file, images
from tests.packaging.test_export import everything, some

pytest.importorskip("ai_edge_litert")


def on_litert(model: onnx.ModelProto, inputs: Tensor, folder: Path) -> Tensor:
    path = folder / "model.tflite"
    path.write_bytes(write_litert(model))
    channels, height, width = inputs.shape[1:]
    return answering(open_file(path, (channels, height, width), Preprocessing()))(inputs)


def test_every_layer_type_answers_as_in_torch(tmp_path: Path) -> None:
    graph, architecture = everything()  # the test of the ONNX export holds it to the whole layer table
    exported, _ = export(graph, architecture)
    with torch.no_grad():
        found = check_same(graph(some()), on_litert(exported, some(), tmp_path), 1e-4)
    assert found["images"] == 4 and found["largest_logit"] > 0.05


def test_the_operators_are_those_that_layers_write() -> None:
    written = {node.op_type for node in export(*everything())[0].graph.node} | {"GlobalMaxPool"}  # of one size of a pool
    assert set(OPERATORS) == written - {"Shape"} and set(onnx_in_torch.OPERATORS) == written


class Block(nn.Module):
    """What a ConvNeXt is made of: its permutations are between (N, C, H, W) and (N, H, W, C), as images lie in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(3, 3, 7, padding=3, groups=3), nn.LayerNorm(3)
        self.wide, self.narrow = nn.Linear(3, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        inside = self.narrow(nn.functional.gelu(self.wide(inside))).permute(0, 3, 1, 2)
        return (x + inside).mean((2, 3))


def test_permutations_of_images_move_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lowered = lower(Block().eval(), (3, 16, 16))
    exported, _ = export(lowered.build(), lowered.architecture)
    on_litert(exported, some(), tmp_path)
    kinds = {operator.name for operator in read_litert(tmp_path / "model.tflite", (3, 16, 16)).operators}
    assert "GELU" in kinds and "DEPTHWISE_CONV_2D" in kinds and not {"TRANSPOSE", "DIV"} & kinds


class Sums(nn.Module):
    """What becomes integer: convolutions of all kinds, sums, pools, concatenation, a matrix product, odd paddings."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU6())
        self.depthwise, self.grouped = nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.wide = nn.Conv2d(16, 32, 3, groups=16, padding=2, dilation=2)
        self.pool, self.average = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 32, 1), nn.Hardsigmoid())
        self.leaky = nn.LeakyReLU(0.1)
        self.rows, self.fc = nn.Linear(4, 6), nn.Linear(32 * 4 * 6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.depthwise(x) + self.grouped(x))
        x = self.leaky(self.pool(self.wide(x)))
        x = self.average(torch.cat([x * self.gate(x), x], 1))[:, 8:40]
        return self.fc(torch.relu(self.rows(x)).flatten(1))


@pytest.fixture(scope="module")
def sums() -> Calibration:
    torch.manual_seed(0)
    return Calibration(float_file(Sums())[0], images())


@pytest.mark.parametrize(("settings", "most"), [
    (StaticSettings(), 1), (StaticSettings(operators="weighted", float_ends=True), 0),
    (StaticSettings(operators="all"), 2), (StaticSettings(operators="all", activations="int8", weights="7-bit"), 2)],
    ids=str)
def test_int8_is_the_same_integers(settings: StaticSettings, most: int, sums: Calibration, tmp_path: Path) -> None:
    """The same but for averages, gates and leaky activations, whose kernels round in another way: by a step or two."""
    model = quantize_static(sums, settings).model
    inputs = images(24, seed=7)
    expected, got = run(model, inputs), on_litert(model, torch.from_numpy(inputs), tmp_path).numpy()
    step = 1e-6 if settings.float_ends else np.diff(np.unique(expected)).min()
    assert np.abs(got - expected).max() < (most + 0.5) * step
    assert (got.argmax(1) == expected.argmax(1)).mean() >= 0.95


class Plain(nn.Module):
    """A residual network as it is mostly built: every layer of it has the same integer arithmetic in both runtimes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.two, self.fc = nn.Conv2d(16, 16, 1), nn.Linear(16 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.two(nn.functional.relu6(self.one(x))))
        return self.fc(nn.functional.max_pool2d(x, 2).flatten(1))


def test_a_residual_network_in_int8_is_identical(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantize_static(Calibration(float_file(Plain())[0], images()), StaticSettings()).model
    inputs = images(24, seed=7)
    expected, got = run(model, inputs), on_litert(model, torch.from_numpy(inputs), tmp_path).numpy()
    assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max()
    kinds = [operator.name for operator in read_litert(tmp_path / "model.tflite", (3, 32, 32)).operators]
    assert kinds.count("QUANTIZE") == kinds.count("DEQUANTIZE") == 1, kinds  # the ends alone


def test_a_students_answers_on_real_digits(small_run: Path, submission: Path, digits_test: Path, tmp_path: Path) -> None:
    student = TorchModel.load(small_run / "04-finetune")
    metadata: ModelMetadata = read_json(submission / METADATA_FILE, ModelMetadata)
    pixels = read_images([path for path, _ in list_images(digits_test).images], metadata.preprocessing)
    exported, _ = export(student.module.eval(), student.architecture)
    with torch.no_grad():
        check_same(student.module(torch.from_numpy(pixels)), on_litert(exported, torch.from_numpy(pixels), tmp_path), 1e-4)
    int8 = quantize_static(Calibration(exported, pixels[::4]), StaticSettings()).model
    expected, got = run(int8, pixels), on_litert(int8, torch.from_numpy(pixels), tmp_path).numpy()
    assert len(pixels) > 300 and (got.argmax(1) == expected.argmax(1)).mean() >= 0.995


def test_an_operator_without_a_form_is_named_with_its_layer() -> None:
    graph = helper.make_graph(
        [helper.make_node("LRN", ["input"], ["output"], name="features.norm1", size=3)], "one",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["N", 3, 8, 8])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    with pytest.raises(UserError, match=r"node features\.norm1: LRN: no operator of a \.tflite file does that"):
        check_litert(model)


def test_a_runtime_that_is_not_installed_says_so(sums: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert.schema_py_generated", None)
    with pytest.raises(UserError, match=r"are not installed; pip install ai-edge-litert flatbuffers"):
        check_litert(sums.model)
