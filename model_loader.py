"""The evaluator of record: load a compressed image classifier, verify it, measure it, score it.

    python model_loader.py --submission_dir DIR --data_dir DIR --baseline_size 50 --baseline_latency 10 \
        --baseline_accuracy 80 --output_file results.json

This file travels, byte for byte, inside every submission, so it imports no other file of the project: the standard
library, numpy and pydantic at the top; torch, Pillow, onnxruntime and openvino inside the functions that need them. What
the pipeline needs too (schemas, layer table, `build`, measuring, scoring) is defined here once and imported upward. A
submission is data: nothing in it is executed, unless the user says `--allow_code`, and then in a separate process.

Sections: errors and files · schemas · layer table and build · int8 layers · read and verify · ONNX · runtimes · images ·
measure · score · command line. Comparing two submissions, running foreign code and the synthetic task are the toolkit's
(`compress/evaluation/`), loaded by the flag that asks for them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import keyword
import logging
import math
import operator
import os
import platform
import struct
import sys
import tempfile
import time
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args

import numpy as np
from pydantic import (BaseModel, BeforeValidator, ConfigDict, Field, RootModel, SerializerFunctionWrapHandler,
                      ValidationError, create_model, model_serializer, model_validator)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

if __name__ not in sys.modules:
    # Panels load this file by path, often without registering it; dataclasses and pydantic look their module up there.
    class _Unregistered(types.ModuleType):
        __dict__ = property(lambda self: globals())

    sys.modules[__name__] = _Unregistered(__name__)

ARCHITECTURE_FILE = "trained_pruned_architecture.json"
METADATA_FILE = "model_metadata.json"
ORIGINAL_METADATA_FILES = (METADATA_FILE, "metadata.json")
PROSE = {".json", ".md", ".py", ".txt"}
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_ACTIVATION_ELEMENTS = 2**28  # one layer's output for one image; more than this is an attack or a mistake
MAX_TOTAL_ELEMENTS = 2**31  # all layers' outputs for one image
MAX_WEIGHT_ELEMENTS = 2**31
MAX_MACS = 10**12  # of one image: a hundred times a ResNet-152; more than this is an attack or a mistake
MAX_JSON_BYTES = 2**24
MAX_FILE_BYTES = 2**32
RATIO_CAP = 10.0  # no single ratio may buy more than this in the guarded score


# ---------------------------------------------------------------------------------------------- errors and files


class UserError(Exception):
    """A mistake of the caller, told in one line: expected, got, where, what to do. Command lines exit 2."""

    exit_code = 2


class VerificationError(UserError):
    """A claim that does not hold, such as weights that contradict their architecture. Command lines exit 1."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of an error's text, printable, for messages that must fit on one line."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "".join(character if character.isprintable() else "?" for character in line)


def describe_validation_error(error: ValidationError) -> str:
    """One line for the first problem that pydantic found: where, what was expected, what came."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the document"
    got = repr(first.get("input"))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {first['msg']}, got {got if len(got) <= 60 else got[:57] + '...'}{more}"


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Writes a file so that a reader, a full disk or SIGKILL meets the old file or the new one, never half of one.

    Raises:
        OSError: the folder is missing, read-only or full; the old file is untouched and no temporary one is left.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would make submissions unreadable to a panel's account
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically, with a final newline; lists of numbers stay readable at an indent of two."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode(errors="backslashreplace"))  # names of files need not be Unicode


def sha256(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------- schemas


class Strict(BaseModel):
    """Base of what we write ourselves: an unknown key or a missing one is an error."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


Size = Annotated[int, Field(ge=1, le=2**20)]
Pair = Annotated[tuple[Size, Size], BeforeValidator(_pair)]
Padding = Annotated[tuple[Annotated[int, Field(ge=0, le=2**16)], Annotated[int, Field(ge=0, le=2**16)]],
                    BeforeValidator(_pair)]
# A path inside the submission; that it does not leave it through ".." or a link is checked when it is opened.
FileName = Annotated[str, Field(pattern=r"\A[A-Za-z0-9_][A-Za-z0-9_./ -]*\z", max_length=200)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Identifier = Annotated[str, Field(pattern=r"\A[A-Za-z_][A-Za-z0-9_]*\z", max_length=200)]
# Layer names become attribute paths of generated code (torch.fx), hence the tight alphabet.
LayerName = Annotated[str, Field(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9][A-Za-z0-9_-]*)*\z",
                                  max_length=200)]


class Preprocessing(Strict):
    """How an image file becomes the model's input: resize (shorter side), centre crop, scale to [0, 1], normalise."""

    mode: Literal["RGB", "L"] = "RGB"
    resize: Size | None = Field(256, description="pixels of the shorter side, bilinear with antialiasing; null: as is")
    crop: Size | None = Field(224, description="pixels of the central square; null: as is")
    mean: list[float] = Field([0.485, 0.456, 0.406], description="a channel, after scaling to [0, 1]")
    std: list[Annotated[float, Field(gt=0)]] = Field([0.229, 0.224, 0.225], description="a channel")

    @model_validator(mode="after")
    def _channels(self) -> Preprocessing:
        channels = 3 if self.mode == "RGB" else 1
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(f"mode {self.mode} needs {channels} values in mean and in std")
        return self


class PruningInfo(Strict):
    """What structured pruning took from a layer; `remaining_channels` must equal the weights' first dimension."""

    type: Literal["structured"] = "structured"
    num_channels_pruned: Annotated[int, Field(ge=0)]
    remaining_channels: Size


class FileRecord(Strict):
    """A file of the submission."""

    sha256: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
    bytes: Annotated[int, Field(ge=0)]


class Quantization(Strict):
    """The scheme and, layer by layer, what is int8 and what stayed float and why."""

    scheme: Literal["none", "dynamic_int8", "static_int8"]
    layers: dict[str, str] = {}


class ModelMetadata(BaseModel):
    """`model_metadata.json`. Keys that we do not know are kept: submissions carry notes of their own.

    `parameters` counts every stored number; of an ONNX file those of its initializers. `runtime` is where an ONNX file is
    at its best, `portability` whether its accuracy also holds on CPUs whose int8 products saturate.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    schema_version: Literal[1] = Field(1, alias="schema")
    model_format: Literal["pytorch", "onnx"]
    architecture: str
    num_classes: Size
    class_names: list[str]
    architecture_file: FileName | None = Field(ARCHITECTURE_FILE, description="null for ONNX, whose graph is its own")
    weights_file: FileName
    input_shape: tuple[Size, Size, Size]
    preprocessing: Preprocessing
    quantization: Quantization
    parameters: int
    macs: int
    files: dict[FileName, FileRecord]
    accuracy: dict[str, Any] = {}
    latency: dict[str, Any] = {}
    runtime: Literal["onnxruntime", "openvino"] | None = None
    portability: dict[str, Any] | None = None
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _names_match(self) -> ModelMetadata:
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} names, num_classes is {self.num_classes}")
        if self.model_format == "pytorch" and not self.architecture_file:
            raise ValueError("model_format pytorch needs an architecture_file")
        for name in (self.architecture_file, self.weights_file):
            if name and name not in self.files:
                raise ValueError(f"files does not state the hash of {name}")
        return self


# ----------------------------------------------------------------------------------------- layer table and build


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


def build(architecture: Architecture) -> torch.fx.GraphModule:
    """Builds the module that an architecture describes, with the original layer names and fresh weights.

    The result trains, prunes, exports and takes `load_state_dict(strict=True)` like the module it was described from.

    Raises:
        VerificationError: a layer's name cannot be an attribute path of a module.
    """
    from torch import fx, nn

    graph = fx.Graph()
    nodes = {"input": graph.placeholder("input")}
    modules: dict[str, nn.Module] = {}
    for layer in architecture.layers:
        for part in layer.name.split("."):
            taken = part in ("training", "self") or hasattr(fx.GraphModule, part) or hasattr(nn.ModuleDict, part)
            if taken or keyword.iskeyword(part):
                raise VerificationError(f"layer {layer.name}: {part!r} is a name that torch modules keep to themselves")
        sources = [nodes[name] for name in layer.inputs]
        if isinstance(layer, FunctionLayer):
            node = graph.create_node("call_function", *layer.call(sources), name=layer.name)
        else:
            modules[layer.name] = layer.module()
            node = graph.create_node("call_module", layer.name, tuple(sources))
        node.meta["layer"] = layer.name
        nodes[layer.name] = node
    graph.output(node)
    kind = int8_graph() if architecture.is_int8 else fx.GraphModule
    return kind(modules, graph, class_name=architecture.model_type)


def check_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Runs the graph on the meta device, which allocates nothing, and returns each layer's output shape for one image.

    Raises:
        VerificationError: a layer cannot take what its inputs give (named), mixes the images of a batch, or is
            absurdly large; or the last layer's shape is not the declared one.
    """
    import torch

    shapes: dict[str, tuple[int, ...]] = {}
    count = total = 0
    with torch.device("meta"), torch.no_grad():
        values = {"input": torch.empty(2, *architecture.input_shape)}
        for layer in architecture.layers:
            inputs = [values[name] for name in layer.inputs]
            try:
                if isinstance(layer, FunctionLayer):
                    function, positional, options = layer.call(inputs)
                    output = function(*positional, **options)
                else:
                    module = layer.module().eval()
                    count += sum(tensor.numel() for tensor in module.state_dict().values())
                    output = module(*inputs)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise VerificationError(f"layer {layer.name} does not fit its inputs: {first_line(error)}") from error
            if output.dim() < 2 or len(output) != 2:
                raise VerificationError(f"layer {layer.name}: it mixes the images of a batch")
            if output.numel() > 2 * MAX_ACTIVATION_ELEMENTS:
                raise VerificationError(f"layer {layer.name}: an output of {output.numel() // 2:,} elements is over the "
                                        f"limit of {MAX_ACTIVATION_ELEMENTS:,}")
            total += output.numel() // 2
            if total > MAX_TOTAL_ELEMENTS:
                raise VerificationError(f"layer {layer.name}: {total:,} elements of output up to here are over the limit "
                                        f"of {MAX_TOTAL_ELEMENTS:,}")
            if count > MAX_WEIGHT_ELEMENTS:
                raise VerificationError(f"layer {layer.name}: {count:,} weights up to here are over the limit of "
                                        f"{MAX_WEIGHT_ELEMENTS:,}")
            values[layer.name] = output
            shapes[layer.name] = tuple(output.shape[1:])
    final = shapes[architecture.layers[-1].name]
    if final != architecture.output_shape:
        raise VerificationError(f"layer {architecture.layers[-1].name}: the output's shape is {list(final)}, declared "
                                f"is {list(architecture.output_shape)}")
    return shapes


# --------------------------------------------------------------------------------------------------- int8 layers


@dataclasses.dataclass(frozen=True)
class Int8Layers:
    """The int8 module classes and the function they share (their source also goes into a package's model.py)."""

    quantize_activations: Callable[[Tensor], tuple[Tensor, Tensor]]
    Int8Conv2d: type[nn.Module]
    Int8Linear: type[nn.Module]


@functools.cache
def int8_layers() -> Int8Layers:
    """The int8 layers, defined on first use because they need torch.

    Weights are int8 with one scale an output channel; activations are quantized to 8 bits at run time, with one range
    an image (the first dimension), so that a prediction never depends on the others of its batch. A layer whose
    activations are "float32" is int8 on disk alone. These modules are the definition, and what runs where there are no
    int8 kernels: the products are summed in float32, which is exact for integers up to 2^24. `Int8Graph` computes the
    same, fast. Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", eq. 1-7.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    def quantize_activations(input: Tensor) -> tuple[Tensor, Tensor]:
        """(N, ...) float -> integers held as float, zero point taken off, and their scale (N, 1, ...)."""
        dims = tuple(range(1, input.dim()))
        low = input.amin(dims, keepdim=True).clamp(max=0).double()
        high = input.amax(dims, keepdim=True).clamp(min=0).double()
        scale = ((high - low) / 255).clamp(min=1e-12)
        zero_point = (-low / scale).round()
        # Both ends of the range must fit beside the rounded zero point.
        scale = scale.maximum(high / (255 - zero_point).clamp(min=1)).maximum(-low / zero_point.clamp(min=1))
        return (input * (1 / scale).to(input.dtype)).round_(), scale.to(input.dtype)

    class Int8Conv2d(nn.Module):
        """Conv2d with int8 weights (a scale an output channel) and activations quantized at run time, or kept float."""

        def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int],
                     stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0),
                     dilation: tuple[int, int] = (1, 1), groups: int = 1, activations: str = "int8") -> None:
            super().__init__()
            shape = (out_channels, in_channels // groups, *kernel_size)
            self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
            self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
            self.activations = activations
            self.weight: Tensor  # buffers, not parameters: scoring harnesses read the first parameter's dtype
            self.weight_scale: Tensor
            self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
            self.register_buffer("weight_scale", torch.ones(out_channels))
            self.bias = nn.Parameter(torch.zeros(out_channels))

        def forward(self, input: Tensor) -> Tensor:
            if input.dim() == 3:  # an image without a batch
                image: Tensor = self.forward(input[None])[0]
                return image
            levels, scale = quantize_activations(input) if self.activations == "int8" else (input, 1.0)
            output = F.conv2d(levels, self.weight.to(levels.dtype), None, self.stride, self.padding, self.dilation,
                              self.groups)
            return output * (scale * self.weight_scale.view(-1, 1, 1)) + self.bias.view(-1, 1, 1)

    class Int8Linear(nn.Module):
        """Linear with int8 weights (a scale an output feature) and activations quantized at run time, or kept float."""

        def __init__(self, in_features: int, out_features: int, activations: str = "int8") -> None:
            super().__init__()
            self.in_features, self.out_features, self.activations = in_features, out_features, activations
            self.weight: Tensor
            self.weight_scale: Tensor
            self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
            self.register_buffer("weight_scale", torch.ones(out_features))
            self.bias = nn.Parameter(torch.zeros(out_features))

        def forward(self, input: Tensor) -> Tensor:
            levels, scale = quantize_activations(input) if self.activations == "int8" else (input, 1.0)
            return F.linear(levels, self.weight.to(levels.dtype)) * (scale * self.weight_scale) + self.bias

    return Int8Layers(quantize_activations, Int8Conv2d, Int8Linear)


# -------------------------------------------------------------------------------------------------- int8 kernels


@functools.cache
def no_int8_kernels() -> str:
    """Why the int8 layers of this process compute in float32; empty where oneDNN's int8 kernels serve them exactly.

    The kernels are tried on the largest values there are: without VNNI instructions, pairs of products saturate at 16 bits,
    and a model would answer differently from what was measured elsewhere.
    """
    import torch
    levels = torch.full((1, 64, 4, 4), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    weight, scale = torch.full((16, 64, 3, 3), 127, dtype=torch.int8), torch.ones(16)
    one, zero_points = [1, 1], torch.zeros(16, dtype=torch.long)
    try:
        ops = torch.ops.onednn
        packed = ops.qconv_prepack(weight, scale, 1.0, 0, one, one, one, 1, list(levels.shape))
        convolved = ops.qconv2d_pointwise(levels, 1.0, 0, packed, scale, zero_points, None, one, one, one, 1, 1.0, 0,
                                          torch.float32, "none", [], "")
        total = torch.ones_like(convolved)
        added = ops.qconv2d_pointwise.binary(levels, 1.0, 0, packed, scale, zero_points, total, None, one, one, one, 1, 1.0,
                                             0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "")
        row = levels[:, :, 0, 0].contiguous()
        packed = ops.qlinear_prepack(weight[:, :, 0, 0].contiguous(), list(row.shape))
        product = ops.qlinear_pointwise(row, 1.0, 0, packed, scale, zero_points, None, 1.0, 0, torch.float32, "none", [],
                                        "")
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        return f"this PyTorch has no int8 kernels for this CPU ({first_line(error)})"
    expected = torch.nn.functional.conv2d(levels.float(), weight.float(), padding=1)
    if not (torch.equal(convolved, expected) and torch.equal(added, expected + 1)
            and bool((product == 64 * 255 * 127).all())):
        return "this CPU's int8 kernels saturate (it has no VNNI instructions)"
    return ""


def int8_arithmetic(model: nn.Module) -> str | None:
    """How the model's int8 layers compute in this process, for reports; None where it has none."""
    kinds = (int8_layers().Int8Conv2d, int8_layers().Int8Linear)
    if not any(isinstance(module, kinds) for module in model.modules()):
        return None
    reason = no_int8_kernels()
    return f"in float32, with the same results to rounding: {reason}" if reason else "on oneDNN's int8 kernels"


def layer_by_layer(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model as its layers define it: without int8 kernels, where it would run on them."""
    return getattr(model, "layer_by_layer", model)


class NotFiniteError(ArithmeticError):
    """A tensor has no range to be quantized in."""


class QuantizedTensor:
    """A tensor, and its integers with their scale and zero point once somebody asks: all who use it share them.

    Args:
        tensor: (1, ...) float32.
        nonnegative: known to hold nothing below zero, such as a ReLU's output.
    """

    __slots__ = ("_parts", "nonnegative", "tensor")

    def __init__(self, tensor: Tensor, nonnegative: bool = False) -> None:
        self.tensor, self.nonnegative = tensor, nonnegative
        self._parts: tuple[Tensor, float, int] | None = None

    def parts(self) -> tuple[Tensor, float, int]:
        """Unsigned 8-bit integers of the tensor's shape, scale, zero point; see `Int8Layers.quantize_activations`.

        Raises:
            NotFiniteError: the tensor holds NaN or infinite values.
        """
        import torch
        if self._parts is None:
            high = max(self.tensor.amax().item(), 0.0)
            low = 0.0 if self.nonnegative else min(self.tensor.amin().item(), 0.0)
            if not math.isfinite(high - low):
                raise NotFiniteError
            scale = max((high - low) / 255, 1e-12)
            zero_point = round(-low / scale)
            scale = max(scale, high / max(255 - zero_point, 1), -low / max(zero_point, 1))
            # Beside 1.5 * 2^23 a float has no bits left for a fraction: adding it rounds, half to even, and the lowest
            # byte of the sum is the integer. Two passes over the tensor, both vectorised.
            shifted = torch.add(torch.tensor(12582912.0 + zero_point), self.tensor, alpha=1 / scale)
            self._parts = shifted.view(torch.int32).to(torch.uint8), scale, zero_point
        return self._parts


FUSED = {"ReLU": ("relu", []), "ReLU6": ("hardtanh", [0.0, 6.0]), "SiLU": ("swish", []), "Hardswish": ("hardswish", [])}
FUSED_WITH_ADD = {"ReLU": FUSED["ReLU"]}
NONNEGATIVE = {"ReLU", "ReLU6", "Sigmoid", "Hardsigmoid"}
KEEPS_SIGN = {"MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d", "Flatten", "Mean", "Add", "Multiply",
              "Concat"}


class Kernel:
    """A convolution or linear layer on oneDNN, packed for the shape of its first input, with what is fused behind it.

    Args:
        layer: Conv2d, Linear, Int8Conv2d or Int8Linear, on the CPU.
        activation: of `FUSED`, or None.
        adds: whether a second tensor is added, before the activation.
    """

    def __init__(self, layer: nn.Module, activation: str | None = None, adds: bool = False) -> None:
        self.layer, self.adds = layer, adds
        self.attribute = FUSED[activation] if activation else ("none", [])
        self.int8 = getattr(layer, "activations", "float32") == "int8"
        self.call: Callable[..., Tensor] | None = None
        self.shapes: tuple[torch.Size, torch.Size] | None = None  # of what is added to each other, at the first call

    def __call__(self, value: QuantizedTensor, other: Tensor | None = None) -> Tensor:
        """The layer's output; `other` may be overwritten with it."""
        shapes = None if other is None else (value.tensor.shape, other.shape)
        if self.call is None:
            self.call, self.shapes = self._packed(value.tensor, other), shapes
        elif shapes != self.shapes:  # with another size of image it may broadcast
            return self._broadcasting(value, other)
        return self.call(value, other)

    @functools.cached_property
    def _broadcasting(self) -> Callable[..., Tensor]:
        """The layer, then the addition for itself, of whatever shapes."""
        import torch
        alone, act = Kernel(self.layer), torch.relu_ if self.attribute[0] == "relu" else lambda x: x
        return lambda value, other: act(alone(value) + other)

    def _packed(self, tensor: Tensor, other: Tensor | None) -> Callable[..., Tensor]:
        import torch
        layer: Any = self.layer
        shape = list(tensor.shape)
        bias = None if layer.bias is None else layer.bias.detach()
        name, scalars = self.attribute
        weight = layer.weight.detach()
        if not self.int8 and weight.dtype == torch.int8:
            weight = weight.float() * layer.weight_scale.view(-1, *[1] * (weight.dim() - 1))
        float32, zero_points = torch.float32, torch.zeros(len(weight), dtype=torch.long)
        if weight.dim() == 2:
            if not self.int8:
                function = {"none": lambda x: x, "relu": torch.relu_}[name]
                return lambda value, other: function(torch.nn.functional.linear(value.tensor, weight, bias))
            scale, product = layer.weight_scale, torch.ops.onednn.qlinear_pointwise.default
            packed = torch.ops.onednn.qlinear_prepack(weight, shape)
            return lambda value, other: product(*value.parts(), packed, scale, zero_points, bias, 1.0, 0, float32, name,
                                                scalars, "")
        stride, padding, dilation = (list(pair) for pair in (layer.stride, layer.padding, layer.dilation))
        groups = layer.groups
        sizes = [(size + 2 * pad - reach * (kernel - 1) - 1) // step + 1 for size, pad, reach, kernel, step in
                 zip(shape[2:], padding, dilation, layer.kernel_size, stride, strict=True)]
        if other is not None and list(other.shape) != [shape[0], len(weight), *sizes]:  # broadcast: nothing to overwrite
            return self._broadcasting
        if self.int8:
            scale, ops = layer.weight_scale, torch.ops.onednn
            packed = ops.qconv_prepack(weight, scale, 1.0, 0, stride, padding, dilation, groups, shape)
            if self.adds:
                convolve_and_add = ops.qconv2d_pointwise.binary
                return lambda value, other: convolve_and_add(
                    *value.parts(), packed, scale, zero_points, other, bias, stride, padding, dilation, groups, 1.0, 0,
                    float32, 1.0, 0, "sum", 1.0, name, scalars, "")
            convolve = ops.qconv2d_pointwise.default
            return lambda value, other: convolve(*value.parts(), packed, scale, zero_points, bias, stride, padding,
                                                 dilation, groups, 1.0, 0, float32, name, scalars, "")
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, shape)
        if self.adds:
            after = name if name != "none" else None
            if other is tensor:  # it is still being read
                add = torch.ops.mkldnn._convolution_pointwise.binary
                return lambda value, other: add(value.tensor, other, packed, bias, padding, stride, dilation, groups, "add",
                                                1.0, after, scalars, "")
            add_to = torch.ops.mkldnn._convolution_pointwise_.binary
            return lambda value, other: add_to(other, value.tensor, packed, bias, padding, stride, dilation, groups, "add",
                                               1.0, after, scalars, "")
        plain = torch.ops.mkldnn._convolution_pointwise.default
        return lambda value, other: plain(value.tensor, packed, bias, padding, stride, dilation, groups, name, scalars, "")


@dataclasses.dataclass
class Step:
    """One call of a `Program`: registers in, register out, and the registers that nobody reads any more.

    `layer` names the layer with weights that the call is for, where it is for one.
    """

    function: Callable[..., Tensor]
    sources: list[int]
    target: int
    nonnegative: bool
    layer: str | None
    dead: list[int] = dataclasses.field(default_factory=list)


class Program:
    """A graph as a list of calls on oneDNN: convolutions with what follows them fused, channels last throughout.

    Args:
        model: as `build` makes them; its weights are packed at the first call.
    """

    def __init__(self, model: torch.fx.GraphModule) -> None:
        import torch
        from torch import fx, nn
        self.channels_last = torch.channels_last
        modules = dict(model.named_modules())
        graph = fx.Graph()
        graph.output(graph.graph_copy(model.graph, {}))
        for node in list(graph.nodes):  # what evaluation passes on as it is would only stand between what can be fused
            if node.op == "call_module" and type(modules[node.target]) in (nn.Dropout, nn.Identity):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        nodes = list(graph.nodes)
        kinds = {node: type(modules[node.target]).__name__ if node.op == "call_module" else _function_name(node)
                 for node in nodes}
        fused = _fuse(nodes, kinds)
        inner = {part for parts in fused.values() for part in (parts.layer, *parts.between)} - fused.keys()
        registers: dict[Any, int] = {}
        nonnegative: dict[Any, bool] = {}
        self.steps: list[Step] = []
        for node in nodes:
            if node.op == "output":
                self.output = registers[node.args[0]]
            elif node.op == "placeholder":
                registers[node], nonnegative[node] = 0, False
            elif node not in inner:
                registers[node] = len(registers)
                inputs = _inputs(node)
                nonnegative[node] = kinds[node] in NONNEGATIVE or (
                    node not in fused and kinds[node] in KEEPS_SIGN and all(nonnegative[source] for source in inputs))
                if node in fused:
                    parts = fused[node]
                    inputs = [parts.layer.args[0], *([] if parts.other is None else [parts.other])]
                    function: Callable[..., Tensor] = Kernel(modules[parts.layer.target], parts.activation,
                                                             parts.other is not None)
                elif node.op == "call_module":
                    function = modules[node.target]
                else:
                    function = functools.partial(_call_function, node)
                self.steps.append(Step(function, [registers[source] for source in inputs], registers[node],
                                       nonnegative[node], str(fused[node].layer.target) if node in fused else None))
        self.size = len(registers)
        last = {register: step for step in self.steps for register in step.sources}
        for register, step in last.items():
            if register != self.output:
                step.dead.append(register)

    def __call__(self, images: Tensor) -> Tensor:
        """(N, C, H, W) float32 -> (N, classes), image by image: each has ranges of its own.

        Raises:
            NotFiniteError: an image, or what an int8 layer reads, holds NaN or infinite values.
        """
        import torch
        with torch.no_grad():
            if not math.isfinite(images.sum().item()):  # fused activations take NaN for 0
                raise NotFiniteError
            rows = [self.one(images[index:index + 1]) for index in range(len(images))]
            return rows[0] if len(rows) == 1 else torch.cat(rows)

    def one(self, image: Tensor, watch: Callable[[Step, QuantizedTensor], None] = lambda step, source: None) -> Tensor:
        """One image; `watch` is told before each call which it is and what it is about to read."""
        values: list[Any] = [None] * self.size
        values[0] = QuantizedTensor(image.contiguous(memory_format=self.channels_last) if image.dim() == 4 else image)
        for step in self.steps:
            sources = [values[source] for source in step.sources]
            watch(step, sources[0])
            if step.layer is None:
                output = step.function(*[source.tensor for source in sources])
            else:
                output = step.function(sources[0], sources[1].tensor) if len(sources) > 1 else step.function(sources[0])
            values[step.target] = QuantizedTensor(output, step.nonnegative)
            for register in step.dead:
                values[register] = None
        return values[self.output].tensor  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class Fused:
    """A layer with weights and the nodes that one kernel does with it."""

    layer: Any
    between: tuple[Any, ...]  # nodes after the layer and before the last one
    other: Any | None  # what is added
    activation: str | None


def _fuse(nodes: list[Any], kinds: dict[Any, str]) -> dict[Any, Fused]:
    """Groups of nodes that are one kernel, by their last node."""
    weighted = {"Conv2d", "Linear", "Int8Conv2d", "Int8Linear"}
    order = {node: index for index, node in enumerate(nodes)}
    fused: dict[Any, Fused] = {}

    def only_user(node: Any) -> Any | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def latest(node: Any) -> int:
        """Where a layer's kernel runs at the latest: in the place of the last node that may be fused with it."""
        last, following = node, only_user(node)
        if following is not None and kinds[following] == "Add":
            last, following = following, only_user(following)
        return order[following if following is not None and kinds[following] in FUSED else last]

    adders = {}  # the addition -> the convolution whose kernel does it: the later of the two
    for node in nodes:
        if kinds[node] == "Add" and len(set(_inputs(node))) == 2:
            able = [source for source in _inputs(node) if kinds[source] in ("Conv2d", "Int8Conv2d")
                    and only_user(source) is node]
            able.sort(key=order.__getitem__)
            if able:
                other, = (source for source in _inputs(node) if source is not able[-1])
                # It is overwritten with the sum: it must be a tensor of its own that no other kernel reads afterwards.
                owned = kinds[other] in weighted | set(FUSED) | {"Add", "MaxPool2d", "AvgPool2d", "Multiply", "Concat"}
                if owned and all(user in (node, able[-1]) or (kinds[user] in weighted and latest(user) < order[node])
                                 for user in other.users):
                    adders[able[-1]] = node
    for node in nodes:
        if kinds[node] not in weighted:
            continue
        chain, other = [node], None
        if node in adders:
            chain.append(adders[node])
            other, = (source for source in _inputs(adders[node]) if source is not node)
        following = only_user(chain[-1])
        allowed = FUSED_WITH_ADD if other is not None or kinds[node].endswith("Linear") else FUSED
        activation = kinds[following] if following is not None and kinds[following] in allowed else None
        if activation:
            chain.append(following)
        fused[chain[-1]] = Fused(node, tuple(chain[1:-1]), other, activation)
    return fused


def _function_name(node: Any) -> str:
    """The layer table's name of a function's node."""
    import torch
    names = {operator.add: "Add", operator.mul: "Multiply", torch.mean: "Mean", torch.cat: "Concat"}
    return names.get(node.target, str(node.op))


def _inputs(node: Any) -> list[Any]:
    """The nodes that a node reads, in the order of its arguments, one that stands twice twice."""
    return list(node.args[0]) if isinstance(node.args[0], list | tuple) else [
        argument for argument in node.args if hasattr(argument, "all_input_nodes")]


def _call_function(node: Any, *tensors: Tensor) -> Tensor:
    """A function's node on other tensors than its own arguments, in their order."""
    if isinstance(node.args[0], list | tuple):
        return node.target(list(tensors), *node.args[1:], **node.kwargs)  # type: ignore[no-any-return]
    return node.target(*tensors, *node.args[len(tensors):], **node.kwargs)  # type: ignore[no-any-return]


class Contents:
    """What a model holds now, to tell later whether any of it was replaced or changed.

    A tensor that is put in the place of a `.data` is seen; what is written into one is not: torch keeps no account of that.
    """

    def __init__(self, model: nn.Module) -> None:
        import torch
        self.modules = list(model.modules())
        places = [(held, key, value) for module in self.modules for held in (module._modules, module._parameters,
                                                                              module._buffers)
                  for key, value in held.items()]
        places += [(module.__dict__, "activations", module.activations) for module in self.modules
                   if "activations" in module.__dict__]
        self.held, self.keys, self.values = zip(*places, strict=True)
        self.tensors = [value for value in self.values if isinstance(value, torch.Tensor)]
        self.counted = [tensor for tensor in self.tensors if not tensor.is_inference()]
        self.state = self._state()
        self.hooks_ever, self.watched = -1, False

    def _state(self) -> tuple[list[int], list[int]]:
        """Where each tensor lies, and how often it was changed in place, where torch counts that."""
        import torch
        return list(map(torch.Tensor.data_ptr, self.tensors)), list(map(operator.attrgetter("_version"), self.counted))

    def are_as_before(self) -> bool:
        """Whether the same modules and tensors stand in the same places, unchanged."""
        return all(map(operator.is_, map(dict.get, self.held, self.keys), self.values)) and self._state() == self.state

    def are_watched(self) -> bool:
        """Whether a module has hooks, which are to be called."""
        from torch.utils.hooks import RemovableHandle
        if self.watched or self.hooks_ever != RemovableHandle.next_id:  # the process's count; walking all modules is slow
            self.hooks_ever = RemovableHandle.next_id
            self.watched = any(module._forward_hooks or module._forward_pre_hooks for module in self.modules)
        return self.watched


@functools.cache
def int8_graph() -> type[torch.fx.GraphModule]:
    """The class of graphs with int8 layers, defined on first use because it needs torch."""
    import torch
    from torch import fx
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    class Int8Graph(fx.GraphModule):
        """A graph whose int8 layers run on int8 kernels where there are any: evaluation of float32 images on the CPU.

        Everything else, such as training mode, other devices, hooks and counting or tracing, takes the layers' own way.
        """

        program: Program | None = None
        contents: Contents | None = None  # of which the program was made

        def takes(self, images: Any) -> bool:
            """Whether they are images, or rows for a linear layer that is alone in its graph."""
            return type(images) is torch.Tensor and len(images) > 0 and (images.dim() == 4 or (
                images.dim() > 1 and all(isinstance(layer, int8_layers().Int8Linear) for layer in self.children())))

        def layer_by_layer(self, images: Tensor) -> Tensor:
            """What the layers themselves compute, which defines the result."""
            return super().__call__(images)  # type: ignore[no-any-return]

        def __call__(self, *inputs: Any, **options: Any) -> Any:
            images: Any = inputs[0] if len(inputs) == 1 and not options else None
            if (self.takes(images) and images.dtype == torch.float32 and images.device.type == "cpu"
                    and not self.training and not torch.compiler.is_compiling() and not torch._C._is_tracing()
                    and _get_current_dispatch_mode() is None and not no_int8_kernels()):
                if self.contents is None or not self.contents.are_as_before():
                    self.program, self.contents = None, Contents(self)
                if not self.contents.are_watched():
                    if self.program is None:  # a module's attributes are slow to set
                        self.program = Program(self)
                    with contextlib.suppress(NotFiniteError):  # fused activations could hide it
                        return self.program(images)
            return super().__call__(*inputs, **options)

        def recompile(self) -> Any:
            self.program = None
            return super().recompile()

        def __deepcopy__(self, memo: Any) -> Any:
            self.program = self.contents = None  # packed weights cannot be copied
            return super().__deepcopy__(memo)

    return Int8Graph


# ----------------------------------------------------------------------------------------------- read and verify


def read_json(path: Path, schema: type[BaseModel]) -> Any:
    """Reads a JSON file into a schema.

    Raises:
        VerificationError: missing, not JSON, or not of the schema; the message names the file and the key.
    """
    try:
        if not path.is_file():
            raise VerificationError(f"{path}: " + ("not a plain file" if path.exists() else "there is no such file"))
        if path.stat().st_size > MAX_JSON_BYTES:
            raise VerificationError(f"{path}: {path.stat().st_size:,} bytes are over JSON's limit of {MAX_JSON_BYTES:,}")
        return schema.model_validate(json.loads(path.read_bytes()))
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise VerificationError(f"{path}: {describe_validation_error(error)}") from error
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{path}: not valid JSON: {first_line(error)}") from error


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a submission names.

    Raises:
        VerificationError: the name, or a link behind it, leaves the folder.
    """
    path = folder / name
    try:
        lies_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # links that go in circles
        raise VerificationError(f"{folder}: {name!r} cannot be resolved: {first_line(error)}") from error
    if not lies_inside:
        raise VerificationError(f"{folder}: {name!r} lies outside the submission")
    return path


def load_tensors(path: Path) -> Any:
    """What `torch.save` wrote, if it is tensors in plain containers (`weights_only`, so no code can run).

    Raises:
        VerificationError: missing, truncated, or it holds objects other than tensors and plain values.
    """
    import torch
    if not path.is_file():
        raise VerificationError(f"{path}: there is no such file")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise VerificationError(f"{path}: its members are compressed, which torch.save never does")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about tensors that are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError, MemoryError, struct.error,
            torch._weights_only_unpickler.UnpicklingError) as error:  # type: ignore[attr-defined]
        raise VerificationError(f"{path}: not a PyTorch state dict that holds only tensors: "
                                f"{first_line(error)}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict: named dense tensors with finite values, and nothing else.

    Raises:
        VerificationError: not readable, see `load_tensors`, or not a state dict.
    """
    return check_tensors(load_tensors(path), str(path))


def check_tensors(weights: Any, where: str) -> dict[str, Tensor]:
    """Holds what was read to be a state dict.

    Raises:
        VerificationError: something is no tensor, not in memory, not dense, or not finite.
    """
    import torch
    if not isinstance(weights, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()):
        raise VerificationError(f"{where}: expected a state dict (names to tensors), got {type(weights).__name__}")
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise VerificationError(f"{where}: tensor {name} is no plain dense tensor ({tensor.layout}, {tensor.device})")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise VerificationError(f"{where}: tensor {name} holds NaN or infinite values")
    return dict(weights)  # an OrderedDict's attributes are not data


def load_verified(architecture: Architecture, weights: dict[str, Tensor], where: str) -> torch.fx.GraphModule:
    """Builds the architecture around the weights, after checking every name, shape, dtype and value.

    Raises:
        VerificationError: the weights do not bear out the architecture; the first tensor at fault is named.
    """
    import torch
    with torch.device("meta"):
        model = build(architecture)
    expected = model.state_dict()
    for name in expected.keys() - weights.keys():
        raise VerificationError(f"{where}: tensor {name} is missing")
    for name in weights.keys() - expected.keys():
        raise VerificationError(f"{where}: tensor {name} belongs to no layer of the architecture")
    for name, tensor in weights.items():
        want = expected[name]
        if tensor.shape != want.shape:
            raise VerificationError(f"{where}: tensor {name} is {list(tensor.shape)}, the architecture says "
                                    f"{list(want.shape)}")
        if tensor.dtype != want.dtype:
            raise VerificationError(f"{where}: tensor {name} is {tensor.dtype}, expected {want.dtype}")
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


@dataclasses.dataclass(frozen=True)
class SubmissionFiles:
    """A submission whose JSON files were read and whose files are what its metadata states.

    Args:
        kind: "graph" (architecture JSON and `.pth`), "onnx", or "code" (the original style: its own model.py).
        metadata: None for the original style.
        class_names: None where the submission does not say.
        preprocessing_from: which file states the preprocessing, or that it is the original's default.
        model_class: the class in model.py, where the metadata names one.
    """

    folder: Path
    kind: Literal["graph", "onnx", "code"]
    weights: Path
    input_shape: tuple[int, int, int]
    preprocessing: Preprocessing
    preprocessing_from: str
    num_classes: int | None = None
    class_names: list[str] | None = None
    metadata: ModelMetadata | None = None
    architecture: Architecture | None = None
    architecture_path: Path | None = None
    metadata_path: Path | None = None
    model_class: str | None = None

    def needed(self) -> list[Path]:
        """The files that inference needs; code can read whatever lies beside it."""
        if self.kind == "code":
            return submission_files(self.folder)
        return [path for path in (self.weights, self.architecture_path, self.metadata_path) if path and path.is_file()]

    def size_bytes(self) -> int:
        """What model_size counts: the weights; with code, which can read them, all files but source, JSON and prose."""
        files = self.needed() if self.kind == "code" else [self.weights]
        return sum(path.stat().st_size for path in files if path == self.weights or path.suffix not in PROSE)


def submission_files(folder: Path) -> list[Path]:
    """Every file of a submission, sorted.

    Raises:
        VerificationError: a link leaves the folder, or something is neither a file nor a folder.
    """
    files = []
    for path in sorted(folder.rglob("*")):
        inside(folder, str(path.relative_to(folder)))
        if path.is_file():
            files.append(path)
        elif not path.is_dir():
            raise VerificationError(f"{path}: neither a file nor a folder")
    return files


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by its name within."""
    return {str(path.relative_to(folder)): sha256(path) for path in submission_files(folder)}


def combined_hash(hashes: dict[str, str]) -> str:
    """One hash over the names and hashes of a folder's files."""
    digest = hashlib.sha256()
    for name, value in hashes.items():
        digest.update(f"{name}\0{value}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_submission(folder: str | Path) -> SubmissionFiles:
    """Reads a submission folder's JSON files, and checks the other files against what they claim.

    A metadata file with a `schema` is ours; one without is the original style's, which the toolkit reads.

    Raises:
        UserError: the folder does not exist.
        VerificationError: a file is missing, malformed, outside the folder or not the one that was packaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--submission_dir {folder}: there is no such folder")
    path = next((folder / name for name in ORIGINAL_METADATA_FILES if (folder / name).exists()), folder / METADATA_FILE)
    content: dict[str, Any] = read_json(inside(folder, path.name), RootModel[dict[str, Any]]).root
    if "schema" in content:
        return _read_packaged(folder, path)
    original = toolkit(f"{path} has no schema, so this is the original style, which", "original")
    return original.read_original(folder, path)  # type: ignore[no-any-return]


def _read_packaged(folder: Path, path: Path) -> SubmissionFiles:
    metadata: ModelMetadata = read_json(path, ModelMetadata)
    where = inside(folder, metadata.architecture_file) if metadata.architecture_file else None
    architecture: Architecture | None = read_json(where, Architecture) if where else None
    for name, record in metadata.files.items():
        listed = inside(folder, name)
        if not listed.is_file():
            raise VerificationError(f"{listed}: {path.name} lists this file, but it is not there")
        if record.bytes > MAX_FILE_BYTES:
            raise VerificationError(f"{listed}: {record.bytes:,} bytes are over the limit of {MAX_FILE_BYTES:,}")
        if listed.stat().st_size != record.bytes or sha256(listed) != record.sha256:
            raise VerificationError(f"{listed}: its bytes are not those that {path.name} states (sha256)")
    kind: Literal["graph", "onnx"] = "onnx" if metadata.model_format == "onnx" else "graph"
    if architecture and where:
        for key, stated in (("num_classes", metadata.num_classes), ("input_shape", metadata.input_shape)):
            if stated != getattr(architecture, key):
                raise VerificationError(f"{folder}: {key} is {stated} in {path.name} and {getattr(architecture, key)} in "
                                        f"{where.name}")
        if metadata.architecture != architecture.model_type:
            raise VerificationError(f"{folder}: the architecture is {metadata.architecture} in {path.name} and "
                                    f"{architecture.model_type} in {where.name}")
    return SubmissionFiles(folder, kind, inside(folder, metadata.weights_file), metadata.input_shape,
                           metadata.preprocessing, path.name, metadata.num_classes, metadata.class_names, metadata,
                           architecture if kind == "graph" else None, where, path)


def open_submission(files: SubmissionFiles) -> nn.Module:
    """The model of a graph submission, after checking that it bears out what the metadata claims of it.

    Raises:
        UserError: the submission is of another kind.
        VerificationError: weights, counts or the table of int8 layers are not as stated.
    """
    metadata, architecture = files.metadata, files.architecture
    if metadata is None or architecture is None:
        raise UserError(f"{files.folder}: no PyTorch graph of ours but {files.kind}; it can be evaluated, not loaded")
    model = open_model(architecture, files.weights)
    check_claims(files, count_parameters(model), count_macs(model, metadata.input_shape))
    weighted = {layer.name: layer.type.startswith("Int8") for layer in architecture.layers if layer.width}
    stated_int8 = {name: text.startswith("int8") for name, text in metadata.quantization.layers.items()}
    scheme = "dynamic_int8" if architecture.is_int8 else "none"
    if stated_int8 != weighted or metadata.quantization.scheme != scheme:
        odd = min((name for name in weighted.keys() | stated_int8.keys() if weighted.get(name) != stated_int8.get(name)),
                  default="scheme")
        raise VerificationError(f"{files.folder}: quantization in {METADATA_FILE} is not what the layers are ({odd})")
    return model


def check_claims(files: SubmissionFiles, parameters: int, macs: int | None) -> None:
    """Holds the metadata's counts to those of the model.

    Raises:
        VerificationError: they differ.
    """
    if files.metadata is None:
        return
    for claim, stated, counted in (("parameters", files.metadata.parameters, parameters),
                                   ("macs", files.metadata.macs, macs)):
        if counted is not None and stated != counted:
            raise VerificationError(f"{files.folder}: {METADATA_FILE} states {stated:,} {claim}, the model has {counted:,}")


def open_model(architecture: Architecture, weights: Path) -> torch.fx.GraphModule:
    """The verified model of an architecture and a weights file, whose sizes are checked before the file is read.

    Raises:
        VerificationError: the weights do not bear out the architecture, or one image would take absurdly long.
    """
    import torch
    check_shapes(architecture)
    with torch.device("meta"):
        empty = build(architecture).eval()
        if not empty.state_dict():
            raise VerificationError(f"{weights}: the architecture has no layer with weights")
        macs = count_macs(empty, architecture.input_shape)
    if macs > MAX_MACS:
        raise VerificationError(f"{weights}: {macs:,} multiply-adds an image are over the limit of {MAX_MACS:,}")
    needed = sum(tensor.numel() * tensor.element_size() for tensor in empty.state_dict().values())
    if weights.is_file() and weights.stat().st_size > 2 * needed + 2**20:
        raise VerificationError(f"{weights}: the file has {weights.stat().st_size:,} bytes, its tensors need {needed:,}")
    return load_verified(architecture, read_weights(weights), str(weights))


def load_model(model_path: str | Path) -> nn.Module:
    """Loads a packaged model, verified, in eval mode, on the CPU. Evaluation panels call this.

    Takes the weights file or the submission folder; the architecture JSON lies beside the weights. The module maps
    `(N, C, H, W)` float32, preprocessed as the metadata says, to `(N, num_classes)` logits.

    Raises:
        UserError: the path does not exist, or is a submission of another kind.
        VerificationError: the weights do not bear out the architecture.
    """
    path = Path(model_path)
    if path.is_dir():
        model = open_submission(read_submission(path))
    elif path.exists():
        model = open_model(read_json(path.parent / ARCHITECTURE_FILE, Architecture), path)
    else:
        raise UserError(f"{path}: there is no such file")
    if (computed := int8_arithmetic(model)) and no_int8_kernels():
        logging.getLogger(__name__).warning("%s: the int8 layers compute %s", path, computed)
    return model


# ---------------------------------------------------------------------------------------------------------- ONNX

# The operators of image classifiers. Others stay out: a runtime's rarer kernels are where hostile files crash it.
_OPERATORS = """
    Abs Add ArgMax AveragePool BatchNormalization Cast Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvInteger
    DepthToSpace DequantizeLinear Div Dropout DynamicQuantizeLinear Elu Equal Erf Exp Expand Flatten Floor Gather Gelu
    Gemm GlobalAveragePool GlobalMaxPool Greater GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization
    LayerNormalization LeakyRelu Less Log LogSoftmax MatMul MatMulInteger Max MaxPool Mean Min Mish Mul Neg PRelu Pad Pow
    QLinearConv QLinearMatMul QuantizeLinear Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape
    Resize Round Selu Shape Sigmoid Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh Transpose
    Unsqueeze Where"""
_CONTRIBUTED = """
    DynamicQuantizeMatMul FusedConv FusedGemm FusedMatMul MatMulIntegerToFloat QGemm QLinearAdd QLinearAveragePool
    QLinearConcat QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearSigmoid"""
ONNX_OPERATORS = {"": _OPERATORS.split(), "ai.onnx": _OPERATORS.split(), "com.microsoft": _CONTRIBUTED.split()}
# Which input's shape holds the factors of one output's products: a weight (out, in/groups, ...), or rows of a matrix.
ONNX_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "FusedConv": 1, "QLinearConv": 3}
ONNX_PRODUCTS = {"Gemm", "FusedGemm", "MatMul", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul", "FusedMatMul"}


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """What a checked ONNX file holds.

    Args:
        macs: None where a shape that counts is not known before running.
        layers: the convolutions and matrix products, by name, and whether both their factors are 8-bit integers.
    """

    input_name: str
    parameters: int
    macs: int | None
    layers: dict[str, bool]


def read_onnx(path: Path, input_shape: Sequence[int]) -> OnnxFile:
    """Checks an ONNX file without running it: one image (C, H, W) in, one row of logits out, nothing outside the file.

    Raises:
        UserError: the packages that it takes are not installed.
        VerificationError: not ONNX, external data, operators outside the tables above, several inputs or outputs, NaN or
            infinite weights, absurd sizes.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError(f"{path}: an ONNX submission needs the packages onnx and onnxruntime; "
                        "pip install onnx onnxruntime") from error
    from google.protobuf.message import DecodeError

    if path.stat().st_size >= 2**31:
        raise VerificationError(f"{path}: {path.stat().st_size:,} bytes; an ONNX file without external data has under 2 GB")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, RecursionError, ValueError, TypeError) as error:
        raise VerificationError(f"{path}: not an ONNX file: {first_line(error)}") from error
    graph = model.graph
    tensors = [*graph.initializer, *(attribute.t for node in graph.node for attribute in node.attribute
                                     if attribute.type == onnx.AttributeProto.TENSOR)]
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise VerificationError(f"{path}: tensor {tensor.name!r} lies in another file; store all data in this one")
    if model.functions or graph.sparse_initializer:
        raise VerificationError(f"{path}: local functions and sparse weights are not supported; export plain operators")
    for node in graph.node:
        complete = node.output and (node.input or node.op_type == "Constant")
        if node.op_type not in ONNX_OPERATORS.get(node.domain, ()) or not complete:
            raise VerificationError(f"{path}: operator {node.op_type} of node {node.name!r} (domain {node.domain!r}) is "
                                    "not one of those that image classifiers are made of")
        if node.op_type == "Constant" and any(attribute.name != "value" for attribute in node.attribute):
            raise VerificationError(f"{path}: node {node.name!r}: store a Constant's numbers as its tensor 'value'")
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise VerificationError(f"{path}: expected one input and one output, got {len(inputs)} and {len(graph.output)}")
    for tensor in tensors:
        try:
            values = onnx.numpy_helper.to_array(tensor)
        except (ValueError, TypeError, OverflowError, KeyError) as error:
            raise VerificationError(f"{path}: tensor {tensor.name!r} is not what it says: {first_line(error)}") from error
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise VerificationError(f"{path}: tensor {tensor.name!r} holds NaN or infinite values")
    declared = inputs[0].type.tensor_type
    if declared.elem_type != onnx.TensorProto.FLOAT or len(declared.shape.dim) != 4:
        raise VerificationError(f"{path}: the input must be float32 (N, C, H, W)")
    if graph.output[0].type.tensor_type.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
        raise VerificationError(f"{path}: the output must be float logits (N, classes)")
    # One image of the stated size, so that every later shape can be inferred; the file itself stays as it is.
    for dim, size in zip(declared.shape.dim, (1, *input_shape), strict=True):
        if not dim.dim_value or size == 1:
            dim.dim_value = size
    del graph.value_info[:]
    try:
        onnx.checker.check_model(model)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise VerificationError(f"{path}: not a valid ONNX graph: {first_line(error)}") from error
    shapes, total = {tensor.name: list(tensor.dims) for tensor in graph.initializer}, 0
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims) and value.type.tensor_type.HasField("shape"):
            shapes[value.name] = [dim.dim_value for dim in dims]
            elements = math.prod(shapes[value.name])
            total += elements
            if elements > MAX_ACTIVATION_ELEMENTS or total > MAX_TOTAL_ELEMENTS:
                raise VerificationError(f"{path}: {value.name!r} has {elements:,} elements, {total:,} with those before, "
                                        f"over the limits of {MAX_ACTIVATION_ELEMENTS:,} and {MAX_TOTAL_ELEMENTS:,}")
    macs = _onnx_macs(graph.node, shapes)
    if macs is not None and macs > MAX_MACS:
        raise VerificationError(f"{path}: {macs:,} multiply-adds an image are over the limit of {MAX_MACS:,}")
    return OnnxFile(inputs[0].name, sum(math.prod(tensor.dims) for tensor in tensors), macs, _onnx_layers(graph))


def _onnx_layers(graph: Any) -> dict[str, bool]:
    """The convolutions and matrix products, by the name of the node: True where integers are multiplied."""
    from onnx import TensorProto
    integers = {tensor.name for tensor in graph.initializer if tensor.data_type in (TensorProto.INT8, TensorProto.UINT8)}
    restored: set[str] = set()  # tensors that come out of 8-bit integers
    layers = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            integers.add(node.output[0])
        elif node.op_type == "DequantizeLinear" and node.input[0] in integers:
            restored.add(node.output[0])
        elif node.op_type in ONNX_CONVOLUTIONS or node.op_type in ONNX_PRODUCTS:
            by_itself = node.op_type not in ("Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul")
            layers[node.name] = by_itself or set(node.input[:2]) <= restored
    return layers


def _onnx_macs(nodes: Any, shapes: dict[str, list[int]]) -> int | None:
    total = 0
    for node in nodes:
        if node.op_type not in ONNX_CONVOLUTIONS and node.op_type not in ONNX_PRODUCTS:
            continue
        factors = shapes.get(node.input[ONNX_CONVOLUTIONS.get(node.op_type, 0)])
        output = shapes.get(node.output[0])
        if factors is None or output is None:
            return None
        if node.op_type in ONNX_CONVOLUTIONS:
            total += math.prod(output) * math.prod(factors[1:])
        else:
            transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            total += math.prod(output) * factors[-2 if transposed else -1]
    return total


# ------------------------------------------------------------------------------------------------------ runtimes


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a submission is measured.

    Args:
        runs: timed calls at batch 1.
        warmup: calls before them.
        threads: of one inference; 1 is the most comparable between machines.
        batch_size: for the accuracy alone.
        min_accuracy: percent; below it the guarded score is zero.
        time_limit_s: for everything that is asked of a submission.
        memory_limit_mb: beyond what the evaluator has before it opens the submission.
    """

    runs: int = 130  # what a p95 needs
    warmup: int = 10
    threads: int = 1
    backend: str = "auto"
    batch_size: int = 1
    min_accuracy: float = 0.0
    allow_code: bool = False
    time_limit_s: float = 3600.0
    memory_limit_mb: int = 4096

    def check(self) -> None:
        """Raises UserError for what cannot be meant."""
        for name, low, high in (("runs", 1, 10**6), ("warmup", 0, 10**6), ("threads", 1, 1024), ("batch_size", 1, 4096),
                                ("memory_limit_mb", 256, 2**20)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name}: expected {low} to {high}, got {getattr(self, name)}")
        if not 0 <= self.min_accuracy <= 100:
            raise UserError(f"--min_accuracy: expected a percentage, got {self.min_accuracy}")
        if not 0 < self.time_limit_s <= 10**7:
            raise UserError(f"--time_limit_s: expected a positive number of seconds up to 10^7, got {self.time_limit_s}")


class Runtime:
    """A submission that answers: (N, C, H, W) float32 -> (N, classes) logits.

    Attributes:
        backend: "torch", "onnxruntime" or "openvino".
        parameters: "all" stored numbers, and the "trainable" ones where that is known.
        macs: multiply-adds an image, where known.
        errors: what a call may raise when the model cannot answer.
        details, warnings: for the result.
    """

    errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, MemoryError)

    def __init__(self, backend: str, parameters: dict[str, int | None], macs: int | None) -> None:
        self.backend, self.parameters, self.macs = backend, parameters, macs
        self.name = "the model"  # for messages
        self.details: dict[str, Any] = {}
        self.warnings: list[str] = []

    def __call__(self, images: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None:
        """Ends what was started, and notes what can only be known at the end."""


class TorchRuntime(Runtime):
    """A graph of ours."""

    def __init__(self, files: SubmissionFiles) -> None:
        import torch
        self.model = open_submission(files)
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        super().__init__("torch", {"all": count_parameters(self.model), "trainable": trainable},
                         count_macs(self.model, files.input_shape))
        if computed := int8_arithmetic(self.model):
            self.details["int8_arithmetic"] = computed
            if no_int8_kernels():
                self.warnings.append(f"the int8 layers were computed {computed}")
        self._mode, self._tensor = torch.inference_mode, torch.from_numpy

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with self._mode():
            return self.model(self._tensor(images)).numpy()  # type: ignore[no-any-return]


class OnnxFileRuntime(Runtime):
    """What both runtimes of an ONNX file begin with: the file is checked, and its claims."""

    def __init__(self, backend: str, files: SubmissionFiles) -> None:
        self.file = read_onnx(files.weights, files.input_shape)
        check_claims(files, self.file.parameters, self.file.macs)
        if files.metadata and files.metadata.quantization.scheme == "static_int8":
            stated = {name: text.startswith("int8") for name, text in files.metadata.quantization.layers.items()}
            odd = min((name for name in stated.keys() | self.file.layers.keys()
                       if stated.get(name) != self.file.layers.get(name)), default=None)
            if odd is not None:
                raise VerificationError(f"{files.folder}: quantization in {METADATA_FILE} is not what the layers are "
                                        f"({odd})")
        super().__init__(backend, {"all": self.file.parameters, "trainable": None}, self.file.macs)


class OnnxRuntime(OnnxFileRuntime):
    """An ONNX file on ONNX Runtime's CPU provider."""

    def __init__(self, files: SubmissionFiles, threads: int) -> None:
        super().__init__("onnxruntime", files)
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state
        self.errors = (RuntimeError, ValueError, *(kind for kind in vars(state).values()
                                                   if isinstance(kind, type) and issubclass(kind, Exception)))
        try:
            self.session = onnxruntime.InferenceSession(str(files.weights), onnxruntime_options(threads),
                                                        ["CPUExecutionProvider"])
        except self.errors as error:
            raise VerificationError(f"{files.weights}: ONNX Runtime cannot load it: {first_line(error)}") from error

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.session.run(None, {self.file.input_name: images})[0]  # type: ignore[no-any-return]


def onnxruntime_options(threads: int) -> Any:
    """ONNX Runtime's session options: so many threads, silent, and integer products that are exact on every CPU.

    Without VNNI instructions its fast kernel saturates in 16 bits. An option makes it take the exact one there; it is not
    set elsewhere, for it halves the speed where the fast one is exact anyway.
    """
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    if not {"avx512_vnni", "avx_vnni"} & set(machine()["flags"]):
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


class OpenvinoRuntime(OnnxFileRuntime):
    """An ONNX file on OpenVINO's CPU plugin, compiled for the number of images in a call: fixed shapes are faster."""

    def __init__(self, files: SubmissionFiles, threads: int) -> None:
        super().__init__("openvino", files)
        self.threads, self.path, self.shape = threads, files.weights, files.input_shape
        self.content = files.weights.read_bytes()  # the file may be gone when another number of images comes
        self.compiled: dict[int, Any] = {}
        self._compile(1)

    def _compile(self, images: int) -> Any:
        try:
            self.compiled[images] = compile_for_openvino(self.content, [images, *self.shape], self.threads)
        except RuntimeError as error:
            raise VerificationError(f"{self.path}: OpenVINO cannot load it: {first_line(error)}") from error
        return self.compiled[images]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        model = self.compiled.get(len(images)) or self._compile(len(images))
        return next(iter(model(images).values()))


def compile_for_openvino(model: Any, shape: Sequence[int], threads: int, **options: Any) -> Any:
    """A model, or an ONNX file's bytes, compiled for OpenVINO's CPU plugin: for inputs of one shape, at short latency.

    Raises:
        UserError: OpenVINO is not installed.
        RuntimeError: it cannot compile the model.
    """
    core = _core(import_openvino())
    if isinstance(model, bytes):
        model = core.read_model(model)
    model.reshape(list(shape))
    return core.compile_model(model, "CPU", {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32", **options})  # its default may compute in less than float32


@functools.cache
def _core(openvino: Any) -> Any:
    """OpenVINO's runtime, which is to live as long as what it compiled: one for the process."""
    return openvino.Core()


def import_openvino() -> Any:
    """The openvino package, with its telemetry off: on import it would report to an analytics server.

    Raises:
        UserError: it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # openvino falls back to a stub
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise UserError("backend openvino: the package is not installed; pip install openvino") from error


def toolkit(flag: str, module: str) -> Any:
    """A module of the toolkit's `compress.evaluation`, for the flag that asks for it.

    Raises:
        UserError: this file stands alone.
    """
    home = Path(__file__).resolve().parent
    if not (home / "compress" / "evaluation" / f"{module}.py").is_file():
        raise UserError(f"{flag} needs the toolkit: this {Path(__file__).name} stands alone; run the toolkit's own copy")
    if str(home) not in sys.path:
        sys.path.insert(0, str(home))
    sys.modules.setdefault("model_loader", sys.modules[__name__])  # run as a script, its classes must not exist twice
    return importlib.import_module(f"compress.evaluation.{module}")


BACKENDS = {"graph": ("torch",), "onnx": ("onnxruntime", "openvino"), "code": ("torch",)}


def open_runtime(files: SubmissionFiles, settings: Settings, classes: int, data_dir: Path) -> Runtime:
    """Starts a submission on the backend that was asked for.

    Raises:
        UserError: a backend that cannot run this kind, or code without --allow_code.
        VerificationError: the submission does not hold what it claims, or cannot be loaded.
    """
    known = BACKENDS[files.kind]
    backend = preferred_backend(files) if settings.backend == "auto" else settings.backend
    if backend not in known:
        raise UserError(f"--backend {backend}: {files.weights.name} runs on {' or '.join(known)}")
    if files.kind == "graph":
        return TorchRuntime(files)
    if files.kind == "onnx":
        return (OnnxRuntime if backend == "onnxruntime" else OpenvinoRuntime)(files, settings.threads)
    if not settings.allow_code:
        raise UserError(f"{files.folder}: this submission is code (model.py); it runs, in a process with limits, only with "
                        "--allow_code")
    if settings.batch_size != 1:
        raise UserError(f"--batch_size {settings.batch_size}: code is graded at batch 1, so that its timed calls and its "
                        "graded ones cannot be told apart")
    return toolkit("--allow_code", "sandbox").open_code(files, settings, classes, data_dir)  # type: ignore[no-any-return]


def preferred_backend(files: SubmissionFiles) -> str:
    """The backend that a submission names as its own, where that is installed; else the first of its kind."""
    named = files.metadata.runtime if files.metadata else None
    if files.kind == "onnx" and named and (named != "openvino" or importlib.util.find_spec("openvino")):
        return named
    return BACKENDS[files.kind][0]


def open_onnx(path: Path, input_shape: tuple[int, int, int], preprocessing: Preprocessing, backend: str = "onnxruntime",
              threads: int = 1) -> Runtime:
    """An ONNX file that is not packaged yet, on a runtime: the same one that will serve the package.

    Raises:
        UserError: the backend is not installed.
        VerificationError: the file cannot be loaded, see `read_onnx`.
    """
    files = SubmissionFiles(path.parent, "onnx", path, input_shape, preprocessing, "the pipeline")
    runtime = (OnnxRuntime if backend == "onnxruntime" else OpenvinoRuntime)(files, threads)
    runtime.name = str(path)
    return runtime


def answering(runtime: Runtime) -> Callable[[Tensor], Tensor]:
    """A runtime as a function of tensors, for `measure_accuracy` and `measure_latency`."""
    import torch

    def answer(images: Tensor) -> Tensor:
        return torch.from_numpy(runtime(images.numpy()))

    return answer


@contextlib.contextmanager
def memory_limit(megabytes: int) -> Iterator[None]:
    """Inside, this process cannot get more than that much further address space (where the system can tell and limit).

    Raises:
        VerificationError: what runs inside needs more.
    """
    try:
        import resource
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + megabytes * 2**20
    if before[1] != resource.RLIM_INFINITY:
        limit = min(limit, before[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    except (MemoryError, SystemError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise
        raise VerificationError(f"the submission needs more than --memory_limit_mb {megabytes}") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# -------------------------------------------------------------------------------------------------------- images


def list_images(folder: str | Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """Lists an image folder, `<folder>/<class>/<image>`: the sorted class names, and (path, class index) in order.

    Raises:
        UserError: no folder, no classes, or a class without images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such data folder; expected {folder}/<class>/<image>")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{folder}: no class folders in it; expected {folder}/<class>/<image>")
    images: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        paths = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
                       and not path.name.startswith("."))
        if not paths:
            raise UserError(f"{folder / name}: the class has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        images += [(path, label) for path in paths]
    return classes, images


def decode_image(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    """Decodes, converts, resizes and crops an image file: (C, H, W) uint8. Same pixels as torchvision's transforms.

    Raises:
        UserError: not an image, cut short, or smaller than the crop.
    """
    from PIL import Image, UnidentifiedImageError
    try:
        with Image.open(path) as opened:
            image = opened.convert(preprocessing.mode)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image, or cut short: {first_line(error)}") from error
    if preprocessing.resize and min(image.size) != preprocessing.resize:
        width, height = image.size
        side, shorter = preprocessing.resize, min(image.size)
        image = image.resize((side * width // shorter, side * height // shorter), Image.Resampling.BILINEAR)
    if preprocessing.crop:
        width, height = image.size
        crop = preprocessing.crop
        if min(width, height) < crop:
            raise UserError(f"{path}: the image is {width}x{height}, smaller than the crop of {crop}x{crop}")
        left, top = round((width - crop) / 2), round((height - crop) / 2)
        image = image.crop((left, top, left + crop, top + crop))
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(N, C, H, W) uint8 -> float32, scaled to [0, 1], mean taken off, divided by std."""
    import torch
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1).expand(1, *images.shape[1:])
                 .contiguous(memory_format=layout) for values in (preprocessing.mean, preprocessing.std))
    # As large as an image, because subtracting three numbers from every three is ten times slower than from a row.
    return images.float().div_(255).sub_(mean).div_(std)


def read_images(paths: Sequence[Path], preprocessing: Preprocessing) -> np.ndarray:
    """(N, C, H, W) float32, decoded and normalised.

    Raises:
        UserError: an image is unreadable, or the images differ in size.
    """
    arrays = [decode_image(path, preprocessing) for path in paths]
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise UserError(f"{path}: the image is {array.shape[1:]}, others are {arrays[0].shape[1:]}, and the "
                            "preprocessing has neither resize nor crop")
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return (np.stack(arrays).astype(np.float32) / np.float32(255) - mean) / std


# ------------------------------------------------------------------------------------------------------- measure

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Counts, and the predicted class of every image in order."""

    correct: int
    total: int
    predictions: list[int]

    @property
    def fraction(self) -> float:
        return self.correct / self.total if self.total else 0.0


def measure_accuracy(model: Callable[[Tensor], Tensor], batches: Iterator[tuple[Tensor, Tensor]],
                     preprocessing: Preprocessing, total: int, progress: Progress | None = None) -> Accuracy:
    """Classifies uint8 batches with the model, a module on the device where its tensors are, and counts what is right.

    Raises:
        VerificationError: the model's output is not (N, classes), or not finite.
    """
    import torch
    device = next(iter(model.state_dict().values())).device if isinstance(model, torch.nn.Module) else torch.device("cpu")
    correct, predictions = 0, []
    with torch.inference_mode():
        for images, labels in batches:
            logits = model(normalize(images.to(device), preprocessing))
            if logits.dim() != 2 or len(logits) != len(labels) or not bool(torch.isfinite(logits).all()):
                raise VerificationError(f"the model's output for {len(labels)} images is {list(logits.shape)}, "
                                        "expected finite logits (N, classes)")
            predicted = logits.argmax(1).cpu()
            correct += int((predicted == labels.cpu()).sum())
            predictions += predicted.tolist()
            if progress:
                progress(len(predictions), total)
    return Accuracy(correct, len(predictions), predictions)


@dataclasses.dataclass(frozen=True)
class Latency:
    """Milliseconds a call at batch 1; percentiles by linear interpolation over n timed runs."""

    mean_ms: float
    median_ms: float
    p5_ms: float
    p95_ms: float
    runs: int
    warmup: int
    threads: int


def measure_latency(model: Callable[[Tensor], Tensor], input_shape: Sequence[int], runs: int = Settings.runs,
                    warmup: int = 10, threads: int = 1) -> Latency:
    """Times the model on the CPU at batch 1, on a fixed random input, one call after another."""
    import torch
    image = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0))
    durations = []
    with torch.inference_mode(), torch_threads(threads):
        for run in range(warmup + runs):
            start = time.perf_counter_ns()
            model(image)
            if run >= warmup:
                durations.append((time.perf_counter_ns() - start) / 1e6)
    p5, median, p95 = np.percentile(durations, [5, 50, 95])
    return Latency(float(np.mean(durations)), float(median), float(p5), float(p95), runs, warmup, threads)


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Torch's intra-op thread count inside; put back afterwards."""
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count_parameters(model: nn.Module) -> int:
    """Every stored number but batch counters: parameters, frozen or not, and buffers (int8 weights, BN statistics)."""
    return count_numbers(model.state_dict())


def count_numbers(weights: dict[str, Tensor]) -> int:
    """The numbers of a state dict, without batch counters."""
    return sum(tensor.numel() for name, tensor in weights.items() if not name.endswith("num_batches_tracked"))


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-adds of the convolutions and matrix products for one image, as torch's flop counter sees them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    device = next(iter(model.state_dict().values())).device
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(False), torch.no_grad(), counter:
        model(torch.zeros(1, *input_shape, device=device))
    return int(counter.get_total_flops()) // 2


REPEATS = 64  # images that are asked a second time
BURST = 32  # images decoded ahead, so that calls follow each other closely


@dataclasses.dataclass
class Answers:
    """What a runtime answered, and how long each call took by this process's clock.

    Args:
        logits: (N, classes) float32, the first answer to each image, in the images' order.
        first_ms: (N,) the first call with each image.
        order: (N,) in which the images were asked.
        again: (image, ms) of every repeated call.
    """

    logits: np.ndarray
    first_ms: np.ndarray
    order: np.ndarray
    again: list[tuple[int, float]] = dataclasses.field(default_factory=list)


class Deadline:
    """The moment after which a submission has taken too long; looked at between calls."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.moment = seconds, time.monotonic() + seconds

    def check(self, done: int, total: int) -> None:
        """Raises VerificationError once the time is over."""
        if time.monotonic() > self.moment:
            raise VerificationError(f"{done} of {total} images were answered within --time_limit_s {self.seconds:g}")


def serve(runtimes: Sequence[Runtime], preprocessings: Sequence[Preprocessing], images: Sequence[Path], classes: int,
          settings: Settings, progress: Progress | None = None) -> list[Answers]:
    """Asks every runtime for every image, one at a time, in an order that nobody can foresee, and times each call.

    Timed calls and graded calls are the same calls, so the two runs cannot differ. Some images are asked again, later:
    their answers must be the same, and must not come suddenly faster (`repeats_ratio`). Several runtimes take turns on
    the same image, so that what slows the machine slows all of them.

    Raises:
        VerificationError: an answer is not finite logits, changes between two calls, or the time is over.
        UserError: an image is unreadable.
    """
    entropy = np.random.default_rng()  # seeded by the system: code under test must not know the order
    order = entropy.permutation(len(images))
    repeats = entropy.choice(len(images), max(min(REPEATS, len(images)), settings.runs - len(images)))
    place = np.argsort(order)
    keys = np.concatenate([np.arange(len(images)), entropy.uniform(place[repeats] + 0.5, len(images))])
    requests = np.concatenate([order, repeats])[np.argsort(keys, kind="stable")].tolist()
    answers = [Answers(np.full((len(images), classes), np.nan, np.float32), np.zeros(len(images)), order) for _ in runtimes]
    deadline, asked, seen = Deadline(settings.time_limit_s), 0, set[int]()
    for start in range(0, len(requests), BURST):
        burst = requests[start:start + BURST]
        inputs = [{image: read_images([images[image]], preprocessing) for image in burst}
                  for preprocessing in preprocessings]
        if start == 0:  # noise, so that no test image has been seen before its timed call
            for _ in range(settings.warmup):
                for runtime, pixels in zip(runtimes, inputs, strict=True):
                    deadline.check(0, len(images))
                    ask(runtime, entropy.standard_normal(pixels[burst[0]].shape, np.float32), classes)
        for image in burst:
            deadline.check(len(seen), len(images))
            turns = range(len(runtimes)) if asked % 2 == 0 else reversed(range(len(runtimes)))
            for index in turns:
                logits, took = ask(runtimes[index], inputs[index][image], classes)
                mine = answers[index]
                if image not in seen:
                    mine.logits[image], mine.first_ms[image] = logits[0], took
                    continue
                mine.again.append((image, took))
                if not _same(mine.logits[image], logits[0]):
                    raise VerificationError(f"{images[image]}: {runtimes[index].name} gave another answer when asked again")
            seen.add(image)
            asked += 1
        if progress:
            progress(asked, len(requests))
    return answers


def ask(runtime: Runtime, images: np.ndarray, classes: int) -> tuple[np.ndarray, float]:
    """One call: the logits (N, classes) float32, and its milliseconds.

    Raises:
        VerificationError: the model cannot answer, or not with one finite logit a class.
    """
    start = time.perf_counter_ns()
    try:
        logits = runtime(images)
    except runtime.errors as error:
        raise VerificationError(f"{runtime.name} cannot answer images of shape {list(images.shape)}: "
                                f"{first_line(error)}") from error
    took = (time.perf_counter_ns() - start) / 1e6
    fits = isinstance(logits, np.ndarray) and logits.shape == (len(images), classes)
    if not fits or not np.isfinite(logits).all():
        got = "NaN or infinite values" if fits else list(getattr(logits, "shape", [])) or type(logits).__name__
        raise VerificationError(f"{runtime.name}: the output for {len(images)} image(s) is {got}, expected finite logits "
                                f"{[len(images), classes]} for the data's {classes} classes")
    return logits.astype(np.float32, copy=False), took


def _same(one: np.ndarray, two: np.ndarray, tolerance: float = 1e-3) -> bool:
    """Equal but for rounding, and with the same first class, unless that is a tie but for rounding."""
    first, other = int(one.argmax()), int(two.argmax())
    tie = abs(float(one[first] - one[other])) <= tolerance * max(1e-6, abs(float(one[first])))
    return tie and bool(np.abs(one - two).max() <= tolerance * max(1e-6, float(np.abs(one).max())))


def classify(runtime: Runtime, preprocessing: Preprocessing, images: Sequence[Path], classes: int, settings: Settings,
             progress: Progress | None = None) -> np.ndarray:
    """(N, classes) logits by batches, shuffled, so that neighbours give nothing away. Raises what `serve` raises."""
    order = np.random.default_rng().permutation(len(images))
    logits = np.empty((len(images), classes), np.float32)
    deadline = Deadline(settings.time_limit_s)
    for start in range(0, len(images), settings.batch_size):
        deadline.check(start, len(images))
        chunk = order[start:start + settings.batch_size]
        logits[chunk], _ = ask(runtime, read_images([images[index] for index in chunk], preprocessing), classes)
        if progress:
            progress(start + len(chunk), len(images))
    return logits


def repeats_ratio(answers: Answers) -> float | None:
    """Median over repeated images of second time / first time; None for fewer than eight. A cache gives itself away."""
    if len(answers.again) < 8:
        return None
    return float(np.median([took / answers.first_ms[image] for image, took in answers.again]))


PERCENTILES = {"p5_ms": (5, 130), "p90_ms": (90, 64), "p95_ms": (95, 130), "p99_ms": (99, 662)}


def latency_details(durations: Sequence[float] | np.ndarray, settings: Settings) -> dict[str, Any]:
    """Mean, median and those percentiles that so many runs can tell, as point estimates.

    Source: MLPerf Inference rules, early stopping: with 64, 130 or 662 runs the second largest bounds p90, p95 or p99 from
    above at 99 % confidence; with fewer none of them is given.
    """
    n = len(durations)
    details: dict[str, Any] = {"mean_ms": float(np.mean(durations)), "median_ms": float(np.median(durations))}
    missing = {}
    for key, (percentile, needed) in PERCENTILES.items():
        details[key] = float(np.percentile(durations, percentile)) if n >= needed else None
        if n < needed:
            missing[key] = f"needs {needed} runs, got {n}"
    return details | {"not_given": missing, "runs": n, "warmup": settings.warmup, "threads": settings.threads,
                      "batch_size": 1}


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a fraction. Source: Wilson 1927, "Probable Inference, the Law of Succession, and
    Statistical Inference"."""
    z = 1.959963984540054
    centre = (correct + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * math.sqrt(correct * (total - correct) / total + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_details(logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str], batch_size: int) -> dict[str, Any]:
    """Counts, interval, top-5 and every class; ties count against the model in the top 5."""
    predictions = logits.argmax(1)
    right = predictions == labels
    per_class = {name: {"correct": int(right[labels == index].sum()), "total": int((labels == index).sum())}
                 for index, name in enumerate(class_names)}
    worst = min(per_class, key=lambda name: per_class[name]["correct"] / max(1, per_class[name]["total"]))
    rank = (logits >= logits[np.arange(len(labels)), labels][:, None]).sum(1)
    correct, total = int(right.sum()), len(labels)
    return {"correct": correct, "total": total, "fraction": correct / total, "wilson_95": list(wilson(correct, total)),
            "top5_fraction": float((rank <= 5).mean()) if len(class_names) > 5 else None,
            "worst_class": {"name": worst, **per_class[worst]}, "per_class": per_class, "batch_size": batch_size,
            "predictions_sha256": hashlib.sha256(bytes(str(predictions.tolist()), "ascii")).hexdigest()}


class PeakMemory:
    """The most resident memory that this process takes from now on; unknown outside Linux."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        self.before_mb = status_mb("self", "VmRSS")

    def details(self) -> dict[str, float | None]:
        """In units of 2^20 bytes."""
        peak = status_mb("self", "VmHWM")
        return {"evaluator_mb": peak, "above_start_mb": peak - self.before_mb if peak and self.before_mb else None}


def status_mb(process: int | str, key: str) -> float | None:
    """A memory figure of a process in units of 2^20 bytes, from /proc."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":")), None)


def machine() -> dict[str, Any]:
    """The CPU's model, the instruction sets that int8 speed and accuracy hang on, and the number of usable cores."""
    model, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    except OSError:
        pass  # not Linux: the model is what the platform module knows, the flags stay unknown
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
    return {"cpu": model, "flags": [flag for flag in wanted if flag in flags], "cores": usable_cores()}


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of what decides a measurement."""
    import torch
    used: dict[str, str] = {name: sys.modules[name].__version__ for name in ("onnx", "onnxruntime", "openvino")
                            if name in sys.modules}
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, **used}


# --------------------------------------------------------------------------------------------------------- score


def score(size_mb: float, latency_ms: float, accuracy_percent: float, baseline_size: float, baseline_latency: float,
          baseline_accuracy: float) -> dict[str, float]:
    """The four scores: ratios to the baselines, and 0.3 size + 0.3 latency + 0.4 accuracy."""
    size, latency = baseline_size / size_mb, baseline_latency / latency_ms
    accuracy = accuracy_percent / baseline_accuracy
    return {"size_score": size, "latency_score": latency, "accuracy_score": accuracy,
            "total_score": 0.3 * size + 0.3 * latency + 0.4 * accuracy}


def guarded_score(scores: dict[str, float], accuracy: float, baseline_accuracy: float, chance: float, floor: float = 0.0,
                  lower: float | None = None) -> float:
    """The score that a useless model cannot win: small and fast count only as far as the model is right.

        skill = (accuracy - chance) / (max(baseline_accuracy, chance + (1 - chance) / 10) - chance)
        guarded = min(skill, 1) * (0.3 min(size, cap) + 0.3 min(latency, cap)) + 0.4 min(skill, cap)

    The plain ratios are unbounded, and a public competition was won by a tiny network that guessed. So each ratio is
    capped at RATIO_CAP; size and latency are worth what is left of the baseline's accuracy above chance; and the score is
    zero where `lower`, the lower end of the accuracy's interval, is not above chance, or the accuracy is below `floor`.
    All accuracies are fractions. `chance` is what the best constant answer reaches.
    """
    if (accuracy if lower is None else lower) <= chance or accuracy < floor:
        return 0.0
    reference = max(baseline_accuracy, chance + (1 - chance) / 10)  # a baseline that guesses is no yardstick
    skill = (accuracy - chance) / max(reference - chance, 1e-9)
    size, latency = min(scores["size_score"], RATIO_CAP), min(scores["latency_score"], RATIO_CAP)
    return min(skill, 1.0) * (0.3 * size + 0.3 * latency) + 0.4 * min(skill, RATIO_CAP)


RESULT_KEYS = ("model_size", "latency", "accuracy", "size_score", "latency_score", "accuracy_score", "total_score")


@dataclasses.dataclass(frozen=True)
class Baselines:
    """What a submission is compared with: MB (2^20 bytes), milliseconds at batch 1, percent."""

    size: float = 50.0
    latency: float = 10.0
    accuracy: float = 80.0

    def check(self) -> None:
        """Raises UserError for what is not positive."""
        for name, value in dataclasses.asdict(self).items():
            if not 1e-9 <= value <= 1e9:
                raise UserError(f"--baseline_{name}: expected a positive number, got {value}")


@dataclasses.dataclass(frozen=True)
class TestData:
    """The test images: (N,) paths and class indices, in the order of the folder."""

    folder: Path
    classes: list[str]
    images: list[Path]
    labels: np.ndarray


@dataclasses.dataclass
class Entry:
    """A submission under evaluation: what was read, what runs, what it was when it came."""

    files: SubmissionFiles
    runtime: Runtime
    hashes: dict[str, str]


def evaluate_submission(submission_dir: str | Path, data_dir: str | Path, baseline_size: float = 50.0,
                        baseline_latency: float = 10.0, baseline_accuracy: float = 80.0, settings: Settings | None = None,
                        compare: str | Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Loads, verifies, measures and scores a submission; the result is what `results.json` holds.

    Args:
        compare: another submission, served in turns with the first; the verdicts are in `details.compare`.

    Raises:
        UserError: a folder is missing, an image is unreadable, a setting makes no sense.
        VerificationError: the submission's claims do not hold, or its classes are not the data's.
    """
    settings, baselines = settings or Settings(), Baselines(baseline_size, baseline_latency, baseline_accuracy)
    settings.check()
    baselines.check()
    if compare and settings.batch_size != 1:
        raise UserError(f"--batch_size {settings.batch_size}: --compare serves both submissions one image at a time")
    comparing = toolkit("--compare", "compare") if compare else None
    import torch  # noqa: F401 - importing these takes far more memory than most models: before it is limited
    from PIL import Image  # noqa: F401
    classes, listed = list_images(data_dir)
    data = TestData(Path(data_dir), classes, [path for path, _ in listed], np.array([label for _, label in listed]))
    if not compare or not comparing:
        return _evaluate([submission_dir], data, baselines, settings, progress)[0][0]
    try:
        results, served = _evaluate([submission_dir, compare], data, baselines, settings, progress)
    except VerificationError as error:
        # Whose fault it was shows when the first is alone: the other's must not cost it its score.
        result = _evaluate([submission_dir], data, baselines, settings, progress)[0][0]
        result["details"]["compare"] = {"status": f"failed: {first_line(error)}"}
        result["details"]["warnings"].append(f"there is no comparison: {first_line(error)}")
        return result
    results[0]["details"]["compare"] = comparing.verdicts(results, served, data.labels)
    results[0]["details"]["warnings"] += [f"other: {warning}" for warning in results[1]["details"]["warnings"]]
    return results[0]


def _evaluate(folders: Sequence[str | Path], data: TestData, baselines: Baselines, settings: Settings,
              progress: Progress | None) -> tuple[list[dict[str, Any]], list[Answers]]:
    """Results and answers of one submission, or of two that take turns."""
    classes, memory = len(data.classes), PeakMemory()
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory_limit(settings.memory_limit_mb))
        entries = []
        for folder in folders:
            files = read_submission(folder)
            _check_classes(files, data.classes, data.folder)
            hashes = file_hashes(files.folder)
            runtime = open_runtime(files, settings, classes, data.folder)
            stack.callback(runtime.close)
            runtime.name = str(files.folder)
            entries.append(Entry(files, runtime, hashes))
        if any(isinstance(entry.runtime, TorchRuntime) for entry in entries):
            stack.enter_context(torch_threads(settings.threads))
        preprocessings = [entry.files.preprocessing for entry in entries]
        served = serve([entry.runtime for entry in entries], preprocessings, data.images, classes, settings, progress) \
            if settings.batch_size == 1 else [_serve_batches(entries[0], data.images, classes, settings, progress)]
        for entry in entries:
            entry.runtime.close()
    peak = memory.details() if len(entries) == 1 else None  # of two in one process nobody can tell whose it is
    return [_result(entry, answers, data, baselines, settings, peak)
            for entry, answers in zip(entries, served, strict=True)], served


def _check_classes(files: SubmissionFiles, classes: list[str], data_dir: str | Path) -> None:
    count = len(classes) if files.num_classes is None else files.num_classes
    if count == len(classes) and files.class_names in (None, classes):
        return
    odd = sorted(set(classes) ^ set(files.class_names or classes))
    raise VerificationError(f"{data_dir}: {len(classes)} classes, the submission was trained on {count}"
                            + (f"; not in both: {', '.join(odd[:3])}" if odd else ""))


def _serve_batches(entry: Entry, images: Sequence[Path], classes: int, settings: Settings,
                   progress: Progress | None) -> Answers:
    """Accuracy by batches, then timed calls at batch 1, whose answers must be the same."""
    preprocessing = entry.files.preprocessing
    logits = classify(entry.runtime, preprocessing, images, classes, settings, progress)
    some = np.random.default_rng().permutation(len(images))[:settings.runs]
    timed = serve([entry.runtime], [preprocessing], [images[index] for index in some], classes, settings)[0]
    for index, answer in zip(some, timed.logits, strict=True):
        if not _same(logits[index], answer, 1e-2):
            raise VerificationError(f"{images[index]}: the timed run's answer is not the one of the accuracy run")
    return dataclasses.replace(timed, logits=logits)


def _result(entry: Entry, answers: Answers, data: TestData, baselines: Baselines, settings: Settings,
            peak: dict[str, Any] | None) -> dict[str, Any]:
    files, runtime, labels = entry.files, entry.runtime, data.labels
    if file_hashes(files.folder) != entry.hashes:
        raise VerificationError(f"{files.folder}: the folder changed while its model ran")
    remarks = list(runtime.warnings)
    durations = np.random.default_rng().permutation(answers.first_ms)[:settings.runs]
    ratio = repeats_ratio(answers)
    if ratio is not None and ratio < 0.7:
        remarks.append(f"images that were asked again came {1 / ratio:.1f} times faster: answers are cached; only first "
                        "calls are counted")
    elif len(durations) < settings.runs and files.kind != "code":  # which could have kept its answers
        durations = np.concatenate([durations, [took for _, took in answers.again][:settings.runs - len(durations)]])
    latency = latency_details(durations, settings)
    accuracy = accuracy_details(answers.logits, labels, data.classes, settings.batch_size)
    chance = float(np.bincount(labels).max() / len(labels))
    size_bytes, needed = files.size_bytes(), sum(path.stat().st_size for path in files.needed())
    if size_bytes > files.weights.stat().st_size:
        remarks.append("files beside the weights can hold numbers, so model_size counts them: "
                        f"{size_bytes - files.weights.stat().st_size:,} bytes")
    if files.kind == "code" and needed - size_bytes > max(size_bytes // 2, 2**16):
        remarks.append(f"{needed - size_bytes:,} bytes of source, JSON and prose are much beside {size_bytes:,} of data, "
                        "and code can read them; model_size leaves them out, the guarded score does not")
    if accuracy["wilson_95"][0] <= chance:
        remarks.append(f"the accuracy cannot be told from that of the best constant answer, {100 * chance:.2f} %")
    if 100 * accuracy["fraction"] < settings.min_accuracy:
        remarks.append(f"the accuracy is below --min_accuracy {settings.min_accuracy:g} %")
    if settings.batch_size > 1:
        remarks.append(f"accuracy was measured at batch {settings.batch_size}, in a random order")
    scores = score(size_bytes / 2**20, latency["mean_ms"], 100 * accuracy["fraction"], baselines.size, baselines.latency,
                   baselines.accuracy)
    guarded = guarded_score(scores | {"size_score": baselines.size / (needed / 2**20)}, accuracy["fraction"],
                            baselines.accuracy / 100, chance, settings.min_accuracy / 100, accuracy["wilson_95"][0])
    return {
        "model_size": size_bytes / 2**20, "latency": latency["mean_ms"], "accuracy": 100 * accuracy["fraction"], **scores,
        "details": {
            "status": "ok",
            "guarded_score": guarded,
            "warnings": remarks,
            "baselines": {"size_mb": baselines.size, "latency_ms": baselines.latency, "accuracy": baselines.accuracy},
            "chance": chance,
            "kind": files.kind,
            "backend": runtime.backend,
            "latency": latency | {"repeats_ratio": ratio},
            "accuracy": accuracy,
            "preprocessing": files.preprocessing.model_dump() | {"stated_by": files.preprocessing_from},
            "parameters": runtime.parameters,
            "macs": runtime.macs,
            "bytes": {"weights": size_bytes, "needed_at_inference": needed,
                      "files": {name: (files.folder / name).stat().st_size for name in entry.hashes}},
            "peak_memory": peak,
            "sha256": {"evaluator": sha256(Path(__file__)), "submission": combined_hash(entry.hashes), **entry.hashes},
            **runtime.details,
            "settings": dataclasses.asdict(settings),
            "machine": machine(), "versions": versions(),
        },
    }


TASK_KEYS = ("score", "score_unbounded", "accuracy", "parameters_trainable", "parameters_all", "train_time_seconds")


def failed_result(reason: str, task: str | None = None) -> dict[str, Any]:
    """The result of what could not be scored: zero everywhere, and the reason."""
    details: dict[str, Any] = {"status": f"failed: {reason}", "warnings": []}
    details |= {"task": task} if task else {"guarded_score": 0.0}
    return dict.fromkeys(TASK_KEYS if task else RESULT_KEYS, 0.0) | {"details": details}


# -------------------------------------------------------------------------------------------------- command line


def terminal_progress() -> Progress | None:
    """A counter with the time left on stderr, where a person is looking; None elsewhere."""
    if not sys.stderr.isatty():
        return None
    start: float | None = None

    def show(done: int, total: int) -> None:
        nonlocal start
        start = start or time.monotonic()  # at the first image: loading and timing the model came before
        left = (time.monotonic() - start) / done * (total - done)
        end = "\n" if done == total else ""
        if end or done % max(1, total // 200) == 0:
            print(f"\rclassified {done}/{total} images, {left:.0f} s left ", end=end, file=sys.stderr, flush=True)

    return show


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's flags."""
    plain = Settings()
    parser = argparse.ArgumentParser(description="Scores a compressed image classifier: size, latency and accuracy.")
    parser.add_argument("--submission_dir", help="folder with model_metadata.json and what it names")
    parser.add_argument("--data_dir", help="test images, one folder a class")
    parser.add_argument("--baseline_size", type=float, default=50.0, help="MB (2^20 bytes); default 50")
    parser.add_argument("--baseline_latency", type=float, default=10.0, help="milliseconds at batch 1; default 10")
    parser.add_argument("--baseline_accuracy", type=float, help="percent, default 80; of --task a fraction, default 0.85")
    parser.add_argument("--output_file", default="results.json", help="where the result is written")
    parser.add_argument("--runs", type=int, default=plain.runs, help=f"timed calls; default {plain.runs}")
    parser.add_argument("--warmup", type=int, default=plain.warmup, help=f"calls before them; default {plain.warmup}")
    parser.add_argument("--threads", type=int, help="of one inference; default 1, of --task all cores")
    parser.add_argument("--backend", default="auto", choices=["auto", "torch", "onnxruntime", "openvino"])
    parser.add_argument("--batch_size", type=int, default=1, help="for the accuracy alone; default 1")
    parser.add_argument("--min_accuracy", type=float, default=0.0, help="percent; below it the guarded score is zero")
    parser.add_argument("--allow_code", action="store_true", help="run a submission's model.py, in a process with limits")
    parser.add_argument("--time_limit_s", type=float, default=plain.time_limit_s, help="of all that is asked")
    parser.add_argument("--memory_limit_mb", type=int, default=plain.memory_limit_mb, help="that a submission may take")
    parser.add_argument("--compare", metavar="SUBMISSION", help="measure this one in turns with the first, and judge")
    parser.add_argument("--task", choices=["imagenet_pareto_2_5m"], help="instead: evaluate a solution of a synthetic task")
    parser.add_argument("--solution", help="of --task: a Python file with a Solution class")
    parser.add_argument("--param_limit", type=int, default=2_500_000, help="of --task: trainable parameters")
    parser.add_argument("--debug", action="store_true", help="show the traceback of what broke down")
    parser.add_argument("--data_seed", type=int, default=2025, help="of --task: another seed, a fresh draw")
    options = parser.parse_args(arguments)
    required = ("solution",) if options.task else ("submission_dir", "data_dir")
    missing = [f"--{name}" for name in required if not getattr(options, name)]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    foreign = [name for name in (("submission_dir", "data_dir", "compare") if options.task else ("solution",))
               if getattr(options, name)]
    if foreign:
        parser.error(f"--{foreign[0]} does not go {'with' if options.task else 'without'} --task")
    return options


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """What the flags ask for. Raises what the evaluation raises."""
    settings = Settings(options.runs, options.warmup, 1 if options.threads is None else options.threads, options.backend,
                        options.batch_size, options.min_accuracy, options.allow_code, options.time_limit_s,
                        options.memory_limit_mb)
    if options.task:
        task = toolkit("--task", "pareto_task")
        return task.evaluate_solution(  # type: ignore[no-any-return]
            Path(options.solution), options.param_limit, options.baseline_accuracy, options.data_seed,
            options.threads or usable_cores(), settings)
    percent = 80.0 if options.baseline_accuracy is None else options.baseline_accuracy
    return evaluate_submission(options.submission_dir, options.data_dir, options.baseline_size, options.baseline_latency,
                               percent, settings, options.compare, terminal_progress())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 scored, 1 the submission fails verification, 2 a user's mistake.

    The output file is written in every case but one: when it cannot be.
    """
    options = parse(arguments)
    output = Path(options.output_file)
    try:
        if not output.resolve().parent.is_dir():
            raise UserError(f"--output_file {output}: there is no folder {output.resolve().parent}")
        if output.exists() and not output.is_file():
            raise UserError(f"--output_file {output}: this is not a plain file")
    except (UserError, OSError, ValueError, RuntimeError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    code, line, result = 0, "", {}
    try:
        result = evaluate(options)
    except UserError as error:
        code, line = error.exit_code, first_line(error)
    except OSError as error:
        code, line = 2, first_line(error)
    except Exception as error:  # the edge: what nobody foresaw must still end in one line and a result
        if options.debug:
            raise
        code, line = 1, f"the evaluation broke down ({type(error).__name__}: {first_line(error)}); --debug shows where"
    try:
        write_json(output, result or failed_result(line, options.task))
    except OSError as error:
        code, line = 2, f"{output}: {error.strerror or error}"
    if code:
        print(f"error: {line}", file=sys.stderr)
        return code
    try:
        print_result(result, output)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; nothing is left to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def print_result(result: dict[str, Any], output: Path) -> None:
    """The scores, the verdicts and the warnings, for a person."""
    details = result["details"]
    shown = {key: value for key, value in result.items() if isinstance(value, float | int)}
    shown |= {key: details[key] for key in ("guarded_score",) if key in details}
    for key, value in shown.items():
        print(f"{key:20} {value:14,.4f}" if isinstance(value, float) else f"{key:20} {value:14,}")
    for verdict in details.get("compare", {}).get("lines", []):
        print(verdict)
    for warning in details["warnings"]:
        print(f"warning: {warning}")
    print(f"written to {output}")


if __name__ == "__main__":
    sys.exit(main())
