"""The evaluator of record: load a compressed image classifier, verify it, measure it, score it.

    python model_loader.py --submission_dir DIR --data_dir DIR --baseline_size 50 --baseline_latency 10 \
        --baseline_accuracy 80 --output_file results.json

This file travels, byte for byte, inside every submission, so it imports no other file of the project: the standard
library, numpy and pydantic at the top, torch and Pillow inside the functions that need them. What the pipeline needs
too (schemas, layer table, `build`, measuring, scoring) is defined here once and imported upward. A submission is data:
nothing in it is ever executed.

Sections: errors and files · schemas · layer table and build · int8 layers · read and verify · images · measure ·
score · command line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import keyword
import operator
import os
import platform
import struct
import sys
import tempfile
import time
import types
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args

import numpy as np
from pydantic import (BaseModel, BeforeValidator, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError,
                      create_model, model_serializer, model_validator)

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
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_ACTIVATION_ELEMENTS = 2**28  # one layer's output for one image; more than this is an attack or a mistake
MAX_WEIGHT_ELEMENTS = 2**31
RATIO_CAP = 10.0  # no single ratio may buy more than this in the guarded score


# ---------------------------------------------------------------------------------------------- errors and files


class UserError(Exception):
    """A mistake of the caller, told in one line: expected, got, where, what to do. Command lines exit 2."""

    exit_code = 2


class VerificationError(UserError):
    """A claim that does not hold, such as weights that contradict their architecture. Command lines exit 1."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for messages that must fit on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


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

    scheme: Literal["none", "dynamic_int8"]
    layers: dict[str, str] = {}


class ModelMetadata(BaseModel):
    """`model_metadata.json`. Keys that we do not know are kept: submissions carry notes of their own."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    schema_version: Literal[1] = Field(1, alias="schema")
    model_format: Literal["pytorch"]
    architecture: str
    num_classes: Size
    class_names: list[str]
    architecture_file: FileName = ARCHITECTURE_FILE
    weights_file: FileName
    input_shape: tuple[Size, Size, Size]
    preprocessing: Preprocessing
    quantization: Quantization
    parameters: int
    macs: int
    files: dict[FileName, FileRecord]
    accuracy: dict[str, Any] = {}
    latency: dict[str, Any] = {}
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _names_match(self) -> ModelMetadata:
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} names, num_classes is {self.num_classes}")
        for name in (self.architecture_file, self.weights_file):
            if name not in self.files:
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
LAYERS = (
    _layer("Conv2d", **_CONV, bias=(bool, True)),
    _layer("Linear", in_features=Size, out_features=Size, bias=(bool, True)),
    _layer("Int8Conv2d", **_CONV),
    _layer("Int8Linear", in_features=Size, out_features=Size),
    _layer("BatchNorm1d", "BatchNorm2d", num_features=Size, eps=(float, 1e-5), momentum=(float | None, 0.1),
           affine=(bool, True), track_running_stats=(Literal[True], True)),  # else it would depend on the batch
    _layer("GroupNorm", num_groups=Size, num_channels=Size, eps=(float, 1e-5), affine=(bool, True)),
    _layer("ReLU", "ReLU6", "SiLU", "Hardswish", "Hardsigmoid", "Sigmoid", "Tanh", "Identity"),
    _layer("LeakyReLU", negative_slope=(float, 0.01)),
    _layer("GELU", approximate=(Literal["none", "tanh"], "none")),
    _layer("Dropout", p=(Fraction, 0.5)),
    _layer("MaxPool2d", **_POOL, dilation=(Pair, (1, 1))),
    _layer("AvgPool2d", **_POOL, count_include_pad=(bool, True)),
    _layer("AdaptiveAvgPool2d", output_size=Pair),
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
            taken = part == "training" or hasattr(fx.GraphModule, part) or hasattr(nn.ModuleDict, part)
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
    return fx.GraphModule(modules, graph, class_name=architecture.model_type)


def check_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Runs the graph on the meta device, which allocates nothing, and returns each layer's output shape for one image.

    Raises:
        VerificationError: a layer cannot take what its inputs give (named), mixes the images of a batch, or is
            absurdly large; or the last layer's shape is not the declared one.
    """
    import torch

    shapes: dict[str, tuple[int, ...]] = {}
    count = 0
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
    an image, so that a prediction never depends on the other images of its batch. The products are summed in float32,
    which is exact for integers up to 2^24. Source: Jacob et al. 2018, "Quantization and Training of Neural Networks
    for Efficient Integer-Arithmetic-Only Inference", eq. 1-7.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    def quantize_activations(input: Tensor) -> tuple[Tensor, Tensor]:
        """(N, ...) float -> integers held as float, zero point taken off, and their scale (N, 1, ...)."""
        dims = tuple(range(1, input.dim()))
        low = input.amin(dims, keepdim=True).clamp(max=0)
        high = input.amax(dims, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255).clamp(min=1e-12)
        zero_point = (-low / scale).round()
        return (input / scale).round_().add_(zero_point).clamp_(0, 255).sub_(zero_point), scale

    class Int8Conv2d(nn.Module):
        """Conv2d with int8 weights (a scale an output channel) and activations quantized at run time."""

        def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int],
                     stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0),
                     dilation: tuple[int, int] = (1, 1), groups: int = 1) -> None:
            super().__init__()
            shape = (out_channels, in_channels // groups, *kernel_size)
            self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
            self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
            self.weight: Tensor  # buffers, not parameters: scoring harnesses read the first parameter's dtype
            self.weight_scale: Tensor
            self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
            self.register_buffer("weight_scale", torch.ones(out_channels))
            self.bias = nn.Parameter(torch.zeros(out_channels))

        def forward(self, input: Tensor) -> Tensor:
            levels, scale = quantize_activations(input)
            output = F.conv2d(levels, self.weight.to(levels.dtype), None, self.stride, self.padding, self.dilation,
                              self.groups)
            return output * (scale * self.weight_scale.view(-1, 1, 1)) + self.bias.view(-1, 1, 1)

    class Int8Linear(nn.Module):
        """Linear with int8 weights (a scale an output feature) and activations quantized at run time."""

        def __init__(self, in_features: int, out_features: int) -> None:
            super().__init__()
            self.in_features, self.out_features = in_features, out_features
            self.weight: Tensor
            self.weight_scale: Tensor
            self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
            self.register_buffer("weight_scale", torch.ones(out_features))
            self.bias = nn.Parameter(torch.zeros(out_features))

        def forward(self, input: Tensor) -> Tensor:
            levels, scale = quantize_activations(input)
            return F.linear(levels, self.weight.to(levels.dtype)) * (scale * self.weight_scale) + self.bias

    return Int8Layers(quantize_activations, Int8Conv2d, Int8Linear)


# ----------------------------------------------------------------------------------------------- read and verify


def read_json(path: Path, schema: type[BaseModel]) -> Any:
    """Reads a JSON file into a schema.

    Raises:
        VerificationError: missing, not JSON, or not of the schema; the message names the file and the key.
    """
    try:
        return schema.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise VerificationError(f"{path}: there is no such file") from error
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
    if not path.resolve().is_relative_to(folder.resolve()):
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
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError, MemoryError, struct.error,
            torch._weights_only_unpickler.UnpicklingError) as error:  # type: ignore[attr-defined]
        raise VerificationError(f"{path}: not a PyTorch state dict that holds only tensors: "
                                f"{first_line(error)}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict: named tensors and nothing else.

    Raises:
        VerificationError: not readable, see `load_tensors`, or not a state dict.
    """
    import torch
    weights = load_tensors(path)
    if not isinstance(weights, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()):
        raise VerificationError(f"{path}: expected a state dict (names to tensors), got {type(weights).__name__}")
    return weights


def load_verified(architecture: Architecture, weights: dict[str, Tensor], where: str) -> torch.fx.GraphModule:
    """Builds the architecture around the weights, after checking every name, shape, dtype and value.

    Raises:
        VerificationError: the weights do not bear out the architecture; the first tensor at fault is named.
    """
    import torch
    with torch.device("meta"):
        model = build(architecture)
    expected = model.state_dict()
    if not expected:
        raise VerificationError(f"{where}: the architecture has no layer with weights")
    for name in expected.keys() - weights.keys():
        raise VerificationError(f"{where}: tensor {name} is missing")
    for name in weights.keys() - expected.keys():
        raise VerificationError(f"{where}: tensor {name} belongs to no layer of the architecture")
    for name, tensor in weights.items():
        want = expected[name]
        if tensor.shape != want.shape:
            raise VerificationError(f"{where}: tensor {name} is {list(tensor.shape)}, the architecture says "
                                    f"{list(want.shape)}")
        if tensor.dtype != want.dtype or tensor.layout != torch.strided:
            raise VerificationError(f"{where}: tensor {name} is {tensor.dtype} ({tensor.layout}), expected "
                                    f"{want.dtype} (dense)")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise VerificationError(f"{where}: tensor {name} holds NaN or infinite values")
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


@dataclasses.dataclass(frozen=True)
class SubmissionFiles:
    """A submission whose JSON files were read and whose files carry the hashes that its metadata states."""

    folder: Path
    metadata: ModelMetadata
    architecture: Architecture
    weights: Path


def read_submission(folder: str | Path) -> SubmissionFiles:
    """Reads a submission folder's metadata and architecture, and checks the files against what they claim.

    Raises:
        UserError: the folder does not exist.
        VerificationError: a file is missing, malformed, outside the folder or not the one that was packaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--submission_dir {folder}: there is no such folder")
    metadata: ModelMetadata = read_json(folder / METADATA_FILE, ModelMetadata)
    architecture: Architecture = read_json(inside(folder, metadata.architecture_file), Architecture)
    for name, record in metadata.files.items():
        path = inside(folder, name)
        if not path.is_file():
            raise VerificationError(f"{path}: {METADATA_FILE} lists this file, but it is not there")
        if path.stat().st_size != record.bytes or sha256(path) != record.sha256:
            raise VerificationError(f"{path}: its bytes are not those that {METADATA_FILE} states (sha256)")
    for key in ("num_classes", "input_shape"):
        if getattr(metadata, key) != getattr(architecture, key):
            raise VerificationError(f"{folder}: {key} is {getattr(metadata, key)} in {METADATA_FILE} and "
                                    f"{getattr(architecture, key)} in {metadata.architecture_file}")
    if metadata.architecture != architecture.model_type:
        raise VerificationError(f"{folder}: the architecture is {metadata.architecture} in {METADATA_FILE} and "
                                f"{architecture.model_type} in {metadata.architecture_file}")
    return SubmissionFiles(folder, metadata, architecture, inside(folder, metadata.weights_file))


def open_submission(files: SubmissionFiles) -> nn.Module:
    """The submission's model, after checking that it bears out what the metadata claims of it.

    Raises:
        VerificationError: weights, counts or the table of int8 layers are not as stated.
    """
    metadata, architecture = files.metadata, files.architecture
    model = open_model(architecture, files.weights)
    for claim, stated, counted in (("parameters", metadata.parameters, count_parameters(model)),
                                   ("macs", metadata.macs, count_macs(model, metadata.input_shape))):
        if stated != counted:
            raise VerificationError(f"{files.folder}: {METADATA_FILE} states {stated:,} {claim}, the model has {counted:,}")
    weighted = {layer.name: layer.type.startswith("Int8") for layer in architecture.layers if layer.width}
    stated_int8 = {name: text.startswith("int8") for name, text in metadata.quantization.layers.items()}
    scheme = "dynamic_int8" if architecture.is_int8 else "none"
    if stated_int8 != weighted or metadata.quantization.scheme != scheme:
        odd = min((name for name in weighted.keys() | stated_int8.keys() if weighted.get(name) != stated_int8.get(name)),
                  default="scheme")
        raise VerificationError(f"{files.folder}: quantization in {METADATA_FILE} is not what the layers are ({odd})")
    return model


def open_model(architecture: Architecture, weights: Path) -> torch.fx.GraphModule:
    """The verified model of an architecture and a weights file, whose sizes are checked before the file is read.

    Raises:
        VerificationError: the weights do not bear out the architecture.
    """
    check_shapes(architecture)
    return load_verified(architecture, read_weights(weights), str(weights))


def load_model(model_path: str | Path) -> nn.Module:
    """Loads a packaged model, verified, in eval mode, on the CPU. Evaluation panels call this.

    Takes the weights file or the submission folder; the architecture JSON lies beside the weights. The module maps
    `(N, C, H, W)` float32, preprocessed as the metadata says, to `(N, num_classes)` logits.

    Raises:
        UserError: the path does not exist.
        VerificationError: the weights do not bear out the architecture.
    """
    path = Path(model_path)
    if path.is_dir():
        return open_submission(read_submission(path))
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    architecture = read_json(path.parent / ARCHITECTURE_FILE, Architecture)
    return open_model(architecture, path)


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
    mean = torch.tensor(preprocessing.mean, device=images.device).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std, device=images.device).view(-1, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std)


def image_batches(images: Sequence[tuple[Path, int]], preprocessing: Preprocessing,
                  batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (images (N, C, H, W) uint8, labels (N,) int64) in order, decoding as it goes."""
    import torch
    for start in range(0, len(images), batch_size):
        chunk = images[start:start + batch_size]
        arrays = [decode_image(path, preprocessing) for path, _ in chunk]
        for (path, _), array in zip(chunk, arrays, strict=True):
            if array.shape != arrays[0].shape:
                raise UserError(f"{path}: the image is {array.shape[1:]}, others are {arrays[0].shape[1:]}, and the "
                                "preprocessing has neither resize nor crop")
        yield torch.from_numpy(np.stack(arrays)), torch.tensor([label for _, label in chunk])


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


def measure_accuracy(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], preprocessing: Preprocessing,
                     total: int, progress: Progress | None = None) -> Accuracy:
    """Classifies uint8 batches with the model on the device where its tensors are, and counts what is right.

    Raises:
        VerificationError: the model's output is not (N, classes), or not finite.
    """
    import torch
    device = next(iter(model.state_dict().values())).device
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


def measure_latency(model: nn.Module, input_shape: Sequence[int], runs: int = 100, warmup: int = 10,
                    threads: int = 1) -> Latency:
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
    return sum(tensor.numel() for name, tensor in model.state_dict().items()
               if not name.endswith("num_batches_tracked"))


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-adds of the convolutions and matrix products for one image, as torch's flop counter sees them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    device = next(iter(model.state_dict().values())).device
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(False), torch.no_grad(), counter:
        model(torch.zeros(1, *input_shape, device=device))
    return int(counter.get_total_flops()) // 2


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
    return {"cpu": model, "flags": [flag for flag in wanted if flag in flags], "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity") else os.cpu_count()}


def versions() -> dict[str, str]:
    """Versions of what decides a measurement."""
    import torch
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


# --------------------------------------------------------------------------------------------------------- score


def score(size_mb: float, latency_ms: float, accuracy_percent: float, baseline_size: float, baseline_latency: float,
          baseline_accuracy: float) -> dict[str, float]:
    """The four scores: ratios to the baselines, and 0.3 size + 0.3 latency + 0.4 accuracy."""
    size, latency = baseline_size / size_mb, baseline_latency / latency_ms
    accuracy = accuracy_percent / baseline_accuracy
    return {"size_score": size, "latency_score": latency, "accuracy_score": accuracy,
            "total_score": 0.3 * size + 0.3 * latency + 0.4 * accuracy}


def guarded_score(scores: dict[str, float], accuracy: float, num_classes: int, floor: float = 0.0) -> float:
    """The total with each ratio capped at RATIO_CAP, and zero for a model no better than guessing, or below a floor.

    The plain ratios are unbounded: a tiny network with random answers wins. `accuracy` and `floor` are fractions.
    """
    if accuracy <= 1 / num_classes or accuracy < floor:
        return 0.0
    size, latency, right = (min(scores[key], RATIO_CAP) for key in ("size_score", "latency_score", "accuracy_score"))
    return 0.3 * size + 0.3 * latency + 0.4 * right


RESULT_KEYS = ("model_size", "latency", "accuracy", "size_score", "latency_score", "accuracy_score", "total_score")


def evaluate_submission(submission_dir: str | Path, data_dir: str | Path, baseline_size: float = 50.0,
                        baseline_latency: float = 10.0, baseline_accuracy: float = 80.0,
                        progress: Progress | None = None) -> dict[str, Any]:
    """Loads, verifies, measures and scores a submission; the result is what `results.json` holds.

    Raises:
        UserError: a folder is missing, an image is unreadable, a baseline is not positive.
        VerificationError: the submission's claims do not hold, or its classes are not the data's.
    """
    for name, value in (("size", baseline_size), ("latency", baseline_latency), ("accuracy", baseline_accuracy)):
        if not 0 < value < float("inf"):
            raise UserError(f"--baseline_{name}: expected a positive number, got {value}")
    classes, images = list_images(data_dir)
    files = read_submission(submission_dir)
    metadata = files.metadata
    if classes != metadata.class_names:
        odd = sorted(set(classes) ^ set(metadata.class_names))
        raise VerificationError(f"{data_dir}: {len(classes)} classes, the submission was trained on "
                                f"{metadata.num_classes}" + (f"; not in both: {', '.join(odd[:3])}" if odd else ""))
    model = open_submission(files)

    threads = 1  # one core: comparable between machines, and the least noisy on shared ones
    latency = measure_latency(model, metadata.input_shape, threads=threads)
    batch_size = 1  # as panels measure: images come class by class, and a batch would give the class away
    with torch_threads(threads):
        accuracy = measure_accuracy(model, image_batches(images, metadata.preprocessing, batch_size),
                                    metadata.preprocessing, len(images), progress)
    size_bytes = files.weights.stat().st_size
    scores = score(size_bytes / 2**20, latency.mean_ms, 100 * accuracy.fraction, baseline_size, baseline_latency,
                   baseline_accuracy)
    needed = sum(path.stat().st_size for path in (files.weights, files.folder / metadata.architecture_file,
                                                  files.folder / METADATA_FILE))
    guarded = scores | {"size_score": baseline_size / (needed / 2**20)}
    return {
        "model_size": size_bytes / 2**20, "latency": latency.mean_ms, "accuracy": 100 * accuracy.fraction, **scores,
        "details": {
            "status": "ok",
            "guarded_score": guarded_score(guarded, accuracy.fraction, metadata.num_classes),
            "baselines": {"size_mb": baseline_size, "latency_ms": baseline_latency, "accuracy": baseline_accuracy},
            "latency": dataclasses.asdict(latency),
            "accuracy": {"correct": accuracy.correct, "total": accuracy.total, "batch_size": batch_size,
                         "predictions_sha256": hashlib.sha256(bytes(str(accuracy.predictions), "ascii")).hexdigest()},
            "preprocessing": metadata.preprocessing.model_dump(),
            "parameters": count_parameters(model),
            "macs": count_macs(model, metadata.input_shape),
            "bytes": {"weights": size_bytes, "needed_at_inference": needed},
            "sha256": {"evaluator": sha256(Path(__file__)), "weights": sha256(files.weights)},
            "machine": machine(), "versions": versions(),
        },
    }


def failed_result(error: UserError) -> dict[str, Any]:
    """The result of a submission that could not be scored: zero everywhere, and the reason."""
    return dict.fromkeys(RESULT_KEYS, 0.0) | {"details": {"status": f"failed: {error}", "guarded_score": 0.0}}


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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 scored, 1 the submission fails verification, 2 a user's mistake."""
    parser = argparse.ArgumentParser(description="Scores a compressed image classifier: size, latency and accuracy.")
    parser.add_argument("--submission_dir", required=True, help="folder with model_metadata.json and what it names")
    parser.add_argument("--data_dir", required=True, help="test images, one folder a class")
    parser.add_argument("--baseline_size", type=float, default=50.0, help="MB (2^20 bytes)")
    parser.add_argument("--baseline_latency", type=float, default=10.0, help="milliseconds at batch 1")
    parser.add_argument("--baseline_accuracy", type=float, default=80.0, help="percent")
    parser.add_argument("--output_file", default="results.json", help="where the result is written")
    options = parser.parse_args(arguments)
    output = Path(options.output_file)
    try:
        if not output.resolve().parent.is_dir():
            raise UserError(f"--output_file {output}: there is no folder {output.resolve().parent}")
        try:
            result = evaluate_submission(options.submission_dir, options.data_dir, options.baseline_size,
                                         options.baseline_latency, options.baseline_accuracy, terminal_progress())
        except VerificationError as error:
            write_json(output, failed_result(error))
            raise
        write_json(output, result)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename or output}: {error.strerror or error}", file=sys.stderr)
        return 2
    for key in RESULT_KEYS:
        print(f"{key:15} {result[key]:10.4f}")
    print(f"{'guarded_score':15} {result['details']['guarded_score']:10.4f}\nwritten to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
