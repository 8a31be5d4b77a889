"""Int8 for networks with attention: linear layers on tokens become integers, what is between them stays float."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from architectures.describe import Lowered, lower
from compress.packaging.export import export
from compress.quantization.dynamic import quantize_graph
from compress.quantization.static import Calibration, StaticSettings, quantize_static
from tests.packaging.test_export import SHAPE, Everything

IMAGES = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def lowered() -> Lowered:
    torch.manual_seed(0)
    return lower(Everything().eval(), SHAPE)


@pytest.mark.parametrize("operators", ["weighted", "sums", "all"])
def test_a_static_network_stays_near_the_float_one_for_any_number_of_images(operators: str, lowered: Lowered) -> None:
    graph = lowered.build()
    exported, _ = export(graph, lowered.architecture)
    expected = graph(IMAGES).detach().numpy()
    calibration = Calibration(model=exported, images=IMAGES.numpy())
    quantized = quantize_static(calibration, StaticSettings(operators=operators))  # type: ignore[arg-type]
    products = [node for node in quantized.model.graph.node if node.op_type == "MatMul"]
    stored = {tensor.name for tensor in quantized.model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    weights = {node.output[0] for node in quantized.model.graph.node if node.input[0] in stored}
    integer = [node for node in products if node.input[1] in weights]
    assert {node.name.rpartition(".")[0] for node in integer} == {"mixed", "tokens.qkv"} and len(products) == 6
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    runtime = onnxruntime.InferenceSession(quantized.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for count in (1, 8):
        got = runtime.run(None, {"input": IMAGES[:count].numpy()})[0]
        assert np.linalg.norm(got - expected[:count]) < 0.06 * np.linalg.norm(expected[:count])


def test_a_dynamic_network_stays_near_the_float_one(lowered: Lowered) -> None:
    graph = lowered.build()
    expected = graph(IMAGES).detach()
    quantized, rows = quantize_graph(graph, example_input=IMAGES[:1], choose=False)
    assert "tokens.qkv" in {row.layer for row in rows}
    for count in (1, 8):
        with torch.no_grad():
            assert torch.linalg.norm(quantized(IMAGES[:count]) - expected[:count]) < 0.06 * torch.linalg.norm(expected)
