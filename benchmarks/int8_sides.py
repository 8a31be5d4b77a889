"""The sides of the int8 benchmark: float backends, the int8 of other libraries and ours, each ready to call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from architectures.architecture import Architecture
from architectures.describe import describe
from compress.evaluation.onnx_runtimes import compile_for_openvino, import_openvino
from compress.packaging.export import export
from compress.quantization.dynamic import as_graph, quantize
from compress.quantization.static import Calibration, StaticSettings, quantize_static
from loaders.splits import Splits

CALIBRATION = 64  # images

Call = Callable[[Tensor], Tensor]


@dataclass(kw_only=True)
class Subject:
    """A network to measure: the graph, images for calibration and, for a trained network, its data set."""

    name: str
    model: nn.Module
    images: Tensor  # (N, C, H, W) float32, normalized, from the training split
    splits: Splits | None = None
    chosen: Path | None = None  # the static int8 file that the search of a run chose
    folder: Path = field(default_factory=Path)
    threads: int = 1

    def graph(self) -> tuple[fx.GraphModule, Architecture]:
        """The architecture of the network."""
        channels, height, width = self.images.shape[1:]
        graph = as_graph(self.model, (channels, height, width))
        return graph, describe(graph, (channels, height, width))

    def onnx_file(self) -> Path:
        """The float network as an ONNX file, written once."""
        path = self.folder / "float.onnx"
        if not path.exists():
            path.write_bytes(export(*self.graph())[0].SerializeToString())
        return path


# ---------------------------------------------------------------------------------------------------------- sides


def torch_bytes(model: nn.Module, folder: Path) -> int:
    """Return the size of the state dict as torch.save writes it."""
    path = folder / "weights.pth"
    torch.save(model.state_dict(), path)
    return path.stat().st_size


def torch_eager(subject: Subject) -> tuple[Call, int]:
    """PyTorch in eager mode."""
    return subject.model, torch_bytes(subject.model, subject.folder)


def torch_channels_last(subject: Subject) -> tuple[Call, int]:
    """PyTorch with channels last in memory."""
    model = copy.deepcopy(subject.model).to(memory_format=torch.channels_last)
    return (lambda x: model(x.contiguous(memory_format=torch.channels_last))), torch_bytes(model, subject.folder)


def torch_compiled(subject: Subject) -> tuple[Call, int]:
    """torch.compile with channels last, and frozen weights if possible."""
    model = copy.deepcopy(subject.model).to(memory_format=torch.channels_last)
    compiled = torch.compile(model)
    return (lambda x: compiled(x.contiguous(memory_format=torch.channels_last))), torch_bytes(model, subject.folder)


def on_onnxruntime(path: Path, threads: int) -> Call:
    """A file on ONNX Runtime's CPU provider."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def on_openvino(model: Any, threads: int, input_shape: Sequence[int]) -> Call:
    """A model or file on OpenVINO's CPU plugin, for batch 1."""
    compiled = compile_for_openvino(model.read_bytes() if isinstance(model, Path) else model, [1, *input_shape], threads)
    return lambda x: torch.from_numpy(next(iter(compiled(x.numpy()).values())))


def onnxruntime_float(subject: Subject) -> tuple[Call, int]:
    """The float file on ONNX Runtime."""
    path = subject.onnx_file()
    return on_onnxruntime(path, subject.threads), path.stat().st_size


def openvino_float(subject: Subject) -> tuple[Call, int]:
    """The float file on OpenVINO."""
    path = subject.onnx_file()
    return on_openvino(path, subject.threads, subject.images.shape[1:]), path.stat().st_size


def onnxruntime_dynamic(subject: Subject) -> tuple[Call, int]:
    """ONNX Runtime's dynamic quantization with its defaults."""
    from onnxruntime.quantization import quantize_dynamic
    path = subject.folder / "ort_dynamic.onnx"
    quantize_dynamic(str(subject.onnx_file()), str(path))
    return on_onnxruntime(path, subject.threads), path.stat().st_size


def onnxruntime_static(subject: Subject) -> tuple[Call, int]:
    """ONNX Runtime's static quantization with its defaults."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter([{"input": image[None].numpy()} for image in subject.images])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    path = subject.folder / "ort_static.onnx"
    quantize_static(str(subject.onnx_file()), str(path), Reader())
    return on_onnxruntime(path, subject.threads), path.stat().st_size


def nncf_static(subject: Subject) -> tuple[Call, int]:
    """NNCF's post-training quantization with its defaults, on OpenVINO."""
    openvino = import_openvino()
    import nncf
    model = openvino.Core().read_model(str(subject.onnx_file()))
    dataset = nncf.Dataset([image[None].numpy() for image in subject.images])
    quantized = nncf.quantize(model, dataset, subset_size=len(subject.images))
    path = subject.folder / "nncf.xml"
    openvino.save_model(quantized, str(path), compress_to_fp16=False)
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return on_openvino(quantized, subject.threads, subject.images.shape[1:]), size


def torchao_dynamic(subject: Subject) -> tuple[Call, int]:
    """torchao's int8 dynamic activations, int8 weights."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    model = copy.deepcopy(subject.model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model, torch_bytes(model, subject.folder)


def ours_dynamic(subject: Subject) -> tuple[Call, int]:
    """Our dynamic int8, as in the stage."""
    model, _ = quantize(subject.model, subject.images[:8])
    return model, torch_bytes(model, subject.folder)


def _static_file(subject: Subject) -> Path:
    if subject.chosen is not None:
        return subject.chosen
    path = subject.folder / "ours_static.onnx"
    if not path.exists():
        model, _ = export(*subject.graph())
        candidate = quantize_static(Calibration(model, subject.images.numpy(), subject.threads), StaticSettings())
        path.write_bytes(candidate.model.SerializeToString())
    return path


def ours_static_onnxruntime(subject: Subject) -> tuple[Call, int]:
    """Our static int8 on ONNX Runtime: the first settings of the search, or the choice of the search of a run."""
    path = _static_file(subject)
    return on_onnxruntime(path, subject.threads), path.stat().st_size


def ours_static_openvino(subject: Subject) -> tuple[Call, int]:
    """The same file on OpenVINO."""
    path = _static_file(subject)
    return on_openvino(path, subject.threads, subject.images.shape[1:]), path.stat().st_size


SIDES: dict[str, tuple[str, Callable[[Subject], tuple[Call, int]]]] = {  # name: kind, maker
    "PyTorch eager": ("torch float", torch_eager), "PyTorch channels last": ("torch float", torch_channels_last),
    "torch.compile": ("torch float", torch_compiled), "ONNX Runtime float": ("float", onnxruntime_float),
    "OpenVINO float": ("float", openvino_float), "ONNX Runtime dynamic": ("peer", onnxruntime_dynamic),
    "ONNX Runtime static": ("peer", onnxruntime_static), "NNCF on OpenVINO": ("peer", nncf_static),
    "torchao dynamic": ("peer", torchao_dynamic), "ours, dynamic": ("ours", ours_dynamic),
    "ours, static, ONNX Runtime": ("ours", ours_static_onnxruntime),
    "ours, static, OpenVINO": ("ours", ours_static_openvino)}
