"""Stage `quantize_dynamic`: int8 weights, activations quantized at run time, for every Conv2d and Linear."""

from __future__ import annotations

import copy
import dataclasses
from typing import Literal

from pydantic import Field

from architectures.describe import carry_over, describe
from architectures.kernels import why_not_int8
from compress.pipeline.stage import CompressingStage, Context, Sketch, TorchModel
from compress.quantization.dynamic import quantize_graph
from compress.quantization.int8_table import print_int8_table
from compress.quantization.weights import DEFAULT_FORM, WeightForm
from metadata.machine import torch_threads

EXAMPLES = 8  # training images to measure layers on


class QuantizeDynamic(CompressingStage):
    """Dynamic int8."""

    history = "dynamic_quantization"

    exclude: list[str] = Field([], description="layers that keep float weights, by name")
    weights: WeightForm = Field(DEFAULT_FORM, description="pair: 8-bit weights whose sums of two products fit in 16 bits, "
                                "so that CPUs without VNNI compute exactly; 8-bit: all 8 bits; 7-bit: all but one bit")
    arithmetic: Literal["measured", "int8"] = Field(
        "measured", description="measured: a layer that is faster in float32 on this machine computes in float32 from int8 "
                                "weights; int8: all layers compute in int8, and two runs write the same file")

    def check(self, sketch: Sketch) -> None:
        sketch.refuse_int8("quantize_dynamic")
        if sketch.model is not None:
            sketch.model, rows = quantize_graph(sketch.model, self.exclude, weights=self.weights)
            int8 = sum(row.dtype == "int8" for row in rows)
            sketch.lines.append(f"{int8} of {len(rows)} layers to int8")

    def run(self, model: TorchModel, context: Context) -> TorchModel:
        examples = context.examples(EXAMPLES)
        with torch_threads(1):
            quantized, rows = quantize_graph(copy.deepcopy(model.module).cpu(), self.exclude, examples,
                                             choose=self.arithmetic == "measured", weights=self.weights)
        print_int8_table(rows, context.tracker.console)
        weights_only = sum(row.reason.startswith("weights only") for row in rows)
        int8 = sum(row.dtype == "int8" for row in rows)
        context.tracker.say(f"  {int8} of {len(rows)} layers are int8" + (
            f", {weights_only} of them for their weights alone" if weights_only else ""))
        if reason := why_not_int8(quantized):
            context.warn(f"on this machine the int8 layers compute in float32, with the same results to rounding: {reason}")
        if weights_only == int8:
            context.warn("int8 arithmetic makes no layer of this network faster on this machine: only the file is smaller")
        context.note("coverage", [dataclasses.asdict(row) for row in rows])
        steps = [*model.architecture.compression_steps, self.history]
        architecture = carry_over(describe(quantized, model.architecture.input_shape), model.architecture,
                                  compression_steps=steps)
        return TorchModel(quantized, architecture)
