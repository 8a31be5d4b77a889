"""The layer table: every type of layer that an architecture may hold, and the graph of them that a JSON file is."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TYPE_CHECKING, Union, get_args

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, create_model, model_serializer, model_validator

from architectures.int8 import int8_layers
from metadata.schemas import Fraction, Identifier, LayerName, Padding, Pair, PruningInfo, Size, Strict

if TYPE_CHECKING:
    from torch import nn


class Layer(Strict):
    """One row of an architecture: a module or function of the closed table below, and where its inputs come from."""

    input_count: ClassVar[tuple[int, int]] = (1, 1)

    name: LayerName
    type: str
    inputs: list[str]
    pruning_info: PruningInfo | None = None

    @model_validator(mode="after")
    def _check(self) -> Layer:
        low, high = self.input_count
        if not low <= len(self.inputs) <= high:
            raise ValueError(f"layer {self.name} takes {low} to {high} inputs, got {len(self.inputs)}")
        info, options = self.pruning_info, self.options()
        if info and info.remaining_channels != self.width:
            raise ValueError(f"layer {self.name}: pruning_info.remaining_channels is {info.remaining_channels}, "
                             f"the layer has {self.width}")
        groups = options.get("groups", 1)
        if groups > 1 and (options["in_channels"] % groups or options["out_channels"] % groups):
            raise ValueError(f"layer {self.name}: groups {groups} does not divide {options['in_channels']} -> "
                             f"{options['out_channels']} channels")
        return self

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        head = {key: fields.pop(key) for key in ("name", "type", "inputs")}
        info = fields.pop("pruning_info")
        return head | fields | ({"pruning_info": info} if info else {})

    @property
    def width(self) -> int | None:
        """Output channels of a layer with weights that decide them, else None."""
        return getattr(self, "out_channels", getattr(self, "out_features", None))

    def options(self) -> dict[str, Any]:
        """The layer's own settings: the constructor arguments of the torch module of the same name."""
        return {key: getattr(self, key) for key in type(self).model_fields if key not in Layer.model_fields}

    def module(self) -> nn.Module:
        """The module, with fresh weights."""
        from torch import nn
        home = int8_layers() if self.type.startswith("Int8") else nn
        return getattr(home, self.type)(**self.options())  # type: ignore[no-any-return]


class FunctionLayer(Layer):
    """A layer without a module: a function of its input tensors."""

    def call(self, inputs: list[Any]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The function, its positional arguments and its keyword arguments."""
        import torch
        if self.type == "Concat":
            return torch.cat, (inputs,), self.options()
        functions: dict[str, Callable[..., Any]] = {"Add": operator.add, "Multiply": operator.mul, "Mean": torch.mean}
        return functions[self.type], tuple(inputs), self.options()


def _layer(*types: str, base: type[Layer] = Layer, input_count: tuple[int, int] = (1, 1), **fields: Any) -> type[Layer]:
    """A row of the table; a field is a type, or (type, default)."""
    fields["type"] = Literal[types]
    defined: dict[str, Any] = {key: field if isinstance(field, tuple) else (field, ...) for key, field in fields.items()}
    kind: type[Layer] = create_model(types[0], __base__=base, **defined)
    kind.input_count = input_count
    return kind


_CONV: dict[str, Any] = {"in_channels": Size, "out_channels": Size, "kernel_size": Pair, "stride": (Pair, (1, 1)),
         "padding": (Padding, (0, 0)), "dilation": (Pair, (1, 1)), "groups": (Size, 1)}
_POOL: dict[str, Any] = {"kernel_size": Pair, "stride": Pair, "padding": (Padding, (0, 0)), "ceil_mode": (bool, False)}
_ACTIVATIONS = (Literal["int8", "float32"], "int8")
LAYERS = (
    _layer("Conv2d", **_CONV, bias=(bool, True)),
    _layer("Linear", in_features=Size, out_features=Size, bias=(bool, True)),
    _layer("Int8Conv2d", **_CONV, activations=_ACTIVATIONS),
    _layer("Int8Linear", in_features=Size, out_features=Size, activations=_ACTIVATIONS),
    _layer("BatchNorm1d", "BatchNorm2d", num_features=Size, eps=(float, 1e-5), momentum=(float | None, 0.1),
           affine=(bool, True), track_running_stats=(Literal[True], True)),  # else it would depend on the batch
    _layer("GroupNorm", num_groups=Size, num_channels=Size, eps=(float, 1e-5), affine=(bool, True)),
    _layer("ReLU", "ReLU6", "SiLU", "Hardswish", "Hardsigmoid", "Sigmoid", "Tanh", "Identity"),
    _layer("LeakyReLU", negative_slope=(float, 0.01)),
    _layer("GELU", approximate=(Literal["none", "tanh"], "none")),
    _layer("Dropout", p=(Fraction, 0.5)),
    _layer("MaxPool2d", **_POOL, dilation=(Pair, (1, 1))),
    _layer("AvgPool2d", **_POOL, count_include_pad=(bool, True)),
    _layer("AdaptiveAvgPool2d", "AdaptiveMaxPool2d", output_size=Pair),
    _layer("Flatten", start_dim=(int, 1), end_dim=(int, -1)),
    _layer("Mean", base=FunctionLayer, dim=list[int], keepdim=(bool, False)),
    _layer("Add", "Multiply", base=FunctionLayer, input_count=(2, 2)),
    _layer("Concat", base=FunctionLayer, input_count=(1, 1000), dim=(int, 1)),
)
LAYER_TABLE = {name: layer for layer in LAYERS for name in get_args(layer.model_fields["type"].annotation)}
if TYPE_CHECKING:
    AnyLayer = Layer
else:
    AnyLayer = Annotated[Union[LAYERS], Field(discriminator="type")]


class Architecture(Strict):
    """`trained_pruned_architecture.json`: a graph of layers, in topological order, that is enough to rebuild a model.

    The graph's input is called "input", `(N, *input_shape)` float32; the last layer is the output,
    `(N, *output_shape)`.
    """

    model_config = ConfigDict(populate_by_name=True)

    schema_version: Literal[1] = Field(1, alias="schema")
    model_type: Identifier
    num_classes: Size
    input_shape: tuple[Size, Size, Size]
    output_shape: tuple[Size]
    pruning_rate: Fraction = 0.0
    compression_steps: list[str] = []
    training_details: dict[str, Any] = {}
    layers: list[AnyLayer] = Field(min_length=1, max_length=10_000)

    @model_validator(mode="after")
    def _is_a_graph(self) -> Architecture:
        known, used = {"input"}, set[str]()
        branches: set[str] = set()
        for layer in self.layers:
            if layer.name in known:
                raise ValueError(f"layer {layer.name}: the name is used twice")
            parts = layer.name.split(".")
            branches.update(".".join(parts[:depth]) for depth in range(1, len(parts)))
            for source in layer.inputs:
                if source not in known:
                    raise ValueError(f"layer {layer.name}: input {source!r} is no earlier layer")
            used.update(layer.inputs)
            known.add(layer.name)
        if known & branches:
            raise ValueError(f"layer {min(known & branches)}: other layers lie inside it")
        dangling = known - used - {self.layers[-1].name}
        if dangling:
            raise ValueError(f"layer {min(dangling)}: nothing uses its output")
        if self.output_shape != (self.num_classes,):
            raise ValueError(f"output_shape {list(self.output_shape)} does not hold {self.num_classes} classes")
        return self

    @property
    def is_int8(self) -> bool:
        """Whether any layer has int8 weights."""
        return any(layer.type.startswith("Int8") for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """The object that is written to disk."""
        return self.model_dump(mode="json", by_alias=True)
