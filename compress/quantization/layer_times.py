"""The latency of each layer of an ONNX file on a runtime, measured by the runtime's profiler."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from architectures.onnx_files import may_saturate
from architectures.onnx_sessions import onnxruntime_options
from compress.evaluation.onnx_runtimes import compile_for_openvino
from compress.quantization.calibration import Images
from compress.quantization.static import layers_and_products

PASSES, WARMUP = 25, 3
ACTIVATIONS = {"Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish"}
# Suffixes that runtimes append to a node's name to name a fused kernel.
_SUFFIX = re.compile(r"(_kernel_time|_nchwc|_token_\d+|_quant|/WithoutBiases|/fq.*)$")


def layer_times(model: onnx.ModelProto, backend: str, image: Images, threads: int = 1) -> dict[str, float]:
    """Return the milliseconds of each layer at batch 1, including the operators fused into it; the median of the passes.

    A layer is left out if no kernel carries its name or its activation's name.

    Args:
        model: float, or int8 in QDQ form; a layer is identified by its node's name.
        backend: "onnxruntime" or "openvino".
        image: (1, C, H, W), preprocessed.
        threads: number of the runtime's threads.
    """
    owner = _owners(model)
    passes = (_on_onnxruntime if backend == "onnxruntime" else _on_openvino)(model, image, threads)
    taken: dict[str, list[float]] = {}
    for name, times in passes.items():
        while name not in owner and (shorter := _SUFFIX.sub("", name)) != name:
            name = shorter
        if name in owner and len(times) > WARMUP:
            taken.setdefault(owner[name], []).append(statistics.median(times[WARMUP:]))
    return {layer: round(sum(times), 4) for layer, times in taken.items()}


def _owners(model: onnx.ModelProto) -> dict[str, str]:
    """Return the layer for each name that a fused kernel can carry."""
    owner: dict[str, str] = {}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    layers = layers_and_products(model.graph)
    for node in layers:
        owner |= dict.fromkeys((node.name, node.output[0]), node.name)  # some kernels carry their output's name
        reading = readers.get(node.output[0], [])
        if len(reading) == 1 and reading[0].op_type in ACTIVATIONS:
            owner |= dict.fromkeys((reading[0].name, reading[0].output[0]), node.name)
    return owner


def _on_onnxruntime(model: onnx.ModelProto, image: Images, threads: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime_options(threads, may_saturate(model.graph))
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        for _ in range(WARMUP + PASSES):
            session.run(None, {model.graph.input[0].name: image})
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times.setdefault(event["name"], []).append(event["dur"] / 1000)
    return times


def _on_openvino(model: onnx.ModelProto, image: Images, threads: int) -> dict[str, list[float]]:
    compiled = compile_for_openvino(model.SerializeToString(), image.shape, threads, PERF_COUNT=True)
    request = compiled.create_infer_request()
    times: dict[str, list[float]] = {}
    for _ in range(WARMUP + PASSES):
        request.infer(image)
        for row in request.profiling_info:
            if row.status == row.Status.EXECUTED:
                times.setdefault(row.node_name, []).append(row.real_time.total_seconds() * 1000)
    return times
