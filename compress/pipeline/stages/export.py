"""Stage `export`: write the student as one ONNX file or for another runtime, and compare answers on real images."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field

from architectures.describe import carry_over, describe
from compress.packaging.export import OPSET, check_same, export
from compress.packaging.formats.base import ONNX_FORMAT, export_format, format_module
from compress.pipeline.conversion import answers, converted, served_answer
from compress.pipeline.stage import Context, OnnxModel, Sketch, Stage, TorchModel
from metadata.errors import UserError


class Export(Stage):
    """ONNX with BatchNorm folded, or another format; an error if the file's answers differ from the network's."""

    history = "onnx_export"

    format: Literal["onnx", "executorch", "litert", "openvino", "torch_export"] = Field(
        "onnx", description="what is measured and packaged from here on; quantize_static keeps it")
    images: int = Field(256, ge=1, description="number of validation images to compare the file with the network on")

    def modules(self) -> list[str]:
        return [] if self.format == ONNX_FORMAT else [format_module(self.format)]

    def check(self, sketch: Sketch) -> None:
        sketch.refuse_int8("export")
        if sketch.is_onnx and self.format == sketch.format:
            raise UserError(f"export.format {self.format}: the model has this format already; give another one, or take "
                            "the second export out")
        kind = None if self.format == ONNX_FORMAT else export_format(self.format)
        if sketch.model is not None:
            model, _ = export(sketch.model, describe(sketch.model, sketch.card.input_shape))
            if kind:
                kind.check(model)
            served = f", as {kind.title}" if kind else ""
            sketch.lines.append(f"{len(model.graph.node)} operators, opset {OPSET}{served}")
        sketch.is_onnx, sketch.format = True, self.format

    def run(self, model: TorchModel | OnnxModel, context: Context) -> OnnxModel:
        if isinstance(model, OnnxModel):
            plain = model.card.model_copy(update={"format": ONNX_FORMAT, "suffixes": []})
            return converted(OnnxModel(content=model.content, architecture=model.architecture, card=plain), self.format,
                             context, self.images)
        module = copy.deepcopy(model.module).cpu().eval()
        network, architecture = export(module, model.architecture)
        steps = [*architecture.compression_steps, self.history]
        result = OnnxModel(content=network.SerializeToString(),
                           architecture=carry_over(architecture, architecture, compression_steps=steps))
        expected = answers(module, context, self.images)
        with tempfile.TemporaryDirectory() as folder:
            found = check_same(expected, answers(served_answer(result, Path(folder), context), context, self.images))
        context.note("opset", OPSET)
        context.note("agreement", found)
        context.tracker.say(f"  {len(network.graph.node)} operators, opset {OPSET}; on {found['images']} validation "
                            f"images logits differ by at most {found['largest_difference']:.2g} "
                            f"(largest logit {found['largest_logit']:.3g})")
        return converted(result, self.format, context, self.images, expected)
