"""`trained_pruned_architecture.json`: a graph of layers that is enough to rebuild a model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, FailFast, Field, SerializeAsAny, ValidationError, model_validator

from architectures.layers.base import Layer
from architectures.layers.table import LAYER_TABLE
from metadata.closest import closest
from metadata.schemas import MAX_LAYERS, Fraction, Identifier, Size, Strict, Texts


def _check_types(layers: Any) -> Any:
    """Raise ValidationError for the first layer whose type is unknown, with the nearest type there is."""
    for index, layer in enumerate(layers if isinstance(layers, list) else ()):
        kind = layer.get("type") if isinstance(layer, dict) else None
        if isinstance(kind, str) and kind not in LAYER_TABLE:
            near = closest(kind, LAYER_TABLE) if len(kind) < 50 else ""
            raise ValidationError.from_exception_data("Architecture", [{
                "type": "value_error", "loc": (index, "type"), "input": kind,
                "ctx": {"error": ValueError(f"unknown layer type{near}")}}])
    return layers


def _row_of(layer: Any) -> Any:
    """Validate a layer's JSON with the class of its type."""
    kind = layer.get("type") if isinstance(layer, dict) else None
    return LAYER_TABLE[kind].model_validate(layer) if isinstance(kind, str) and kind in LAYER_TABLE else layer


AnyLayer = Annotated[SerializeAsAny[Layer], BeforeValidator(_row_of)]


class Architecture(Strict):
    """A graph of layers in topological order.

    The graph's input is called "input", `(N, *input_shape)` float32. The last layer is the output, `(N, *output_shape)`.
    """

    model_config = ConfigDict(populate_by_name=True)

    schema_version: Literal[1] = Field(1, alias="schema")
    model_type: Identifier
    num_classes: Size
    input_shape: tuple[Size, Size, Size]
    output_shape: tuple[Size]
    pruning_rate: Fraction = 0.0
    compression_steps: Texts = []
    training_details: dict[str, Any] = {}
    layers: Annotated[list[AnyLayer], FailFast(), BeforeValidator(_check_types)] = Field(
        min_length=1, max_length=MAX_LAYERS)

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
        return any(layer.int8 for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return the object that is written to disk."""
        return self.model_dump(mode="json", by_alias=True)
