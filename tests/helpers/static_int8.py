"""Networks for static int8 as ONNX files, and their answers on each runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from architectures.build import build
from architectures.describe import describe
from architectures.zoo import make
from compress.evaluation.runtimes import answering, open_file
from compress.packaging.export import export
from compress.quantization.static import Calibration
from metadata.schemas import Preprocessing

SHAPE = (3, 32, 32)
BACKENDS = ("onnxruntime", "openvino")


def images(count: int = 32, seed: int = 1) -> np.ndarray:
    """Return images of noise, (N, 3, 32, 32)."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)).numpy()


def float_file(model: nn.Module) -> tuple[onnx.ModelProto, torch.fx.GraphModule]:
    """Return the model with batch norms that have seen something, as ONNX and as a graph."""
    with torch.no_grad():
        for _ in range(5):
            model.train()(torch.randn(16, *SHAPE))
    graph = build(describe(model.eval(), SHAPE))
    graph.load_state_dict(model.state_dict())
    return export(graph.eval(), describe(graph, SHAPE))[0], graph


def calibrated(name: str) -> tuple[Calibration, torch.fx.GraphModule]:
    """Return "slim", a narrow ResNet18, or "mobile", MobileNetV2, with random weights."""
    torch.manual_seed(0)
    file, graph = float_file(make("slim_resnet18", num_classes=10, width=16, stem="small") if name == "slim"
                             else make("torchvision:mobilenet_v2", num_classes=10))
    return Calibration(file, images()), graph


def answers(model: onnx.ModelProto, inputs: np.ndarray, folder: Path, backend: str = "onnxruntime") -> Tensor:
    """Return the logits that a runtime serves; the file stays in the folder."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return answering(open_file(path, SHAPE, Preprocessing(), backend))(torch.from_numpy(inputs))


def exact(graph: torch.fx.GraphModule, inputs: np.ndarray) -> Tensor:
    """Return the float network's logits."""
    with torch.no_grad():
        return graph(torch.from_numpy(inputs))


def on_onnxruntime(model: onnx.ModelProto, precise: bool = False, literal: bool = False) -> Tensor:
    """Return logits of four images: by 8-bit kernels, exact integer sums, or the QDQ nodes as they stand, in float32."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.add_session_config_entry("session.x64quantprecision", str(int(precise)))
    if literal:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": images(4)})[0])


class Planes(nn.Module):
    """A linear layer on rows of planes, which is a MatMul in ONNX, with as many inputs as outputs and with fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.flatten, self.square = nn.Conv2d(3, 6, 8, stride=8), nn.Flatten(2), nn.Linear(16, 16)
        self.mixed, self.rows, self.t5 = nn.Linear(16, 12), nn.Flatten(), nn.Linear(72, 5)
        self.n3 = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.square(self.flatten(torch.relu(self.conv(self.n3(x)))))
        return self.t5(self.rows(torch.relu(self.mixed(x))))
