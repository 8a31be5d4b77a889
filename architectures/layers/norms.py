"""Normalization layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TYPE_CHECKING

import numpy as np
from pydantic import Field

from architectures.layers.base import Layer, OnnxWriter, Operator, Shape, register, with_channels
from metadata.schemas import Epsilon, Number, Size

if TYPE_CHECKING:
    from torch import nn

    from architectures.layers.channels import Kept, LabelBook, Labels


class BatchNorm(Layer):
    """A batch norm with stored statistics: without them its output would depend on the batch."""

    operators = {"BatchNormalization": Operator()}
    channel_axis = 1

    num_features: Size
    eps: Epsilon = 1e-5
    momentum: Number | None = 0.1
    affine: bool = True
    track_running_stats: Literal[True] = True
    dimensions: ClassVar[tuple[int, ...]]  # that an input has

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return with_channels(inputs[0], self.num_features, *self.dimensions)

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        return inputs[0]

    def pruned(self, kept: Kept, weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        channels = kept.output[1]
        return {"num_features": len(channels)}, {key: tensor[channels] for key, tensor in weights.items()
                                                 if key != "num_batches_tracked"}

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        name, count = self.name, self.num_features
        affine = ([writer.parameter(self, "weight"), writer.parameter(self, "bias")] if self.affine else
                  [writer.constant(f"{name}.weight", np.ones(count)), writer.constant(f"{name}.bias", np.zeros(count))])
        moments = [writer.parameter(self, "running_mean"), writer.parameter(self, "running_var")]
        return writer.node("BatchNormalization", name, [*inputs, *affine, *moments], epsilon=self.eps)


@register
class BatchNorm1d(BatchNorm):
    """`torch.nn.BatchNorm1d`."""

    dimensions = (2, 3)


@register
class BatchNorm2d(BatchNorm):
    """`torch.nn.BatchNorm2d`."""

    dimensions = (4,)


@register
class GroupNorm(Layer):
    """`torch.nn.GroupNorm`."""

    operators = {"Reshape": Operator("all"), "InstanceNormalization": Operator(), "Mul": Operator("all"),
                 "Add": Operator("sums")}
    channel_axis = 1

    num_groups: Size
    num_channels: Size
    eps: Epsilon = 1e-5
    affine: bool = True

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return with_channels(inputs[0], self.num_channels, 2, 3, 4)

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        """Let each group lose the same channels."""
        book.alike(inputs[0], 1, self.num_groups)
        return inputs[0]

    def pruned(self, kept: Kept, weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        channels = kept.output[1]
        return {"num_channels": len(channels)}, {key: tensor[channels] for key, tensor in weights.items()}

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        """Write each group of channels as one channel of an InstanceNormalization, then scale and shift each channel."""
        name, groups = self.name, self.num_groups
        ones = writer.constant(f"{name}.ones", np.full(groups, 1))
        zeros = writer.constant(f"{name}.zeros", np.full(groups, 0))
        rows = writer.constant(f"{name}.rows", [0, groups, -1], np.int64)
        grouped = writer.node("Reshape", f"{name}.grouped", [*inputs, rows])
        normal = writer.node("InstanceNormalization", f"{name}.normal", [grouped, ones, zeros], epsilon=self.eps)
        back = writer.constant(f"{name}.shape", [-1, *shape], np.int64)
        if not self.affine:
            return writer.node("Reshape", name, [normal, back])
        plain = writer.node("Reshape", f"{name}.plain", [normal, back])
        scale, offset = (writer.constant(f"{name}.{key}", writer.weight(self, key).reshape(-1, *[1] * (len(shape) - 1)))
                         for key in ("weight", "bias"))
        return writer.node("Add", name, [writer.node("Mul", f"{name}.scaled", [plain, scale]), offset])


@register
class LayerNorm(Layer):
    """`torch.nn.LayerNorm` over the last dimensions."""

    operators = {"LayerNormalization": Operator()}
    channel_axis = -1

    normalized_shape: Annotated[list[Size], Field(min_length=1, max_length=4)]
    eps: Epsilon = 1e-5
    elementwise_affine: bool = True
    bias: bool = True

    @classmethod
    def from_module(cls, module: nn.Module, name: str) -> dict[str, Any]:
        return super().from_module(module, name) | {"bias": module.bias is not None or not module.elementwise_affine}

    def output_shape(self, inputs: list[Shape]) -> Shape:
        count = len(self.normalized_shape)
        if len(inputs[0]) <= count or list(inputs[0][-count:]) != self.normalized_shape:
            raise ValueError(f"expected {self.normalized_shape} at the end, got {list(inputs[0])}")
        return inputs[0]

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        return inputs[0]

    def pruned(self, kept: Kept, weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        stays = kept.output[-len(self.normalized_shape):]
        return ({"normalized_shape": [len(indices) for indices in stays]},
                {key: tensor[np.ix_(*stays)] for key, tensor in weights.items()})

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        name, size = self.name, self.normalized_shape
        affine = [writer.parameter(self, "weight") if self.elementwise_affine else
                  writer.constant(f"{name}.weight", np.ones(size))]
        if self.elementwise_affine and self.bias:
            affine.append(writer.parameter(self, "bias"))
        return writer.node("LayerNormalization", name, [*inputs, *affine], axis=-len(size), epsilon=self.eps)
