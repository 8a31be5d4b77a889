"""Stage `quantize_static`: int8 with fixed ranges for ONNX Runtime and OpenVINO, chosen from many measured candidates."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from pydantic import Field
from rich import box
from rich.console import Console
from rich.table import Table

from architectures.describe import carry_over, describe
from compress.packaging.export import export
from compress.packaging.formats.base import ONNX_FORMAT
from compress.pipeline.conversion import converted
from compress.pipeline.stage import CompressingStage, Context, OnnxCard, OnnxModel, Sketch
from compress.quantization.candidates import Candidate, SearchRequest, SearchResult
from compress.quantization.int8_table import Int8Row, check_excluded, print_int8_table
from compress.quantization.layer_times import layer_times
from compress.quantization.saturation import Backend
from compress.quantization.search import AS_FAST, Search
from compress.quantization.static import Calibration, NOT_QUANTIZED, int8_rows, layers_of
from compress.quantization.weights import WeightForm
from compress.quantization.workbench import OnnxWorkbench
from metadata.errors import UserError, VerificationError
from metadata.files import write_atomically, write_json

BEST, CANDIDATES = "best_candidate.onnx", "candidates.json"  # files that a search without a good enough candidate leaves
EXAMPLES = 16  # calibration images to compare the layers' outputs on
IMAGES_IN_FORMAT = 256  # validation images to compare a file of another format than ONNX on


class QuantizeStatic(CompressingStage):
    """Static int8: try calibration methods and corrections, and choose by measured accuracy and latency."""

    history = "static_quantization"

    max_drop: float = Field(0.003, ge=0, lt=1, description="tolerated drop of validation accuracy from float, a fraction")
    backend: Literal["auto", "onnxruntime", "openvino"] = Field(
        "auto", description="the runtime to choose for and to serve on; auto: the faster of the installed ones")
    weights: Literal["auto", WeightForm] = Field(
        "auto", description="pair: 8 bits that no CPU's 16-bit sums saturate with; 7-bit: the same with half the levels; "
        "8-bit: may answer differently on CPUs without VNNI; auto: pair, and the others as candidates")
    portable: bool = Field(True, description="accept only a candidate that also keeps its accuracy on CPUs without VNNI")
    calibration_images: int = Field(512, ge=1, le=4096, description="number of training images to calibrate with")
    validation_images: int = Field(5000, ge=1, description="largest number of validation images to compare candidates on")
    budget_seconds: float = Field(900, gt=0, description="for the search; a step that has begun is finished")
    exclude: list[str] = Field([], description="layers that stay float, by the name of their ONNX node")

    def check(self, sketch: Sketch) -> None:
        if self.backend == "openvino" and not importlib.util.find_spec("openvino"):
            raise UserError("quantize_static.backend openvino: the package is not installed; pip install openvino")
        if sketch.is_static_int8:
            raise UserError("quantize_static: the model is int8 already; it needs the float one of stage export")
        sketch.is_static_int8 = True
        if sketch.model is not None:
            network, _ = export(sketch.model, describe(sketch.model, sketch.card.input_shape))
            names = [node.name for node in layers_of(network)]
            check_excluded("quantize_static", self.exclude, names)
            if set(self.exclude) >= set(names):
                raise UserError("quantize_static.exclude names all layers: nothing would become int8")
        sketch.lines.append(f"candidates on {' and '.join(self._backends(sketch.format))}, at most {self.max_drop:.2%} of "
                            "accuracy lost" + (f", then as {sketch.format}" if sketch.format != ONNX_FORMAT else ""))

    def _backends(self, served_as: str) -> list[Backend]:
        """Return the runtimes to choose for; for a format that runs on none of them, that with exact sums stands in."""
        if self.backend != "auto":
            return [self.backend]
        if served_as != ONNX_FORMAT:
            return ["openvino" if served_as == "openvino" else "onnxruntime"]
        return ["onnxruntime", "openvino"] if importlib.util.find_spec("openvino") else ["onnxruntime"]

    def run(self, model: OnnxModel, context: Context) -> OnnxModel:
        for name in (BEST, CANDIDATES):  # left by an earlier run
            (context.folder / name).unlink(missing_ok=True)
        images = context.examples(self.calibration_images).numpy()
        calibration = Calibration(onnx.load_model_from_string(model.content), images, torch.get_num_threads())
        request = SearchRequest(max_drop=self.max_drop, portable=self.portable, budget_seconds=self.budget_seconds,
                                exclude=tuple(self.exclude), weights=None if self.weights == "auto" else self.weights)

        def keep(candidates: list[Candidate]) -> None:
            write_atomically(context.folder / BEST, candidates[0].content)
            write_json(context.folder / CANDIDATES, [candidate.row() for candidate in candidates])

        with tempfile.TemporaryDirectory() as folder:
            workbench = OnnxWorkbench(calibration, context.splits.validation, self.validation_images,
                                      context.splits.card.preprocessing, folder=Path(folder))
            found = Search(workbench, request, self._backends(model.card.format), context.tracker.say, keep).run()
        rows = self._int8_rows(calibration, found)
        self._note(context, found, rows)
        steps = [*model.architecture.compression_steps, self.history]
        result = OnnxModel(
            content=found.best.content,
            architecture=carry_over(model.architecture, model.architecture, compression_steps=steps),
            card=OnnxCard(scheme="static_int8", layers={row.layer: f"{row.dtype}: {row.reason}" for row in rows},
                          backend=found.backend, portability=found.best.portability))
        if not found.reached:
            write_atomically(context.folder / BEST, found.best.content)
            write_json(context.folder / CANDIDATES, context.notes)
            assert found.best.portability is not None
            raise VerificationError(
                f"quantize_static: no candidate fulfils the request; the best one, {found.best.name}, has "
                f"{found.best.correct}/{found.images} right answers against the float model's {found.float_correct}, and "
                f"without VNNI {found.best.portability['verdict']}. The candidate is {context.folder / BEST}; {CANDIDATES} "
                "beside it lists all. Raise quantize_static.max_drop or budget_seconds, or set portable=false")
        if missed := [row.layer for row in rows if row.reason == NOT_QUANTIZED]:
            raise VerificationError(f"quantize_static: {', '.join(missed)} stayed float though int8 was requested; list "
                                    "them in quantize_static.exclude if they should stay float")
        result = converted(result, model.card.format, context, IMAGES_IN_FORMAT)
        for name in (BEST, CANDIDATES):
            (context.folder / name).unlink()
        return result

    def _int8_rows(self, calibration: Calibration, found: SearchResult) -> list[Int8Row]:
        """Return the table's rows: latencies on the chosen runtime, errors on ONNX Runtime, which shows every tensor."""
        image, threads = calibration.images[:1], 1
        before = layer_times(calibration.model, found.backend, image, threads)
        after = layer_times(found.best.quantized.model, found.backend, image, threads)
        ends = found.best.settings.ends([node.name for node in layers_of(calibration.model)])
        why = dict.fromkeys(found.best.kept_float, found.best.reason) | dict.fromkeys(
            ends, "first or last layer, float in this candidate") | dict.fromkeys(self.exclude, "excluded by the recipe")
        as_int8 = {name: ms for name, ms in after.items() if name not in why} | found.best.int8_ms
        times = {name: (before.get(name), as_int8.get(name)) for name in before.keys() | after.keys()}
        return int8_rows(calibration, found.best.quantized, calibration.images[:EXAMPLES], why, times)

    def _note(self, context: Context, found: SearchResult, rows: list[Int8Row]) -> None:
        """Print the tables, and note them for stage.json."""
        console, say = context.tracker.console, context.tracker.say
        _show_candidates(found, console)
        print_int8_table(rows, console)
        int8 = sum(row.dtype == "int8" for row in rows)
        say(f"  chosen: {found.best.name}, on {found.backend}; {int8} of {len(rows)} layers are int8, "
            f"{found.best.correct}/{found.images} against {found.float_correct} in float, "
            f"{found.best.milliseconds:.3f} ms against {found.float_ms:.3f}")
        assert found.best.portability is not None
        say(f"  without VNNI: {found.best.portability['verdict']}")
        if found.best.milliseconds > AS_FAST * found.float_ms:
            context.warn(f"quantize_static: int8 is slower here, {found.best.milliseconds:.3f} ms against "
                         f"{found.float_ms:.3f} in float; only the file becomes smaller")
        if found.failed:
            context.warn(f"quantize_static: {len(found.failed)} candidates could not be built or run: "
                         + "; ".join(f"{name}: {reason}" for name, reason in found.failed.items()))
        if found.not_tried:
            context.warn(f"quantize_static: no time was left for {len(found.not_tried)} candidates "
                         f"({'; '.join(found.not_tried)}); raise budget_seconds")
        context.note("candidates", [candidate.row() | {"chosen": candidate is found.best}
                                    for candidate in found.candidates])
        context.note("not_tried", found.not_tried)
        context.note("failed", found.failed)
        context.note("operators", found.latencies)
        context.note("float", {"correct": found.float_correct, "images": found.images, "latency_ms": found.float_ms})
        context.note("sensitivity", found.sensitivity)
        context.note("coverage", [dataclasses.asdict(row) for row in rows])


def _show_candidates(found: SearchResult, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("candidate", overflow="fold")
    for name in ("right", "ms", "kB"):
        table.add_column(name, justify="right")
    table.add_column("without VNNI")
    verdicts: dict[Any, str] = {None: "", True: "holds", False: "not shown to hold"}
    table.add_row("float", str(found.float_correct), f"{found.float_ms:.3f}", "", "")
    for candidate in found.candidates:
        holds = None if candidate.portability is None else candidate.portability["holds"]
        table.add_row(candidate.name, str(candidate.correct), f"{candidate.milliseconds:.3f}",
                      f"{len(candidate.content) / 1000:.0f}", verdicts[holds],
                      style="bold" if candidate is found.best else "")
    console.print(table)
