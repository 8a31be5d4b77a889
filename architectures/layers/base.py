"""What a row of the layer table says about its type of layer, and the registry that the rows enter.

A row is a class that is named as the type is in the JSON. Its fields are the layer's options; its class variables and
methods say how a traced graph, a built model, an ONNX file, `model.py` and int8 arithmetic treat the layer. The defaults
fit a layer without weights that is a module of `torch.nn` with one input.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol, TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from architectures.int8 import int8_layers
from architectures.layers.channels import Labelled
from metadata.errors import UserError
from metadata.schemas import LayerName, PruningInfo, Strict, Texts

if TYPE_CHECKING:
    from torch import Tensor, fx, nn

    from architectures.layers.channels import LabelBook, Labels

NOT_IN_TABLE = "is not in the layer table"
AS_TEACHER = "the model can still be used as a teacher"
REGISTRY: dict[str, type[Layer]] = {}

Row = TypeVar("Row", bound="type[Layer]")
Shape = tuple[int, ...]


def register(kind: Row) -> Row:
    """Enter a class into the layer table under its own name.

    Raises:
        ValueError: the table has a row of that name.
    """
    if kind.__name__ in REGISTRY:
        raise ValueError(f"the layer table has a row {kind.__name__} already")
    REGISTRY[kind.__name__] = kind
    return kind


@dataclass(frozen=True)
class Operator:
    """How static int8 treats an ONNX operator that a layer writes.

    Args:
        quantized: the narrowest choice of `quantize_static.operators` that gives the operator integers; None: no kernel.
        passes_factors_on: a positive factor on a channel of the input is the same factor on that channel of the output.
    """

    quantized: Literal["weighted", "sums", "all"] | None = None
    passes_factors_on: bool = False


class OnnxWriter(Protocol):
    """What a row writes its ONNX nodes with. A tensor is known by its name."""

    def constant(self, name: str, values: Any, dtype: type[np.generic] = np.float32) -> str:
        """Add an initializer and return its name."""

    def weight(self, layer: Layer, key: str) -> NDArray[np.float32]:
        """Return a weight of the layer as an array."""

    def parameter(self, layer: Layer, key: str) -> str:
        """Add a weight of the layer as an initializer and return its name."""

    def node(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node and return its name, which is also the name of its output."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a layer's output for one image, or of the graph's input."""

    def for_each_image(self, inputs: Sequence[str], name: str) -> list[str]:
        """Return tensors to join: those that are stored once are repeated for each image. `name` begins nodes' names."""


class Layer(Strict, Labelled):
    """One layer of an architecture: a module or a function, and where its inputs come from."""

    # Further classes whose modules are this layer, as dotted names; they are not imported.
    other_classes: ClassVar[tuple[str, ...]] = ()
    # The inputs are aligned at their last dimensions, as torch broadcasts them.
    broadcasts: ClassVar[bool] = False
    # How many tensors the layer takes, at least and at most.
    input_count: ClassVar[tuple[int, int]] = (1, 1)
    # The functions (torch's as dotted names) and the methods of a tensor that mean this layer in a traced graph. A layer
    # without a module is built with the first function.
    functions: ClassVar[tuple[str | Callable[..., Any], ...]] = ()
    methods: ClassVar[tuple[str, ...]] = ()
    # The names of the functions' arguments that are tensors, in order.
    call_inputs: ClassVar[tuple[str, ...]] = ("input",)
    # ONNX operators that the layer may be written as.
    operators: ClassVar[Mapping[str, Operator]] = {}
    # The layer is a convolution or a matrix product: pruning counts its channels, int8 gives it integer weights.
    weighted: ClassVar[bool] = False
    # The axis of the output, and of the first input, whose channels the layer's weights belong to; None: no such weights.
    channel_axis: ClassVar[int | None] = None
    # The layer stores its weights as int8 integers.
    int8: ClassVar[bool] = False
    # In evaluation the layer returns its input.
    identity: ClassVar[bool] = False
    # nonnegative: no output is below zero. keeps_sign: no output is below zero if no input is.
    nonnegative: ClassVar[bool] = False
    keeps_sign: ClassVar[bool] = False
    # Every value of the output is a value of the input or zero, so that it lies on the input's int8 grid.
    keeps_grid: ClassVar[bool] = False
    # The output is a new tensor: a kernel may add to it in place.
    owns_output: ClassVar[bool] = False
    # The activation in oneDNN's words, name and scalars, where a convolution's kernel can apply it; and whether the
    # kernels of sums and of matrix products can, too.
    post_op: ClassVar[tuple[str, list[float]] | None] = None
    post_op_anywhere: ClassVar[bool] = False

    name: LayerName
    type: str
    inputs: Annotated[Texts, Field(max_length=1000)]
    pruning_info: PruningInfo | None = None

    @model_validator(mode="after")
    def _check(self) -> Layer:
        if self.type != type(self).__name__:
            raise ValueError(f"layer {self.name}: a row of type {type(self).__name__} does not hold a {self.type}")
        low, high = self.input_count
        if not low <= len(self.inputs) <= high:
            raise ValueError(f"layer {self.name} takes {low} to {high} inputs, got {len(self.inputs)}")
        info = self.pruning_info
        if info and info.remaining_channels != self.width:
            raise ValueError(f"layer {self.name}: pruning_info.remaining_channels is {info.remaining_channels}, "
                             f"the layer has {self.width}")
        return self

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        head = {key: fields.pop(key) for key in ("name", "type", "inputs")}
        info = fields.pop("pruning_info")
        return head | fields | ({"pruning_info": info} if info else {})

    # ------------------------------------------------------------------------------------------------- the options

    @classmethod
    def option_names(cls) -> list[str]:
        """Return the names of the layer's own settings, in the order of the JSON."""
        return [key for key in cls.model_fields if key not in Layer.model_fields]

    def options(self) -> dict[str, Any]:
        """Return the layer's own settings: the arguments of its module's constructor."""
        return {key: getattr(self, key) for key in self.option_names()}

    @property
    def width(self) -> int | None:
        """Output channels of a layer whose weights decide them, else None."""
        return None

    @classmethod
    def merges(cls) -> bool:
        """Return whether static int8 applies the layer within the weighted layer before it."""
        return not cls.weighted and any(operator.quantized == "weighted" for operator in cls.operators.values())

    # ----------------------------------------------------------------------------------------------- what it builds

    @classmethod
    def module_class(cls) -> Callable[..., nn.Module] | None:
        """Return the class of the layer's module, by default the int8 layer or class of `torch.nn` with the type's name."""
        from torch import nn
        return getattr(int8_layers() if cls.int8 else nn, cls.__name__, None)

    def module(self) -> nn.Module:
        """Build the module with fresh weights."""
        kind = self.module_class()
        assert kind is not None, self.type
        return kind(**self.options())

    def run(self, inputs: list[Tensor]) -> Tensor:
        """Compute the layer in evaluation, with fresh weights."""
        return self.module().eval()(*inputs)  # type: ignore[no-any-return]

    def output_shape(self, inputs: list[Shape]) -> Shape:
        """Return the shape of the output for inputs of these shapes, all with the batch first. Allocate nothing.

        The default asks torch's meta device, which imports torch's compiler (seconds): the rows of the table know better.

        Raises:
            ValueError, RuntimeError, TypeError, IndexError: the layer cannot take such inputs.
        """
        import torch
        with torch.device("meta"), torch.no_grad():
            return tuple(self.run([torch.empty(shape) for shape in inputs]).shape)

    def parameters(self) -> int:
        """Return how many numbers the layer stores: weights and buffers, without batch counters."""
        import torch
        with torch.device("meta"):
            weights = self.module().state_dict()
        return sum(tensor.numel() for name, tensor in weights.items() if name != "num_batches_tracked")

    def check_weights(self, weights: Mapping[str, Tensor], inputs: list[Shape]) -> None:
        """Check values that decide what the layer reads.

        Args:
            weights: the layer's tensors by their names in it.
            inputs: the shapes of the inputs for one image.

        Raises:
            ValueError: a value is out of range.
        """

    def macs(self, inputs: Sequence[Shape], output_shape: Shape) -> int:
        """Return the multiply-adds for one image, as torch's flop counter counts them.

        Args:
            inputs: the shapes of the inputs for one image.
            output_shape: the output's for one image.
        """
        return 0

    def work(self, inputs: Sequence[Shape], output_shape: Shape) -> int:
        """Return how many steps one image takes beside the multiply-adds: about the numbers read and written.

        The default fits layers that look at each number of their inputs once.

        Args:
            inputs: the shapes of the inputs for one image.
            output_shape: the output's for one image.
        """
        return sum(map(math.prod, inputs)) + math.prod(output_shape)

    # ------------------------------------------------------------------------------------ where it is in a traced graph

    @classmethod
    def from_module(cls, module: nn.Module, name: str) -> dict[str, Any]:
        """Return the options that a module of `module_class` stands for.

        Raises:
            UserError: the module uses an option that the row cannot express.
        """
        return {key: getattr(module, key) for key in cls.option_names()}

    @classmethod
    def from_call(cls, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        """Return the input nodes and the options that a call of one of `functions` or `methods` stands for.

        Raises:
            UserError: the call uses an option that the row cannot express.
        """
        return [node.args[0]], {}

    @classmethod
    def needs_shapes(cls, node: fx.Node) -> bool:
        """Return whether only the shapes around a call of one of `functions` or `methods` say what it means."""
        return False

    # --------------------------------------------------------------------------------------------------- ONNX and source

    def to_onnx(self, writer: OnnxWriter, inputs: list[str], shape: tuple[int, ...]) -> str:
        """Write the layer's nodes and return the name of its output. `shape` is the first input's, without the batch.

        Raises:
            UserError: the layer has no ONNX form.
        """
        if self.identity:
            return inputs[0]
        if len(self.operators) != 1:
            raise UserError(f"export: layer {self.name}: {self.type} has no ONNX form")
        return writer.node(next(iter(self.operators)), self.name, inputs)

    @classmethod
    def definitions(cls) -> tuple[Callable[..., Any], ...]:
        """Return the functions and classes that `model.py` must define before it can build the layer."""
        module = cls.module_class() if cls.int8 else None
        return (int8_layers().quantize_activations, module) if module else ()

    def constructor(self, replaced: Mapping[str, str]) -> str:
        """Return the line of source that builds the module: required arguments by position, others where they differ.

        Args:
            replaced: source of the options that are not written as numbers, such as num_classes.
        """
        positional, named = [], []
        for key, value in self.options().items():
            square = not self.int8 and isinstance(value, tuple) and len(set(value)) == 1
            shown = replaced.get(key, repr(value[0] if square else value))
            field = type(self).model_fields[key]
            if field.is_required():
                positional.append(shown)
            elif value != field.default:
                named.append(f"{key}={shown}")
        prefix = "" if self.definitions() else "nn."
        return f"{prefix}{self.type}({', '.join(positional + named)})"

    def expression(self, inputs: list[str], module: str) -> str:
        """Return the source of a call of the layer. `module` is where `model.py` keeps the module."""
        return f"{module}({', '.join(inputs)})"


class Unchanging(Layer):
    """A layer whose output has the shape of its input, whatever that is."""

    def output_shape(self, inputs: list[Shape]) -> Shape:
        return inputs[0]

    def labels(self, book: LabelBook, inputs: list[Labels], shapes: list[Shape]) -> Labels:
        return inputs[0]


class FunctionLayer(Layer):
    """A layer without a module: a function of its input tensors."""

    @classmethod
    def module_class(cls) -> None:
        return None

    @classmethod
    def from_call(cls, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        return list(traced_tensors(node)), dict(node.kwargs)

    def call(self, inputs: list[Any]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """Return the function, its positional arguments and its keyword arguments."""
        return resolved(self.functions[0]), tuple(inputs), self.options()

    def run(self, inputs: list[Tensor]) -> Tensor:
        function, positional, options = self.call(inputs)
        return function(*positional, **options)  # type: ignore[no-any-return]

    def parameters(self) -> int:
        return 0


def with_channels(shape: Shape, channels: int, *dimensions: int) -> Shape:
    """Return a shape (N, channels, ...) that has been checked.

    Raises:
        ValueError: other channels, or a number of dimensions that is not among the given.
    """
    if len(shape) not in dimensions or shape[1] != channels:
        wanted = " or ".join(map(str, dimensions))
        raise ValueError(f"expected {wanted} dimensions, images first, and {channels} channels, got {list(shape)}")
    return shape


def windows(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool = False) -> int:
    """Return how many windows lie along an axis of an image with padding on both sides.

    With `ceil_mode` a last window may reach beyond the padding, unless it begins there, as in PyTorch.

    Raises:
        ValueError: none does.
    """
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (-(-room // stride) if ceil_mode else room // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    if count < 1:
        raise ValueError(f"a window of {kernel} with dilation {dilation} does not fit into {size} with padding {padding}")
    return count


@functools.cache
def resolved(dotted: str | Callable[..., Any]) -> Any:
    """Return the object that a dotted name such as "torch.nn.functional.relu" means, or the function that is given."""
    if not isinstance(dotted, str):
        return dotted
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def traced_argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """Return an argument of a traced call, given by position or by name."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def place_of(node: fx.Node) -> str:
    """Return a traced call's name and, where it is known, its place in the network's code."""
    return f"{node.name}{node.meta.get('line', '')}"


def traced_tensors(node: fx.Node) -> list[fx.Node]:
    """Return the positional arguments of a traced call that are tensors."""
    from torch import fx
    return [value for value in node.args if isinstance(value, fx.Node)]


def outside(where: str, what: str) -> UserError:
    """Return the error for a layer that uses an option that no row can express."""
    return UserError(f"layer {where}: {what} {NOT_IN_TABLE}")
