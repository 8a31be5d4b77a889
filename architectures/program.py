"""Run a graph of layers as a list of calls on oneDNN's kernels. Dynamic int8 runs this way."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

from architectures.int8 import int8_layers
from architectures.kernels import Kernel, NotFiniteError, QuantizedTensor, why_not_int8
from architectures.layers.base import Layer
from architectures.layers.table import row_of_node
from architectures.layers.tensors import Add
from architectures.layers.weighted import Convolution

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclasses.dataclass(kw_only=True)
class Step:
    """One call of a `Program`.

    Args:
        function: what to call.
        sources, target: the registers of the inputs and of the output.
        nonnegative: the output is known to hold no negative value.
        layer: the name of the layer with weights that the call computes, if any.
        dead: the registers that no later call reads.
    """

    function: Callable[..., Tensor]
    sources: list[int]
    target: int
    nonnegative: bool
    layer: str | None
    dead: list[int] = dataclasses.field(default_factory=list)


class Program:
    """A graph as a list of calls on oneDNN: convolutions are fused with what follows, tensors are channels last.

    Args:
        model: a graph as `build` makes it. Its weights are packed at the first call.

    Attributes:
        hooks: the forward hooks of the graph and its layers, a dict each; the program calls none of them.
    """

    def __init__(self, model: torch.fx.GraphModule) -> None:
        import torch
        from torch import fx
        self.channels_last = torch.channels_last
        modules = dict(model.named_modules())
        self.hooks = [hooks for module in modules.values() for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        graph = fx.Graph()
        graph.output(graph.graph_copy(model.graph, {}))
        for node in list(graph.nodes):  # a layer without effect in eval mode would stand between layers that can be fused
            if row_of_node(node, modules).identity:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        nodes = list(graph.nodes)
        rows = {node: row_of_node(node, modules) for node in nodes}
        fused = _fuse(nodes, rows)
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
                nonnegative[node] = rows[node].nonnegative or (
                    node not in fused and rows[node].keeps_sign and all(nonnegative[source] for source in inputs))
                if node in fused:
                    parts = fused[node]
                    inputs = [parts.layer.args[0], *([] if parts.other is None else [parts.other])]
                    function: Callable[..., Tensor] = Kernel(modules[parts.layer.target], parts.post_op,
                                                             parts.other is not None)
                elif node.op == "call_module":
                    function = modules[node.target]
                else:
                    function = functools.partial(_call_function, node)
                self.steps.append(Step(
                    function=function, sources=[registers[source] for source in inputs], target=registers[node],
                    nonnegative=nonnegative[node], layer=str(fused[node].layer.target) if node in fused else None))
        self.size = len(registers)
        last = {register: step for step in self.steps for register in step.sources}
        for register, step in last.items():
            if register != self.output:
                step.dead.append(register)

    def __call__(self, images: Tensor) -> Tensor:
        """Map (N, C, H, W) float32 to (N, classes), image by image, because every image has its own ranges.

        Raises:
            NotFiniteError: an image, or the input of an int8 layer, holds NaN or infinite values.
        """
        import torch
        with torch.no_grad():
            if not math.isfinite(images.sum().item()):  # fused activations turn NaN into 0
                raise NotFiniteError
            rows = [self.one(images[index:index + 1]) for index in range(len(images))]
            return rows[0] if len(rows) == 1 else torch.cat(rows)

    def one(self, image: Tensor, watch: Callable[[Step, QuantizedTensor], None] = lambda step, source: None) -> Tensor:
        """Run one image. Before each call, call `watch` with the step and its first input."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused:
    """A layer with weights, and the nodes that one kernel computes with it."""

    layer: Any
    between: tuple[Any, ...]  # nodes after the layer and before the last one
    other: Any | None  # the node that is added
    post_op: tuple[str, list[float]] | None  # the activation


def _fuse(nodes: list[Any], rows: dict[Any, type[Layer]]) -> dict[Any, Fused]:
    """Return the groups of nodes that one kernel computes, by their last node."""
    order = {node: index for index, node in enumerate(nodes)}
    fused: dict[Any, Fused] = {}

    def only_user(node: Any) -> Any | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def latest(node: Any) -> int:
        """Return the latest place where a layer's kernel runs: that of the last node that may be fused with it."""
        last, following = node, only_user(node)
        if following is not None and rows[following] is Add:
            last, following = following, only_user(following)
        return order[following if following is not None and rows[following].post_op else last]

    adders = {}  # convolution -> the addition that its kernel computes; of two convolutions, the later one
    for node in nodes:
        if rows[node] is Add and len(set(_inputs(node))) == 2:
            able = [source for source in _inputs(node) if issubclass(rows[source], Convolution)
                    and only_user(source) is node]
            able.sort(key=order.__getitem__)
            if able:
                other, = (source for source in _inputs(node) if source is not able[-1])
                # The sum is written over the other tensor. It must own its memory, and no later kernel may read it.
                if rows[other].owns_output and all(
                        user in (node, able[-1]) or (rows[user].weighted and latest(user) < order[node])
                        for user in other.users):
                    adders[able[-1]] = node
    for node in nodes:
        if not rows[node].weighted:
            continue
        chain, other = [node], None
        if node in adders:
            chain.append(adders[node])
            other, = (source for source in _inputs(adders[node]) if source is not node)
        following = only_user(chain[-1])
        activation = rows[following] if following is not None else Layer
        alone = other is None and issubclass(rows[node], Convolution)
        post_op = activation.post_op if alone or activation.post_op_anywhere else None
        if post_op:
            chain.append(following)
        fused[chain[-1]] = Fused(layer=node, between=tuple(chain[1:-1]), other=other, post_op=post_op)
    return fused


def _inputs(node: Any) -> list[Any]:
    """Return the nodes that a node reads, in the order of its arguments, with repetitions."""
    return list(node.args[0]) if isinstance(node.args[0], list | tuple) else [
        argument for argument in node.args if hasattr(argument, "all_input_nodes")]


def _call_function(node: Any, *tensors: Tensor) -> Tensor:
    """Call a node's function on tensors in the place of its tensor arguments."""
    if isinstance(node.args[0], list | tuple):
        return node.target(list(tensors), *node.args[1:], **node.kwargs)  # type: ignore[no-any-return]
    return node.target(*tensors, *node.args[len(tensors):], **node.kwargs)  # type: ignore[no-any-return]


@functools.cache
def int8_graph() -> type[torch.fx.GraphModule]:
    """Return the class of graphs with int8 layers. The class is defined on first use because it needs torch."""
    import torch
    from torch import fx
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    class Int8Graph(fx.GraphModule):
        """A graph whose int8 layers run on int8 kernels where they are exact: for float32 images, in eval mode.

        Whether they are depends on the CPU and on the weights, see `why_not_int8`.

        Everything else takes the layers' own way: training mode, other devices and dtypes, layers with forward hooks,
        tracing and counting.

        The kernels hold packed copies of the weights. The graph packs them at the first call that uses them, and again
        after `train()`, `eval()`, `load_state_dict()`, `recompile()`, whatever converts all weights, such as `to()`, and
        after an operator wrote into a weight, as averaging does. After another change, such as replacing a layer, a
        parameter or its `data`, call `pack(model)`. `torch.func.functional_call` with other weights is not seen: call
        `layer_by_layer(model)` instead.

        The names here begin with an underscore because a layer's name cannot.
        """

        _program: Program | str | None = None  # or why there is none
        _packed: tuple[list[Tensor], list[int]] = [], []  # the weights, and how often each had been written when packed

        def _takes(self, images: Any) -> bool:
            """Tell whether the input is images, or rows for a linear layer that is alone in its graph."""
            return type(images) is torch.Tensor and len(images) > 0 and (images.dim() == 4 or (
                images.dim() > 1 and all(isinstance(layer, int8_layers().Int8Linear) for layer in self.children())))

        def _layer_by_layer(self, images: Tensor) -> Tensor:
            """Compute what the layers themselves compute, which defines the result."""
            return super().__call__(images)  # type: ignore[no-any-return]

        def __call__(self, *inputs: Any, **options: Any) -> Any:
            images: Any = inputs[0] if len(inputs) == 1 and not options else None
            if (self._takes(images) and images.dtype == torch.float32 and images.device.type == "cpu"
                    and not self.training and not torch.compiler.is_compiling() and not torch._C._is_tracing()
                    and _get_current_dispatch_mode() is None):
                if self._program is None or _writes(self._packed[0]) != self._packed[1]:
                    pack(self)
                program: Any = self._program
                if isinstance(program, Program) and not any(program.hooks):
                    with contextlib.suppress(NotFiniteError):  # the layers pass NaN on; fused activations could hide it
                        return program(images)
            return super().__call__(*inputs, **options)

        def train(self, mode: bool = True) -> Any:
            self._program = None
            return super().train(mode)

        def _apply(self, *arguments: Any, **options: Any) -> Any:
            self._program = None
            return super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]

        def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:  # a parent's `load_state_dict`, too
            self._program = None
            super()._load_from_state_dict(*arguments, **options)

        def recompile(self) -> Any:
            self._program = None
            return super().recompile()

        def __deepcopy__(self, memo: Any) -> Any:
            self._program, self._packed = None, ([], [])  # packed weights cannot be copied
            return super().__deepcopy__(memo)

    return Int8Graph


def pack(model: nn.Module) -> None:
    """Pack the weights of a model's int8 graphs as they are now. Call it after changing weights or layers by hand."""
    kind: Any = int8_graph()
    for graph in model.modules():
        if isinstance(graph, kind):
            graph._program = why_not_int8(graph) or Program(graph)
            weights = [tensor for tensor in (*graph.parameters(), *graph.buffers()) if not tensor.is_inference()]
            graph._packed = weights, _writes(weights)


def _writes(weights: list[Tensor]) -> list[int]:
    """Return how often operators have written into each tensor; inference tensors do not count that."""
    return [tensor._version for tensor in weights]
