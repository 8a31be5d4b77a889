"""Each type of the layer table is described from torch's functions and methods that mean it, also from those in place."""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.describe import describe, lower
from architectures.layers.base import resolved
from architectures.layers.table import LAYER_TABLE

Call = Callable[[Tensor], Tensor]
SIMPLE = ("ReLU", "ReLU6", "SiLU", "Hardswish", "Hardsigmoid", "Sigmoid", "Tanh", "LeakyReLU", "GELU", "Exp", "Sqrt", "Erf",
          "Reciprocal")
# Calls of the functions with torch's names of these types that take more than the tensor.
CALLS: dict[str, Call] = {
    "AdaptiveAvgPool2d": lambda x: F.adaptive_avg_pool2d(x, 2), "AdaptiveMaxPool2d": lambda x: F.adaptive_max_pool2d(x, 2),
    "AvgPool2d": lambda x: F.avg_pool2d(x, 2), "MaxPool2d": lambda x: F.max_pool2d(x, 2),
    "Dropout": lambda x: F.dropout(x, 0.5, training=False), "Softmax": lambda x: F.softmax(x, 1),
    "Conv2d": lambda x: F.conv2d(x, torch.ones(4, 4, 1, 1)), "PReLU": lambda x: F.prelu(x - 1, torch.full((4,), 0.3)),
    "Upsample": lambda x: F.interpolate(x, scale_factor=2), "GroupNorm": lambda x: F.group_norm(x, 2),
    "LayerNorm": lambda x: F.layer_norm(x, x.shape[1:]), "Pad": lambda x: F.pad(x, (1, 0, 0, 1)),
    "BatchNorm2d": lambda x: F.batch_norm(x, torch.ones(4), torch.full((4,), 2.0)),
    "Linear": lambda x: F.linear(x.flatten(1), torch.ones(3, 4 * 36) / 100)[:, :, None, None].expand(-1, -1, 4, 1),
    "ScaledDotProduct": lambda x: F.scaled_dot_product_attention(x, x, x), "Maximum": lambda x: torch.amax(x, (2, 3), True),
    "Clamp": lambda x: torch.clamp(x, 0.6, 1.0), "Norm": lambda x: torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)}


class Calling(nn.Module):
    """A network that calls a function on values of 0.5 to 1.5: (N, 4, 6, 6), or (N, 3, 4, 1) for a linear layer."""

    def __init__(self, function: Call) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.stem = function, nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        found = self.function(torch.sigmoid(self.stem(images)) + 0.5)
        return self.head(found.mean((2, 3)) if found.shape[1] == 4 else found.mean((1, 3)))  # type: ignore[no-any-return]


def types(function: Call) -> list[str]:
    return [layer.type for layer in describe(Calling(function).eval(), (3, 8, 8)).layers]


def simple_calls() -> list[Any]:
    """Each function and method of the types above, and its form in place where torch has one."""
    found: list[Any] = []
    for kind in SIMPLE:
        row = LAYER_TABLE[kind]
        for name in row.functions:
            function = resolved(name)
            found.append((kind, name, function))
            found += [(kind, f"{place.__name__}.{function.__name__}_", inside) for place in (F, torch)
                      if (inside := getattr(place, f"{function.__name__}_", None))]
        for name in row.methods:
            found += [(kind, f"Tensor.{each}", methodcaller(each)) for each in (name, f"{name}_") if hasattr(Tensor, each)]
    return [pytest.param(kind, function, id=str(name)) for kind, name, function in found]


@pytest.mark.parametrize(("kind", "function"), simple_calls())
def test_a_function_of_one_tensor(kind: str, function: Call) -> None:
    assert kind in types(lambda x: function(x))[2:]


@pytest.mark.parametrize("kind", CALLS)
def test_a_function_with_arguments(kind: str) -> None:
    assert kind in types(CALLS[kind])


def test_every_type_that_torch_has_a_function_for_is_tried_here() -> None:
    named = {name.replace("_", "") for name in dir(F)}
    assert {kind for kind, row in LAYER_TABLE.items() if kind.lower() in named and not row.int8} <= {*SIMPLE, *CALLS}


@pytest.mark.parametrize("function", [lambda x: x + (x - 1).relu_(), lambda x: F.leaky_relu_(x - 1, 0.3).clamp_(0, 2),
                                      lambda x: torch.clamp_(x, 0.6, 1.0)])
def test_calls_in_place_whose_old_value_is_not_read_again(function: Call) -> None:
    assert {"ReLU", "LeakyReLU", "Clamp"} & {*types(function)}


def statement(x: Tensor) -> Tensor:
    x = x - 1
    x.relu_()
    return x


@pytest.mark.parametrize("function", [statement, lambda x: x + x.sub_(1).relu_()])
def test_what_reads_a_tensor_after_a_call_in_place_reads_that_calls_result(function: Call) -> None:
    model, images = Calling(function).eval(), torch.randn(2, 3, 8, 8)
    lowered = lower(model, (3, 8, 8))
    assert "ReLU" in [layer.type for layer in lowered.architecture.layers]
    with torch.no_grad():
        torch.testing.assert_close(lowered.build()(images), model(images))
