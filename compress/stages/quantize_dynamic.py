"""Stage `quantize_dynamic`: int8 weights, activations quantized at run time, for every Conv2d and Linear."""

from __future__ import annotations

import dataclasses

from pydantic import Field

from architectures.describe import carry_over, describe
from compress.quantization import quantize_dynamic
from compress.stage import Context, Sketch, Stage, TorchModel


class QuantizeDynamic(Stage):
    """Dynamic int8."""

    history = "dynamic_quantization"

    exclude: list[str] = Field([], description="layers that keep float weights, by name")

    def check(self, sketch: Sketch) -> None:
        sketch.refuse_int8("quantize_dynamic")
        if sketch.model is not None:
            sketch.model, coverage = quantize_dynamic(sketch.model, self.exclude)
            int8 = sum(row.dtype == "int8" for row in coverage)
            sketch.lines.append(f"{int8} of {len(coverage)} layers to int8")

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        quantized, coverage = quantize_dynamic(model.module.cpu(), self.exclude)
        floats = [f"{row.layer} stays float32 ({row.reason})" for row in coverage if row.dtype != "int8"]
        context.tracker.say(f"  {len(coverage) - len(floats)} of {len(coverage)} layers are int8" + "".join(
            f"; {text}" for text in floats))
        context.note("coverage", [dataclasses.asdict(row) for row in coverage])
        steps = [*model.architecture.compression_steps, self.history]
        architecture = carry_over(describe(quantized, model.architecture.input_shape), model.architecture,
                                  compression_steps=steps)
        return TorchModel(quantized, architecture)
