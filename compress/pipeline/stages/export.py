"""Stage `export`: write the student as one ONNX file, and compare its answers with the network's on real images."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from pydantic import Field

from architectures.describe import carry_over, describe
from compress.evaluation.runtimes import answering, open_file
from compress.packaging.export import OPSET, check_same, export
from compress.pipeline.stage import Context, ONNX, OnnxModel, Sketch, Stage, TorchModel
from loaders.images import normalize


class Export(Stage):
    """ONNX with BatchNorm folded; an error if the file's answers differ from the network's."""

    history = "onnx_export"

    images: int = Field(256, ge=1, description="number of validation images to compare the file with the network on")

    def check(self, sketch: Sketch) -> None:
        sketch.refuse_int8("export")
        if sketch.model is not None:
            model, _ = export(sketch.model, describe(sketch.model, sketch.card.input_shape))
            sketch.lines.append(f"{len(model.graph.node)} operators, opset {OPSET}")
        sketch.is_onnx = True

    def run(self, model: TorchModel, context: Context) -> OnnxModel:
        module, card = copy.deepcopy(model.module).cpu().eval(), context.splits.card
        exported, architecture = export(module, model.architecture)
        content = exported.SerializeToString()
        split = context.splits.validation
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            path = Path(folder) / ONNX
            path.write_bytes(content)
            answer = answering(open_file(path, card.input_shape, card.preprocessing))
            expected, got = [], []
            for ids in split.sample(self.images, context.seed).split(32):
                images = normalize(split.images.batch(ids).cpu(), card.preprocessing)
                expected.append(module(images))
                got.append(answer(images))
        found = check_same(torch.cat(expected), torch.cat(got))
        context.note("opset", OPSET)
        context.note("agreement", found)
        context.tracker.say(f"  {len(exported.graph.node)} operators, opset {OPSET}; on {found['images']} validation "
                            f"images logits differ by at most {found['largest_difference']:.2g} "
                            f"(largest logit {found['largest_logit']:.3g})")
        steps = [*architecture.compression_steps, self.history]
        return OnnxModel(content, carry_over(architecture, architecture, compression_steps=steps))
