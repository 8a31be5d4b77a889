"""Int8 graphs on their kernels: they compute what the layers define, with the weights as they are now."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architectures.kernels import QuantizedTensor, int8_arithmetic, kernels_saturate, layer_by_layer, no_int8_kernels
from architectures.program import Program, int8_graph, pack
from compress.quantization.dynamic import quantize_graph
from compress.quantization.int8_table import sqnr_db
from tests.helpers.graphs import graph_of, Residual

needs_kernels = pytest.mark.skipif(bool(no_int8_kernels()), reason=no_int8_kernels() or "there are int8 kernels")


class Twice(nn.Module):
    """Outputs that are read twice, added to themselves, or read after they were added to something."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.third, self.fourth = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(32, 16, 1)
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(first) + first
        third = torch.relu(self.third(second) + first)
        fourth = self.fourth(torch.cat([third, first], 1))
        return self.fc(self.flatten(self.pool(fourth + fourth) * self.pool(second)))


@needs_kernels
@pytest.mark.parametrize("exclude", [[], ["conv"], ["stem", "conv", "fc"]])
@pytest.mark.parametrize("squeeze", [False, True], ids=["", "broadcast"])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.Sigmoid(),
                                        nn.Identity()], ids=lambda layer: type(layer).__name__)
def test_fused_kernels_compute_what_the_layers_define(activation: nn.Module, squeeze: bool, exclude: list[str]) -> None:
    torch.manual_seed(2)
    float_graph = graph_of(Residual(activation, squeeze=squeeze))
    if len(exclude) == 3:
        model = float_graph
        fast: Any = Program(model)
    else:
        model, _ = quantize_graph(float_graph, exclude)
        fast = model
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected, got = layer_by_layer(model)(images), fast(images)
        exact = float_graph(images)
    # A value on the edge between two levels may fall to either side: far below the quantization's own noise.
    assert sqnr_db(expected, got) > 45
    assert sqnr_db(exact, got) > 25 if not exclude else sqnr_db(exact, got) > 30


class ReadLate(nn.Module):
    """A tensor that is added to, and read by a layer whose kernel runs only where its ReLU stands, after the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.third, self.pool = nn.Conv2d(16, 16, 3, padding=1), nn.AdaptiveAvgPool2d(1)
        self.flatten, self.fc = nn.Flatten(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        second = self.second(x)
        total = self.third(x) + x
        return self.fc(self.flatten(self.pool(total + torch.relu(second))))


@needs_kernels
@pytest.mark.parametrize("exclude", [[], ["first"], ["second"], ["third"], ["second", "third"]], ids=str)
@pytest.mark.parametrize("network", [Twice, ReadLate])
def test_tensors_that_are_read_later_are_not_overwritten(network: type[nn.Module], exclude: list[str]) -> None:
    torch.manual_seed(3)
    model, _ = quantize_graph(graph_of(network()), exclude)
    images = torch.randn(3, 3, 16, 16)
    before = images.clone()
    with torch.no_grad():
        assert sqnr_db(layer_by_layer(model)(images), model(images)) > 40
    assert torch.equal(images, before)


@needs_kernels
@pytest.mark.parametrize("start_dim", [1, 2])
def test_linear_layers_take_rows_and_planes(start_dim: int) -> None:
    torch.manual_seed(4)
    features = 8 * 16 * 16 if start_dim == 1 else 16 * 16
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(start_dim), nn.Linear(features, 6), nn.ReLU()]
    model, _ = quantize_graph(graph_of(nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 8 ** (start_dim - 1), 5))))
    images = torch.randn(2, 3, 16, 16)
    assert sqnr_db(layer_by_layer(model)(images), model(images)) > 40


@needs_kernels
@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-1.0, 1.0), (-1.0, 0.0), (-0.001, 1.0), (-1.0, 0.001), (0.0, 0.0),
                                       (-3e4, 3e-4), (2.0, 2.0)])
def test_integers_of_a_tensor_are_those_of_the_layers(low: float, high: float) -> None:
    from architectures.int8 import int8_layers
    tensor = torch.empty(1, 8, 9, 9).uniform_(low, high) if low < high else torch.full((1, 8, 9, 9), low)
    levels, scale, zero_point = QuantizedTensor(tensor).parts()
    expected, expected_scale = int8_layers().quantize_activations(tensor)
    assert levels.dtype == torch.uint8 and 0 <= zero_point <= 255
    assert scale == pytest.approx(float(expected_scale), rel=1e-6)
    off = (levels.float() - zero_point - expected).abs()
    assert off.max() <= 1 and off.mean() < 0.01  # one apart only where a value lies on the edge between two levels
    assert torch.allclose((levels.float() - zero_point) * scale, tensor, atol=0.51 * scale)


@needs_kernels
def test_images_of_a_batch_do_not_see_each_other() -> None:
    model, _ = quantize_graph(graph_of(Residual(nn.ReLU())))
    images = torch.randn(5, 3, 16, 16) * torch.arange(1, 6).view(-1, 1, 1, 1)
    with torch.no_grad():
        assert torch.equal(model(images), torch.cat([model(image[None]) for image in images]))


@needs_kernels
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_not_a_number_comes_out_as_such(activations: str) -> None:
    model, _ = quantize_graph(graph_of(Residual(nn.ReLU())))
    for name in ("stem", "conv", "fc"):
        model.get_submodule(name).activations = activations  # type: ignore[assignment]
    images = torch.randn(1, 3, 16, 16)
    images[0, 0, 0, 0] = float("nan")
    assert bool(model(images).isnan().any()) and bool(layer_by_layer(model)(images).isnan().any())


@needs_kernels
def test_new_weights_are_used_and_copies_are_their_own() -> None:
    model, _ = quantize_graph(graph_of(Residual(nn.ReLU())))
    other, _ = quantize_graph(graph_of(Residual(nn.ReLU())))
    images = torch.randn(1, 3, 16, 16)
    before, theirs = model(images), other(images)
    copied = copy.deepcopy(model)
    assert isinstance(copied, int8_graph())
    copied.load_state_dict(other.state_dict())
    assert torch.equal(copied(images), theirs) and torch.equal(model(images), before)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(images), theirs) and not torch.equal(before, theirs)


@needs_kernels
@pytest.mark.parametrize("change", [
    lambda graph, other: graph.load_state_dict(other),
    lambda graph, other: nn.Sequential(graph).load_state_dict({f"0.{name}": tensor for name, tensor in other.items()}),
    lambda graph, other: graph.load_state_dict(other, assign=True),
    lambda graph, other: (graph.get_buffer("stem.weight").neg_(), graph.train().eval()),
    lambda graph, other: (graph.get_buffer("stem.weight").neg_(), nn.Sequential(graph).double().float()),
    lambda graph, other: (graph.get_parameter("conv.weight").data.mul_(-3), graph.train().eval()),
    lambda graph, other: (graph.get_parameter("conv.weight").data.mul_(-3), nn.Sequential(graph).double().float()),
    lambda graph, other: (graph.set_submodule("fc", nn.Linear(96, 5)), graph.recompile()),
], ids=["load_state_dict", "a parent's", "assign", "int8, train", "int8, double", "float, train", "float, double",
        "recompile"])
def test_new_weights_are_packed_anew(change: Callable[[Any, dict[str, Tensor]], Any]) -> None:
    torch.manual_seed(5)
    model, _ = quantize_graph(graph_of(Residual(nn.ReLU())), ["conv", "fc"])
    other = {name: -3 * tensor if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    images = torch.randn(1, 3, 16, 16)
    before = model(images)
    change(model, other)
    with torch.no_grad():
        assert sqnr_db(layer_by_layer(model)(images), model(images)) > 40
        assert sqnr_db(before, model(images)) < 20


@pytest.mark.parametrize("change", [
    lambda graph: graph.train(),
    lambda graph: graph.eval(),
    lambda graph: graph.double(),
    lambda graph: nn.Sequential(graph).double(),
    lambda graph: graph.load_state_dict(graph.state_dict()),
    lambda graph: nn.Sequential(graph).load_state_dict(nn.Sequential(graph).state_dict()),
    lambda graph: graph.recompile(),
    lambda graph: copy.deepcopy(graph),
], ids=["train", "eval", "double", "a parent's double", "load_state_dict", "a parent's load_state_dict", "recompile",
        "deepcopy"])
def test_packed_weights_are_dropped(change: Callable[[Any], Any]) -> None:
    """The kernels are not called, so this holds on a CPU without int8 kernels too."""
    model: Any = quantize_graph(graph_of(Residual(nn.ReLU())))[0]
    pack(nn.Sequential(model))
    assert model._program is not None
    change(model)
    assert model._program is None


@needs_kernels
@pytest.mark.parametrize("change", [
    lambda graph: graph.get_submodule("fc").load_state_dict(nn.Linear(96, 5).state_dict()),
    lambda graph: graph.get_parameter("conv.weight").detach().mul_(-2),
    lambda graph: graph.set_submodule("fc", nn.Linear(96, 5)),
    lambda graph: setattr(graph.get_submodule("fc"), "bias", nn.Parameter(torch.full((5,), 100.0))),
    lambda graph: setattr(graph.get_parameter("fc.bias"), "data", torch.full((5,), -100.0)),
], ids=["a layer's load_state_dict", "in place", "a layer", "a parameter", "data"])
def test_weights_that_are_changed_by_hand_are_used_after_pack(change: Callable[[Any], Any]) -> None:
    torch.manual_seed(5)
    model: Any = quantize_graph(graph_of(Residual(nn.ReLU())), ["conv", "fc"])[0]
    images = torch.randn(1, 3, 16, 16)
    before = model(images)
    change(model)
    pack(model)
    with torch.no_grad():
        assert sqnr_db(layer_by_layer(model)(images), model(images)) > 40
        assert sqnr_db(before, model(images)) < 20


@needs_kernels
@pytest.mark.parametrize("excluded", [["conv", "fc"], []], ids=["float", "int8"])
@pytest.mark.parametrize("change", [
    lambda graph: graph.get_submodule("fc").load_state_dict({
        name: torch.ones_like(tensor) for name, tensor in graph.get_submodule("fc").state_dict().items()}),
    lambda graph: graph.get_submodule("conv").weight.detach().neg_(),
], ids=["a layer's load_state_dict", "in place"])
def test_weights_that_an_operator_writes_are_used_at_once(change: Callable[[Any], Any], excluded: list[str]) -> None:
    torch.manual_seed(5)
    model: Any = quantize_graph(graph_of(Residual(nn.ReLU())), excluded)[0]
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        before = model(images)
        change(model)
        assert sqnr_db(layer_by_layer(model)(images), model(images)) > 40
        assert sqnr_db(before, model(images)) < 20


@needs_kernels
def test_weights_that_begin_to_saturate_leave_the_kernels() -> None:
    """Where the CPU saturates, the count decides anew; elsewhere the kernels are exact for these weights too."""
    torch.manual_seed(6)
    model: Any = quantize_graph(graph_of(Residual(nn.ReLU())))[0]
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        model(images)
        model.get_submodule("conv").weight.fill_(127)
        assert sqnr_db(layer_by_layer(model)(images), model(images)) > 40
    assert isinstance(model._program, str) == kernels_saturate()


@needs_kernels
@pytest.mark.parametrize("name", ["", "stem", "fc"])
def test_hooks_are_called(name: str) -> None:
    model, _ = quantize_graph(graph_of(Residual(nn.ReLU())))
    images, called = torch.randn(1, 3, 16, 16), []
    without = model(images)
    handles = [model.get_submodule(name).register_forward_pre_hook(lambda *_: called.append("before")),
               model.get_submodule(name).register_forward_hook(lambda *_: called.append("after"))]
    assert sqnr_db(without, model(images)) > 40 and called == ["before", "after"]
    for handle in handles:
        handle.remove()
    assert torch.equal(model(images), without) and len(called) == 2


@needs_kernels
def test_what_broadcasts_at_one_size_of_image_alone() -> None:
    """At 1x1 the pooled branch has the shape of the other, and is added by the convolution's kernel."""
    torch.manual_seed(3)
    model, _ = quantize_graph(graph_of(Residual(nn.ReLU(), squeeze=True)))
    for size in (1, 16, 1, 5):
        images = torch.randn(1, 3, size, size)
        with torch.no_grad():
            assert sqnr_db(layer_by_layer(model)(images), model(images)) > 40


@needs_kernels
def test_training_mode_and_other_types_take_the_layers_own_way() -> None:
    model, _ = quantize_graph(graph_of(Residual(nn.ReLU())))
    images = torch.randn(1, 3, 16, 16)
    assert not model(images).requires_grad
    assert model.train()(images).requires_grad
    model.eval().double()
    assert model(images.double()).dtype == torch.float64


def test_a_model_without_int8_layers_says_nothing_of_its_arithmetic() -> None:
    assert int8_arithmetic(nn.Linear(2, 2)) is None
