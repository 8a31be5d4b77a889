"""LiteRT files, `.tflite`: one image a call as (1, H, W, C), written from the ONNX file with the same integers."""

from __future__ import annotations

import onnx

from compress.packaging.formats.base import ExportFormat
from compress.packaging.litert.operators import check_litert, write_litert

USAGE = """    from ai_edge_litert.interpreter import Interpreter
    network = Interpreter("{file}")
    network.allocate_tensors()
    network.set_tensor(network.get_input_details()[0]["index"], images)  # (1, H, W, C) float32, preprocessed
    network.invoke()
    logits = network.get_tensor(network.get_output_details()[0]["index"])  # (1, classes)
"""


def _convert(model: onnx.ModelProto) -> dict[str, bytes]:
    return {".tflite": write_litert(model)}


FORMAT = ExportFormat(title="LiteRT", modules={"ai_edge_litert": "ai-edge-litert", "flatbuffers": "flatbuffers"},
                      suffix=".tflite", check=check_litert, convert=_convert, requirements="ai-edge-litert>=2.1\n",
                      usage=USAGE)
