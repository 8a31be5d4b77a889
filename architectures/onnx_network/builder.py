"""Builds an `OnnxNetwork`: what the functions of the operators read their inputs from and write their calls with.

Each tensor that depends on the images is known by its shapes for two and for three images, on torch's meta device, where
nothing is computed. Everything else, sizes above all, is known by its value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from architectures.onnx_network.batch import batch_axis, with_images
from architectures.onnx_network.constants import check_total, evaluate
from architectures.onnx_network.graph import Array, OnnxGraph, OnnxNode
from architectures.onnx_network.naming import ANONYMOUS, CALLED, dotted_path, layer_name
from architectures.onnx_network.network import Call, Function, ImageCount, OnnxNetwork, Slot, KeptTensor, expand_to

COUNTS = (2, 3)



@dataclass(frozen=True, kw_only=True)
class Known:
    """A value that is known before any image: an array, or one for two images and one for three."""

    arrays: tuple[Array, Array]
    name: str = ""  # of the stored tensor that it comes from

    @property
    def fixed(self) -> bool:
        """Whether it is the same for any number of images."""
        return self.arrays[0] is self.arrays[1] or np.array_equal(*self.arrays)


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A value that depends on the images.

    Args:
        slot: where a forward pass keeps it.
        probes: tensors of its shapes for two and for three images, without values.
        front: the same numbers with the images first, where they are not first here; see `layout.py`.
    """

    slot: int
    probes: tuple[Tensor, Tensor]
    front: Front | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape for two images; sizes beside the batch are the same for any number."""
        return tuple(self.probes[0].shape)

    def batch(self) -> tuple[int, int] | None:
        """Return the axis that holds the images, and its size for one image."""
        return batch_axis(self.probes[0].shape, self.probes[1].shape)


@dataclass(frozen=True)
class Front:
    """A value with the images first, and where its axes are in the value that the file has.

    Args:
        value: of the shape (N, ...).
        groups: for each axis in the file the axes of `value` that it consists of, outermost first; 0 is the images.
    """

    value: Traced
    groups: tuple[tuple[int, ...], ...]

    @property
    def inside(self) -> bool:
        """Whether the images lie inside of an axis, with something else outside of them."""
        return any(0 in group[1:] for group in self.groups)


Value = Known | Traced


class NetworkBuilder:
    """Collects calls, modules and tensors while a graph is walked.

    Args:
        graph: after folding and the joining of patterns.
        input_shape: (C, H, W) of an image.
        channels_last: whether the file takes (N, H, W, C).
        batch: the number of images that the file fixes; 1 where it is free.
    """

    def __init__(self, graph: OnnxGraph, input_shape: Sequence[int], channels_last: bool, batch: int) -> None:
        self.graph, self.file_batch = graph, batch
        self.calls: list[Call] = []
        self.modules: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}  # of the modules and of the network itself, by name
        self.learned: dict[str, bool] = {}  # the network's own tensors: whether each is a parameter
        self.stored: dict[int, str] = {}
        self.permuted: dict[int, tuple[Traced, tuple[int, ...]]] = {}  # results of permute: what was permuted, and how
        self.slots = 1
        self.place = ""  # of the node that is walked
        self.values: dict[str, Value] = {}
        self.writers, self.readers = graph.writers(), graph.readers()
        first, second = (torch.empty(count, *input_shape, device="meta") for count in COUNTS)
        images = Traced(slot=0, probes=(first, second))
        self.values[graph.source] = self.permuted_call(images, (0, 2, 3, 1)) if channels_last else images

    # ---------------------------------------------------------------------------------------------- reading inputs

    def value(self, name: str) -> Value:
        """Return a tensor of the file by its name."""
        if name not in self.values:
            array = self.graph.constants[name]
            self.values[name] = Known(arrays=(array, array), name=self.graph.origins.get(name, name))
        return self.values[name]

    def images(self, node: OnnxNode, position: int = 0) -> Traced:
        """Return an input that depends on the images.

        Raises:
            NotExpressibleError: the input is a constant, or is not there.
        """
        found = self.value(node.inputs[position]) if node.has(position) else None
        if not isinstance(found, Traced):
            raise node.refuse("a constant where images were expected")
        return found

    def constant(self, node: OnnxNode, position: int) -> Array | None:
        """Return an input that is the same for any number of images, or None where the input is left out.

        Raises:
            NotExpressibleError: the input depends on the images or their number.
        """
        if not node.has(position):
            return None
        found = self.value(node.inputs[position])
        if isinstance(found, Traced) or not found.fixed:
            raise node.refuse("it is computed from the images where a constant was expected")
        return found.arrays[0]

    def constants(self, node: OnnxNode) -> list[Array | None]:
        """Return the first input as None and the others as constants, for functions that take attributes or inputs."""
        return [None, *(self.constant(node, position) for position in range(1, len(node.inputs)))]

    def only_reader(self, name: str) -> OnnxNode | None:
        """Return the node that reads a tensor, if there is one and the output is another tensor."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name != self.graph.result else None

    # --------------------------------------------------------------------------------------------- writing calls

    def call(self, target: Function, *args: Any, like: bool = False, **kwargs: Any) -> Traced:
        """Add a call of a function, or of a module by name, and return its result.

        Args:
            target: a function.
            args: `Traced`, `KeptTensor` and `ImageCount` stand for values.
            like: the result has the shape of the first argument, so that nothing needs to run.
            kwargs: passed as they are.
        """
        return self._add(target, target, args, kwargs, like)

    def _add(self, target: Function | str, probe: Function, args: tuple[Any, ...], kwargs: dict[str, Any],
             like: bool) -> Traced:
        sources = [value for value in _flat(args) if isinstance(value, Traced)]
        if target is not torch.reshape and any(source.front and source.front.inside for source in sources):
            raise ValueError("the images lie inside of an axis")
        if like:
            probes = sources[0].probes
        else:
            with torch.no_grad():
                probes = tuple(probe(*self._probe(args, at), **kwargs) for at in range(2))
        self.slots += 1
        self.calls.append(Call(target=target, args=_slotted(args), kwargs=kwargs, output=self.slots, place=self.place))
        return Traced(slot=self.slots, probes=probes)

    def _probe(self, value: Any, at: int) -> Any:
        if isinstance(value, Traced):
            return value.probes[at]
        if isinstance(value, ImageCount):
            return COUNTS[at] * value.times
        if isinstance(value, KeptTensor):
            return self.tensors[value.name].to("meta")
        if isinstance(value, list | tuple):
            return type(value)(self._probe(entry, at) for entry in value)
        return value

    def layer(self, node: OnnxNode, make: Callable[..., nn.Module], weights: dict[str, Array | None], source: Traced,
              named_by: str = "", like: bool = False, **options: Any) -> Traced:
        """Add a module with its weights, and return the result of its call.

        Args:
            node: the operator that it stands for.
            make: class of the module.
            weights: by their names in the module; None is left out.
            source: the tensor that the module is called with.
            named_by: a stored tensor that names the layer where its first weight does not.
            like: see `call`.
            options: of the module.
        """
        names = [stored.name for entry in (*node.inputs[1:], named_by) if entry
                 and isinstance(stored := self.value(entry), Known)]
        name = self.free_name(layer_name(node, names))
        with torch.device("meta"):
            module = make(**options).eval()
        wanted = module.state_dict()
        for key, array in weights.items():
            if array is None:
                continue
            tensor = as_tensor(array)
            if key not in wanted or wanted[key].shape != tensor.shape:
                raise node.refuse(f"{key} has the shape {list(tensor.shape)}")
            self.tensors[f"{name}.{key}"] = tensor
        for key, empty in wanted.items():
            if f"{name}.{key}" not in self.tensors:  # num_batches_tracked
                self.tensors[f"{name}.{key}"] = torch.zeros(empty.shape, dtype=empty.dtype)
        self.modules[name] = module
        return self._add(name, module, (source,), {}, like)

    def data(self, node: OnnxNode, known: Known, learned: bool = False) -> KeptTensor | Traced | float:
        """Return a constant as an argument: one number, a parameter where the file stores the tensor by name, or a buffer.

        With `learned` a float is a parameter whatever its name.

        What grows with the images is kept for one image and expanded.
        """
        array = known.arrays[0]
        if array.dtype.kind not in "fiub":
            raise node.refuse(f"a constant of type {array.dtype}")
        if not known.fixed:
            return self._expanded(node, known)
        if array.size == 1 and array.dtype.kind in "fiu":
            return float(array.reshape(-1)[0])
        if id(array) not in self.stored:
            named = bool(known.name) and not ANONYMOUS.match(known.name)
            learned = array.dtype.kind == "f" and (named or learned)
            anonymous = f"{dotted_path(node.scope)}.constant" if node.scope else "constant"
            name = self.free_name(dotted_path(known.name) if named else anonymous)
            self.tensors[name], self.learned[name] = as_tensor(array), learned
            self.stored[id(array)] = name
        return KeptTensor(self.stored[id(array)])

    def _expanded(self, node: OnnxNode, known: Known) -> Traced:
        try:
            found = batch_axis(known.arrays[0].shape, known.arrays[1].shape)
        except ValueError as error:
            raise node.refuse(f"a constant for {error}") from error
        if found is None:
            raise node.refuse("a constant depends on the number of images")
        axis, times = found
        one = np.take(known.arrays[0], [0], axis)
        if times != 1 or not all((array == one).all() for array in known.arrays):
            raise node.refuse("a constant depends on the number of images")
        stored = self.data(node, Known(arrays=(one, one), name=known.name), learned=True)
        if isinstance(stored, float):
            name = self.free_name("constant")
            self.tensors[name], self.learned[name], stored = as_tensor(one), True, KeptTensor(name)
        return self.call(expand_to, stored, with_images(known.arrays[0].shape, axis, times))

    def permuted_call(self, source: Traced, order: Sequence[int]) -> Traced:
        """Add a permutation of axes; two that follow each other are one, and one that changes nothing is none."""
        if source.slot in self.permuted:
            source, before = self.permuted[source.slot]
            order = [before[axis] for axis in order]
        if list(order) == list(range(len(order))):
            return source
        found = self.call(torch.permute, source, tuple(order))
        self.permuted[found.slot] = source, tuple(order)
        return found

    # ----------------------------------------------------------------------------------------------- walking nodes

    def known(self, node: OnnxNode) -> bool:
        """Compute a node whose inputs are known, also where they differ for two and for three images."""
        if node.op == "Shape" and isinstance(source := self.value(node.inputs[0]), Traced):
            cut = slice(node.number("start", 0), node.number("end", None))
            sizes = [np.asarray(list(probe.shape)[cut], np.int64) for probe in source.probes]
            self.values[node.outputs[0]] = Known(arrays=(sizes[0], sizes[1]))
            return True
        inputs = [self.value(name) if name else None for name in node.inputs]
        if any(isinstance(value, Traced) for value in inputs):
            return False
        given = [value for value in inputs if isinstance(value, Known)]
        sides = [evaluate(node, [value.arrays[at] if isinstance(value, Known) else None for value in inputs])
                 for at in range(1 if all(value.fixed for value in given) else 2)]
        for side in sides:
            check_total(self.graph, node, side)
        floats = {value.name for value in given if value.arrays[0].dtype.kind == "f" and value.arrays[0].size > 1}
        origin = floats.pop() if len(floats) == 1 else ""
        for name, first, second in zip(node.outputs, sides[0], sides[-1], strict=False):
            self.values[name] = Known(arrays=(first, second), name=origin)
        return True

    def free_name(self, wanted: str) -> str:
        """Return a dotted name that is neither that of a layer or tensor nor inside or around one."""
        empty, taken = OnnxNetwork([], 0, 0), {*self.modules, *self.tensors}
        parts = [f"{part}_" if hasattr(empty, part) else part for part in wanted.split(".")]
        for at in range(1, len(parts)):
            if ".".join(parts[:at]) in taken:
                parts = [*parts[:at - 1], "_".join(parts[at - 1:])]
                break
        if CALLED.fullmatch(wanted):
            parts = [f"{parts[0]}_layer"]  # a trace names calls after their functions
        name, number = ".".join(parts), 1
        while name in taken or any(other.startswith(f"{name}.") for other in taken):
            number += 1
            name = f"{'.'.join(parts)}_{number}"
        return name

    def network(self, result: Traced) -> OnnxNetwork:
        """Return the network, with its weights, whose logits are `result`."""
        kept = _needed(self.calls, result.slot)
        network = OnnxNetwork(kept, result.slot, result.shape[1]).eval()
        used = {call.target for call in kept if isinstance(call.target, str)}
        used |= {value.name for call in kept for value in _flat(call.args) if isinstance(value, KeptTensor)}
        for name, module in self.modules.items():
            if name in used:
                learned = {key for key, _ in module.named_parameters()}
                for key in list(module.state_dict()):
                    _put(module, key, self.tensors[f"{name}.{key}"], key in learned)
                _owner(network, name).add_module(name.rpartition(".")[2], module)
        for name, is_learned in self.learned.items():
            if name in used:
                _put(_owner(network, name), name.rpartition(".")[2], self.tensors[name], is_learned)
        return network


def as_tensor(array: Array) -> Tensor:
    """Return an array as a tensor of its own, floats of any width as float32."""
    return torch.from_numpy(np.array(array, np.float32 if array.dtype.kind == "f" else array.dtype, order="C"))


def _put(module: nn.Module, key: str, tensor: Tensor, learned: bool) -> None:
    if learned:
        module.register_parameter(key, nn.Parameter(tensor))
    else:
        module.register_buffer(key, tensor)


def _owner(network: nn.Module, name: str) -> nn.Module:
    """Return the module that holds a name, after making those on the way."""
    module = network
    for part in name.split(".")[:-1]:
        if part not in dict(module.named_children()):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module


def _needed(calls: list[Call], result: int) -> list[Call]:
    """Return the calls that the result needs, each with the slots that it is the last to read."""
    needed, kept = {result}, []
    for call in reversed(calls):
        if call.output in needed:
            read = {value.number for value in _flat(call.args) if isinstance(value, Slot)}
            kept.append(replace(call, last=tuple(sorted(read - needed))))
            needed |= read
    return kept[::-1]


def _flat(value: Any) -> list[Any]:
    return [part for entry in value for part in _flat(entry)] if isinstance(value, list | tuple) else [value]


def _slotted(value: Any) -> Any:
    if isinstance(value, Traced):
        return Slot(value.slot)
    if isinstance(value, list | tuple):
        return type(value)(_slotted(entry) for entry in value)
    return value
