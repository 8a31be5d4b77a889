"""Export to ONNX: every layer type answers as in torch, on both runtimes and read back, and a wrong file is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from architectures.architecture import Architecture
from architectures.counting import count_macs
from architectures.describe import describe, lower
from architectures.layers.table import LAYER_TABLE
from architectures.zoo import make
from architectures.onnx_files import read_onnx
from compress.evaluation.runtimes import answering, open_file
from compress.packaging.export import OPSET, check_same, export
from compress.packaging.onnx_in_torch import OnnxInTorch
from compress.quantization.dynamic import quantize_graph
from metadata.errors import UserError, VerificationError
from metadata.schemas import Preprocessing

SHAPE = (3, 16, 16)
BACKENDS = ("onnxruntime", "openvino", "read back into torch")


class Everything(nn.Module):
    """Every float layer type of the table in one small network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), nn.BatchNorm2d(8), nn.ReLU6())
        self.curves = nn.Sequential(nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.GELU(approximate="tanh"), nn.LeakyReLU(0.2),
                                    nn.Tanh(), nn.Identity(), nn.Dropout(0.5))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid(), nn.Sigmoid())
        self.norms = nn.Sequential(nn.GroupNorm(4, 16), nn.BatchNorm2d(16), nn.GroupNorm(2, 16, affine=False))
        self.pools = nn.Sequential(nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), nn.AvgPool2d(2, 1, padding=1),
                                   nn.AvgPool2d(3, 1, padding=1, count_include_pad=False), nn.AdaptiveMaxPool2d(3),
                                   nn.Conv2d(16, 16, 2))  # to 2x2
        self.average = nn.AdaptiveAvgPool2d((2, 1))
        self.flatten = nn.Flatten(2)
        self.mixed = nn.Linear(2, 3)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(48, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU())
        self.tokens = Tokens()
        self.fc = nn.Linear(16 + 16 + 16 + 8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        tokens = self.tokens(x)
        x = torch.cat([x, self.curves(self.depthwise(x) + x) * self.gate(x)], 1)
        x = self.pools(self.norms(x))
        hidden = self.hidden(self.mixed(self.flatten(self.average(x))))
        rows = x.mean(2).mean(2)
        return self.fc(torch.cat([hidden, x.mean((2, 3)), rows, tokens], 1))


class Tokens(nn.Module):
    """The layers of transformers, and those that move and combine numbers: (N, 8, H, W) -> (N, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.table, self.temperature = nn.Parameter(torch.randn(9, 2)), nn.Parameter(torch.zeros(2, 1, 1))
        self.register_buffer("index", torch.arange(25).reshape(5, 5) % 9, persistent=False)
        self.register_buffer("mean", torch.full((8, 1, 1), 0.1))
        self.pool, self.prelu, self.drop = nn.AdaptiveAvgPool2d(1), nn.PReLU(8), StochasticDepth(0.5, "row")
        self.larger, self.smooth = nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2, mode="bilinear")
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(nn.functional.pad(x, (0, 2, 2, 0)))
        x = self.prelu(self.larger(pooled) + self.smooth(pooled) - self.mean)
        x = torch.cat([self.token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + self.positions
        queries, keys, values = self.qkv(self.norm(x)).reshape(len(x), 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(5, 5, 2).permute(2, 0, 1)
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias[None])
        scores = nn.functional.normalize(queries, dim=-1) @ keys.transpose(-2, -1) * self.temperature.clamp(max=3).exp()
        x = x + self.drop((mixed + scores.softmax(-1) @ values * 0.5).transpose(1, 2).flatten(2))
        heights = x.amax(1) + x.pow(2).sum(1).sqrt() + torch.erf(x[:, 1]) + 1 / (1 + x[:, 2].exp())
        return heights.roll(3, 1)


def trained(model: nn.Module, shape: tuple[int, int, int] = SHAPE) -> tuple[fx.GraphModule, Architecture]:
    """The model as a graph, with norms that are not the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5, generator=generator)
    lowered = lower(model, shape)
    return lowered.build(), lowered.architecture


@functools.cache
def everything() -> tuple[fx.GraphModule, Architecture]:
    """`Everything` as a graph, always the same: do not change it."""
    torch.manual_seed(0)
    return trained(Everything())


def logits(content: onnx.ModelProto, images: Tensor, folder: Path, backend: str) -> Tensor:
    if backend == "read back into torch":
        return OnnxInTorch(content)(images)  # type: ignore[no-any-return]
    path = folder / "model.onnx"
    path.write_bytes(content.SerializeToString())
    return answering(open_file(path, (3, *images.shape[2:]), Preprocessing(), backend))(images)  # type: ignore[arg-type]


def some(shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_layer_type_answers_as_in_torch(backend: str, tmp_path: Path) -> None:
    graph, architecture = everything()
    used = {layer.type for layer in architecture.layers}
    assert used == {name for name, row in LAYER_TABLE.items() if not row.int8}  # a new type must be tried here
    exported, described = export(graph, architecture)
    with torch.no_grad():
        expected = graph(some())
    found = check_same(expected, logits(exported, some(), tmp_path, backend), 1e-4)
    assert found["images"] == 4 and found["largest_logit"] > 0.05
    assert not any(layer.name in ("stem.1", "depthwise.1", "hidden.2") for layer in described.layers)  # folded
    for node in exported.graph.node:  # named as the layer, or as the layer and a part of it
        layer = max((layer for layer in described.layers if f"{node.name}.".startswith(f"{layer.name}.")),
                    key=lambda layer: len(layer.name))
        assert node.op_type in layer.operators, (node.name, node.op_type)


@pytest.mark.parametrize("name", ["slim_resnet18", "torchvision:mobilenet_v2", "torchvision:mobilenet_v3_small"])
def test_known_networks(name: str, tmp_path: Path) -> None:
    options = {"width": 16, "stem": "small"} if name == "slim_resnet18" else {}
    shape = (3, 32, 32)
    graph, architecture = trained(make(name, num_classes=10, **options), shape)
    exported, _ = export(graph, architecture)
    images = some(shape)
    with torch.no_grad():
        check_same(graph(images), logits(exported, images, tmp_path, "onnxruntime"), 1e-4)
    file = read_onnx(tmp_path / "model.onnx", shape)
    assert file.macs == count_macs(graph, shape) and not any(file.layers.values())
    assert [node.op_type for node in exported.graph.node].count("BatchNormalization") == 0
    assert exported.opset_import[0].version == OPSET and file.input_name == "input"
    assert set(file.layers) == {layer.name for layer in architecture.layers if layer.width}


def test_a_wrong_file_is_refused(tmp_path: Path) -> None:
    graph, architecture = trained(make("slim_resnet18", num_classes=10, width=8, stem="small"))
    exported, _ = export(graph, architecture)
    bias = next(tensor for tensor in exported.graph.initializer if tensor.name == "fc.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 0.1, "fc.bias"))
    with torch.no_grad():
        expected = graph(some())
    with pytest.raises(VerificationError, match=r"logits differ by up to 0\.1"):
        check_same(expected, logits(exported, some(), tmp_path, "onnxruntime"))
    swapped = expected.clone()
    swapped[0, [0, 1]] = expected[0, [1, 0]]
    for one, other in ((expected, swapped), (expected, expected * torch.nan), (expected * torch.nan, expected)):
        with pytest.raises(VerificationError):
            check_same(one, other)


@pytest.mark.parametrize("pool", [
    nn.MaxPool2d(2, 3, 1, ceil_mode=True), nn.MaxPool2d(1, 2, ceil_mode=True),
    nn.MaxPool2d(3, 2, ceil_mode=True, dilation=2), nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    nn.AvgPool2d(2, 2, ceil_mode=True), nn.AvgPool2d(2, 3, 1, ceil_mode=True)], ids=str)
def test_windows_that_reach_beyond_the_image(pool: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    for size in (5, 8, 9):
        shape = (3, size, size)
        features = pool(some(shape)).flatten(1).shape[1]
        graph, architecture = trained(nn.Sequential(pool, nn.Flatten(), nn.Linear(features, 5)), shape)
        exported, _ = export(graph, architecture)
        with torch.no_grad():
            for backend in BACKENDS:
                check_same(graph(some(shape)), logits(exported, some(shape), tmp_path, backend), 1e-5)


@pytest.mark.parametrize(("model", "said"), [
    (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(147, 5)), "pools 16x16 to 7x7")])
def test_what_has_no_onnx_form_is_named(model: Callable[[], nn.Module], said: str) -> None:
    graph, architecture = trained(model())
    with pytest.raises(UserError, match=said):
        export(graph, architecture)


def test_int8_layers_of_torch_are_refused() -> None:
    graph, _ = trained(make("slim_resnet18", num_classes=10, width=8, stem="small"))
    quantized, _ = quantize_graph(graph)
    with pytest.raises(UserError, match="int8 already"):
        export(quantized, describe(quantized, SHAPE))
