"""OpenVINO's intermediate representation (IR): a graph in an `.xml` file, its numbers in a `.bin` file beside it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from compress.evaluation.onnx_runtimes import import_openvino
from compress.evaluation.openvino_files import compact_graph
from compress.packaging.formats.base import ExportFormat
from metadata.errors import UserError, first_line

USAGE = """    import openvino
    compiled = openvino.compile_model("{file}", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
    logits = compiled(images)[0]  # (N, C, H, W) float32, preprocessed, to (N, classes)
"""


def write_openvino(model: onnx.ModelProto) -> dict[str, bytes]:
    """Return the graph and its numbers, in full precision.

    Raises:
        UserError: OpenVINO has no form for an operator.
    """
    openvino = import_openvino()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        try:
            converted = openvino.convert_model(path)
        except RuntimeError as error:
            raise UserError(f"export.format openvino: OpenVINO cannot convert the network: {first_line(error)}") from error
        graph = path.with_suffix(".xml")
        openvino.save_model(converted, graph, compress_to_fp16=False)  # half precision would change the answers
        return {".xml": compact_graph(graph), ".bin": graph.with_suffix(".bin").read_bytes()}


def _check(model: onnx.ModelProto) -> None:
    write_openvino(model)


FORMAT = ExportFormat(title="OpenVINO IR", modules={"openvino": "openvino"}, suffix=".xml", check=_check,
                      convert=write_openvino, requirements="openvino>=2024.6\n", usage=USAGE)
