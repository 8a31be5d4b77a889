"""Int8 against float and the peers' int8: latency, size and, for trained networks, accuracy, in one interleaved run.

    python -m benchmarks.int8 [--models resnet18 mobilenet_v2 efficientnet_b0] [--threads 1]
    python -m benchmarks.int8 --trained runs/NAME/04-finetune --dataset cifar10 --data_root DIR

Writes benchmarks/results/int8.json, .md and, where accuracies were measured, .png; other networks' rows that are there
already are kept. torchvision's networks have random weights here (batch norms set by random images): their time and size do
not depend on them, and nothing is said of their accuracy. A trained network is a stage's folder of a run; its test split is
opened once.

Peers: pip install -r benchmarks/requirements-peers.txt; one that is not installed is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, fx, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from architectures.describe import describe
from compress.export import export
from compress.quantization import as_graph, quantize, without_stochastic_depth
from compress.static_quantization import Calibration, Settings, build
from loaders import load
from loaders.arrays import Request, Splits
from loaders.augment import examples
from metadata.files import write_figure
from model_loader import (Architecture, UserError, compile_for_openvino, first_line, import_openvino, machine,
                          measure_accuracy, open_model, read_json, versions, write_atomically, write_json)

MODELS = ("resnet18", "mobilenet_v2", "efficientnet_b0")
CALIBRATION = 64  # images
ROUNDS, CALLS = 15, 6  # timed: every side has ROUNDS turns of CALLS calls

Call = Callable[[Tensor], Tensor]


@dataclass
class Subject:
    """A network to be served: the graph, some images to calibrate with, and where its accuracy is measured, if it is."""

    name: str
    model: nn.Module
    images: Tensor  # (N, C, H, W) float32, normalised, of the training split
    splits: Splits | None = None
    folder: Path = field(default_factory=Path)
    threads: int = 1

    def graph(self) -> tuple[fx.GraphModule, Architecture]:
        """The network in the layer table."""
        channels, height, width = self.images.shape[1:]
        graph = as_graph(without_stochastic_depth(self.model), (channels, height, width))
        return graph, describe(graph, (channels, height, width), self.name)

    def onnx_file(self) -> Path:
        """The float network as ONNX, written once."""
        path = self.folder / f"{self.name}.onnx"
        if not path.exists():
            path.write_bytes(export(*self.graph())[0].SerializeToString())
        return path


# ---------------------------------------------------------------------------------------------------------- sides


def torch_bytes(model: nn.Module, folder: Path) -> int:
    """The size of the state dict as torch.save writes it."""
    path = folder / "weights.pth"
    torch.save(model.state_dict(), path)
    return path.stat().st_size


def torch_eager(subject: Subject) -> tuple[Call, int]:
    """PyTorch as it is."""
    return subject.model, torch_bytes(subject.model, subject.folder)


def torch_channels_last(subject: Subject) -> tuple[Call, int]:
    """PyTorch with channels last in memory."""
    model = copy.deepcopy(subject.model).to(memory_format=torch.channels_last)
    return (lambda x: model(x.contiguous(memory_format=torch.channels_last))), torch_bytes(model, subject.folder)


def torch_compiled(subject: Subject) -> tuple[Call, int]:
    """torch.compile, channels last, weights frozen into the code where it can."""
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
    """Our dynamic int8, as the stage makes it."""
    model, _ = quantize(subject.model, subject.images[:8])
    return model, torch_bytes(model, subject.folder)


def _static_file(subject: Subject) -> Path:
    path = subject.folder / "ours_static.onnx"
    if not path.exists():
        model, _ = export(*subject.graph())
        candidate = build(Calibration(model, subject.images.numpy(), subject.threads), Settings())
        path.write_bytes(candidate.model.SerializeToString())
    return path


def ours_static_onnxruntime(subject: Subject) -> tuple[Call, int]:
    """Our static int8 with the settings that the search begins with, on ONNX Runtime."""
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


# ------------------------------------------------------------------------------------------------------- measuring


def measure(subject: Subject, sides: Sequence[str], test_images: int | None) -> dict[str, dict[str, Any]]:
    """A row for each side: its kind, bytes, milliseconds, and accuracy where there are labels; or why there is none."""
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    image = subject.images[:1].contiguous()
    for side in sides:
        kind, make = SIDES[side]
        rows[side] = {"kind": kind}
        try:
            calls[side], rows[side]["bytes"] = make(subject)
            with torch.no_grad():
                for _ in range(3):
                    calls[side](image)
        except ImportError as error:
            rows[side]["left_out"] = f"not installed ({error.name})"
        except (RuntimeError, ValueError, UserError, NotImplementedError) as error:
            rows[side]["left_out"] = f"fails: {first_line(error)[:120]}"
        if "left_out" in rows[side]:
            calls.pop(side, None)
        print(f"  {side}: {rows[side].get('left_out', 'ready')}", flush=True)
    taken: dict[str, list[float]] = {side: [] for side in calls}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for side, call in calls.items():
                call(image)  # the caches are another side's
                for _ in range(CALLS):
                    start = time.perf_counter_ns()
                    call(image)
                    taken[side].append((time.perf_counter_ns() - start) / 1e6)
    floats = {kind: min((statistics.median(taken[side]) for side in calls if kind in SIDES[side][0]), default=float("nan"))
              for kind in ("torch float", "float")}
    for side, values in taken.items():
        p5, median, p95 = np.percentile(values, [5, 50, 95])
        rows[side] |= {"latency_ms": {"median": round(median, 3), "p5": round(p5, 3), "p95": round(p95, 3),
                                      "n": len(values)},
                       "over_best_torch_float": round(median / floats["torch float"], 3),
                       "over_best_float": round(median / floats["float"], 3)}
    if subject.splits is not None:
        split, preprocessing = subject.splits.open_test(), subject.splits.card.preprocessing
        for side, call in calls.items():
            ids = torch.arange(min(len(split), test_images or len(split)))
            result = measure_accuracy(call, split.batches(1, ids), preprocessing, len(ids))
            rows[side]["accuracy"] = {"correct": result.correct, "images": result.total}
            print(f"  {side}: {result.correct}/{result.total}", flush=True)
    return rows


def random_subject(name: str, folder: Path, threads: int) -> Subject:
    """A torchvision network with random weights, whose batch norms random images have set."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, 224, 224))
    return Subject(name, model.eval(), torch.randn(CALIBRATION, 3, 224, 224), None, folder, threads)


def trained_subject(stage: Path, dataset: str, data_root: Path, folder: Path, threads: int) -> Subject:
    """A stage's model of a run, calibrated on training images."""
    architecture = read_json(stage / "architecture.json", Architecture)
    model = open_model(architecture, stage / "weights.pth")
    splits = load(Request(dataset, data_root))
    images = examples(splits, CALIBRATION * 4)
    return Subject(f"{architecture.model_type}, {splits.card.name}", model, images, splits, folder, threads)


# ---------------------------------------------------------------------------------------------------------- output


def markdown(result: dict[str, Any]) -> str:
    """The tables, one a network."""
    where = result["machine"]
    parts = [f"# Int8 side by side\n\n{where['cpu']} ({', '.join(where['flags'])}), {result['threads']} thread(s), batch "
             "1. "
             "Medians of calls in turns; the ratios are to the best float time of PyTorch and of any runtime in the same "
             "run.\n"]
    for name, rows in result["models"].items():
        trained = any("accuracy" in row for row in rows.values())
        parts.append(f"\n## {name}\n")
        parts.append("| | ms | p5 to p95 | to PyTorch | to any float | MB |" + (" accuracy |" if trained else ""))
        parts.append("|---|---|---|---|---|---|" + ("---|" if trained else ""))
        for side, row in rows.items():
            if "left_out" in row:
                parts.append(f"| {side} | {row['left_out']} | | | | |" + (" |" if trained else ""))
                continue
            times = row["latency_ms"]
            accuracy = row.get("accuracy")
            parts.append(f"| {side} | {times['median']:.2f} | {times['p5']:.2f} to {times['p95']:.2f} | "
                         f"{row['over_best_torch_float']:.2f} | {row['over_best_float']:.2f} | {row['bytes'] / 2**20:.2f} |"
                         + (f" {accuracy['correct'] / accuracy['images']:.2%} |" if accuracy else ""))
    return "\n".join(parts) + "\n"


def draw(path: Path, result: dict[str, Any]) -> None:
    """Accuracy against latency, a panel a trained network."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    trained = {name: rows for name, rows in result["models"].items() if any("accuracy" in row for row in rows.values())}
    if not trained:
        return
    colours = {"torch float": "C7", "float": "C0", "peer": "C1", "ours": "C2"}
    figure, axes = plt.subplots(1, len(trained), figsize=(7 * len(trained), 5), layout="constrained", squeeze=False)
    for axis, (name, rows) in zip(axes[0], trained.items(), strict=True):
        for side, row in rows.items():
            if "accuracy" not in row:
                continue
            point = row["latency_ms"]["median"], 100 * row["accuracy"]["correct"] / row["accuracy"]["images"]
            axis.scatter(*point, color=colours[row["kind"]], s=40)
            axis.annotate(side, point, textcoords="offset points", xytext=(5, 3), fontsize=8)
        axis.set(xlabel="milliseconds an image, batch 1", ylabel="test accuracy (%)", title=name, xscale="log")
        axis.grid(alpha=0.3, which="both")
    write_figure(path, figure)


def main() -> int:
    """Measures, writes, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=None, help=f"of torchvision; {' '.join(MODELS)} unless --trained")
    parser.add_argument("--trained", type=Path, nargs="*", default=[], help="stages' folders of runs")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data_root", type=Path, help="of --trained")
    parser.add_argument("--test_images", type=int, help="of --trained: so many instead of all")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), metavar="SIDE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "int8")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = arguments.output.with_suffix(".json")
    before = json.loads(path.read_text()) if path.is_file() else {}
    same = before.get("threads") == arguments.threads and before.get("machine") == machine()
    result: dict[str, Any] = {"schema": 1, "threads": arguments.threads, "machine": machine(), "versions": versions(),
                              "models": before["models"] if same else {}}
    names = arguments.models if arguments.models is not None else [] if arguments.trained else list(MODELS)
    for source in (*names, *arguments.trained):
        with tempfile.TemporaryDirectory() as folder:
            subject = random_subject(source, Path(folder), arguments.threads) if isinstance(source, str) else (
                trained_subject(source, arguments.dataset, arguments.data_root, Path(folder), arguments.threads))
            print(subject.name, flush=True)
            result["models"][subject.name] = measure(subject, arguments.sides, arguments.test_images)
        write_json(path, result)
        write_atomically(path.with_suffix(".md"), markdown(result).encode())
        draw(path.with_suffix(".png"), result)
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
