"""Random small graphs of layers, with random weights: what people write, and what nobody would."""

from __future__ import annotations

import random
from typing import Any

import torch

from architectures.architecture import Architecture
from architectures.build import build, check_shapes
from architectures.describe import Lowered

ATTENTION = ["plain", "rotary", "norm", "fused"]


class Sketchbook:
    """Layers that are added one after the other to tensors of 8x8 pixels, or to the tensors that are made of those.

    Args:
        seed: of all that is random.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.layers: list[dict[str, Any]] = []
        self.channels = {"input": 3}

    def add(self, kind: str, inputs: list[str], channels: int, **options: Any) -> str:
        name = f"{kind.lower()}{len(self.layers)}"
        self.layers.append({"name": name, "type": kind, "inputs": inputs, **options})
        self.channels[name] = channels
        return name

    def conv(self, source: str, outputs: int, groups: int = 1) -> str:
        return self.add("Conv2d", [source], outputs, in_channels=self.channels[source], out_channels=outputs,
                        kernel_size=3, padding=1, groups=groups)

    def step(self, source: str) -> str:
        """Add one of the things that networks do, and return its output."""
        count = self.channels[source]
        kind = self.random.choice(["conv", "grouped", "depthwise", "norm", "add", "concat", "split", "shuffle", "squeeze",
                                   "scale", "pad", "attention", "radix"])
        if kind == "conv" or count % 4:
            outputs = self.random.choice([8, 12, 16])
            return self.add("ReLU", [self.conv(source, outputs)], outputs)
        if kind == "grouped":
            return self.conv(source, self.random.choice([8, 16]), 4)
        if kind == "depthwise":
            return self.conv(source, count * self.random.choice([1, 2]), count)
        if kind == "norm":
            return self.add("BatchNorm2d", [source], count, num_features=count)
        if kind == "add":
            return self.add("Add", [source, self.conv(source, count)], count)
        if kind == "concat":
            return self.add("Concat", [self.conv(source, 4), source, self.conv(source, 8)], count + 12, dim=1)
        if kind == "split":
            half = count // 2
            left, right = (self.add("Slice", [source], half, dim=1, start=start, stop=start + half) for start in (0, half))
            return self.add("Concat", [self.conv(right, half), left], count, dim=1)
        if kind == "shuffle":
            folded = self.add("Reshape", [source], 0, shape=[2, count // 2, 8, 8])
            swapped = self.add("Permute", [folded], 0, dims=[0, 2, 1, 3, 4])
            return self.add("Flatten", [swapped], count, start_dim=1, end_dim=2)
        if kind == "squeeze":
            pooled = self.add("AdaptiveAvgPool2d", [source], count, output_size=1)
            gate = self.add("Sigmoid", [self.add("Conv2d", [pooled], count, in_channels=count, out_channels=count,
                                                 kernel_size=1)], count)
            return self.add("Multiply", [source, gate], count)
        if kind == "scale":
            gamma = self.add("Parameter", ["input"], 0, shape=[count, 1, 1])
            return self.add("Multiply", [source, gamma], count)
        if kind == "pad":
            return self.add("Pad", [source], count + 3, pad=[0, 0, 0, 0, 1, 2])
        if kind == "radix":
            both = self.conv(source, 16, 2)
            parts = self.add("Reshape", [both], 0, shape=[2, 8, 8, 8])
            return self.add("Sum", [parts], 8, dim=[1])
        return self.attention(source)

    def attention(self, source: str, kind: str | None = None) -> str:
        """Add attention of two heads between the pixels and a token, with what people add to it."""
        count, places = self.channels[source], 65
        tokens = self.add("Permute", [self.add("Flatten", [source], 0, start_dim=2)], 0, dims=[0, 2, 1])
        token = self.add("Parameter", ["input"], 0, shape=[1, count])
        tokens = self.add("Concat", [token, tokens], 0, dim=1)
        if self.random.random() < 0.5:
            tokens = self.add("Add", [tokens, self.add("Parameter", ["input"], 0, shape=[places, count])], 0)
        qkv = self.add("Linear", [tokens], 0, in_features=count, out_features=24)
        heads = self.add("Permute", [self.add("Reshape", [qkv], 0, shape=[places, 3, 2, 4])], 0, dims=[0, 2, 3, 1, 4])
        q, k, v = (self.add("Reshape", [self.add("Slice", [heads], 0, dim=1, start=start, stop=start + 1)], 0,
                            shape=[2, places, 4]) for start in range(3))
        kind = kind or self.random.choice(ATTENTION)
        if kind == "rotary":
            q, k = (self.add("Multiply", [x, self.add("Buffer", ["input"], 0, shape=[1, places, 4])], 0) for x in (q, k))
        if kind == "norm":
            q, k = (self.add("LayerNorm", [x], 0, normalized_shape=[4]) for x in (q, k))
        bias = self.add("Parameter", ["input"], 0, shape=[2, 1, places])
        if kind == "fused":
            wide = self.add("Add", [bias, self.add("Buffer", ["input"], 0, shape=[1, places, 1])], 0)
            mixed = self.add("ScaledDotProduct", [q, k, v, wide], 0, scale=0.5)
        else:
            scores = self.add("MatMul", [q, self.add("Permute", [k], 0, dims=[0, 1, 3, 2])], 0)
            mixed = self.add("MatMul", [self.add("Softmax", [self.add("Add", [scores, bias], 0)], 0, dim=-1), v], 0)
        mixed = self.add("Flatten", [self.add("Permute", [mixed], 0, dims=[0, 2, 1, 3])], 0, start_dim=2)
        joined = self.add("Linear", [mixed], 0, in_features=8, out_features=count)
        joined = self.add("Slice", [joined], 0, dim=1, start=1, stop=places)
        image = self.add("Reshape", [self.add("Permute", [joined], 0, dims=[0, 2, 1])], count, shape=[count, 8, 8])
        return self.add("Add", [source, image], count)


def random_network(seed: int) -> Lowered:
    """Return a network of a dozen random steps, with random weights."""
    book = Sketchbook(seed)
    x = book.conv("input", 16)
    for _ in range(12):
        x = book.step(x)
    return finished(book, x, seed)


def finished(book: Sketchbook, x: str, seed: int) -> Lowered:
    """Return the network whose last image is `x`, with a head and with random weights."""
    pooled = book.add("Mean", [x], book.channels[x], dim=[2, 3])
    book.add("Linear", [pooled], 4, in_features=book.channels[x], out_features=4)
    architecture = Architecture.model_validate({
        "schema": 1, "model_type": "Random", "num_classes": 4, "input_shape": [3, 8, 8], "output_shape": [4],
        "layers": book.layers})
    check_shapes(architecture)
    torch.manual_seed(seed)
    weights = build(architecture).state_dict()
    for key, tensor in weights.items():
        if tensor.is_floating_point() and (tensor.dim() < 2 or key.endswith("value")):
            tensor.normal_(0, 0.3)
            if key.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return Lowered(architecture, weights)
