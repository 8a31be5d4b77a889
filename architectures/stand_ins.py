"""What a node of a trace gives, by shape and type: each node is run once, on tensors of zeros."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from architectures.layers.base import place_of
from metadata.errors import UserError, first_line

CPU, META = torch.device("cpu"), torch.device("meta")
# Multiply-adds that one trace spends on shapes. What is beyond runs on torch's meta device: without numbers, but by Python
# code that takes seconds to start, and longer than a small layer.
AFFORDED = 2**30


class StandIns:
    """The nodes' stand-ins: tensors of their shapes and types, without their values.

    Args:
        model: the network that is traced.
        count: number of images.
        input_shape: (C, H, W).
        constants: tensors that the network's code made, by the name of their node's target.

    Attributes:
        home: the device of the network.
        asked: whether any stand-in was asked for.
        running: whether a node runs at the moment, so that what it calls is no part of the trace.
    """

    def __init__(self, model: nn.Module, count: int, input_shape: tuple[int, int, int], constants: dict[str, Tensor]
                 ) -> None:
        self.model, self.count, self.input_shape, self.constants = model, count, input_shape, constants
        self.home = next((tensor.device for tensor in model.state_dict().values()), CPU)
        self.asked = self.running = False
        self._networks = {self.home: model}
        self._facts: dict[fx.Node, Any] = {}  # a tensor that takes no memory, or what else the node gives
        self._known = self._spent = 0

    def of(self, node: fx.Node) -> Any:
        """Return a tensor of the shape and type of the node's, with other values, or what else the node gives.

        Raises:
            UserError: the network does not take such images.
        """
        self.asked = True
        for each in list(node.graph.nodes)[self._known:] if node not in self._facts else ():
            self._known += 1
            self._facts[each] = self._fact(each)
            if each is node:
                break
        return self._facts[node]

    def measure(self, graph: fx.Graph) -> None:
        """Put each tensor's shape into its node's `meta["shape"]`, and those of its parts into `meta["parts"]`."""
        for node in graph.nodes:
            if node.op == "output":
                continue
            if node not in self._facts:
                self._facts[node] = self._fact(node)
            fact = self._facts[node]
            if isinstance(fact, Tensor):
                node.meta["shape"] = tuple(fact.shape)
            elif isinstance(fact, (tuple, list)):
                node.meta["parts"] = [tuple(part.shape) for part in fact if isinstance(part, Tensor)]

    def _fact(self, node: fx.Node) -> Any:
        """Run one node on stand-ins. What it gives is kept without its values: an expanded zero takes no memory."""
        if node.op == "placeholder":
            return torch.zeros(()).expand(self.count, *self.input_shape)
        if node.op == "get_attr":
            tensor = self.constants.get(str(node.target))
            if tensor is None:
                self.running = True  # fx would record that the attribute is read
                tensor = attribute_at(self.model, str(node.target))
                self.running = False
            return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        device = self._affordable(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: _changed(
            self._facts[source], lambda fact: solid(fact, device)))
        self.running = True
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                if node.op == "call_module":
                    value = self._network(device).get_submodule(str(node.target))(*args, **kwargs)
                elif node.op == "call_method":
                    value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    value = node.target(*args, **kwargs)  # type: ignore[operator]
        except UserError:
            raise
        except Exception as error:  # whatever the network's own code raises
            raise UserError(f"the model does not take {self.count} images of shape {list(self.input_shape)}: layer "
                            f"{place_of(node)}: {first_line(error)}") from error
        finally:
            self.running = False
        return _changed(value, lambda tensor: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))

    def _affordable(self, node: fx.Node) -> torch.device:
        """Return the device where a node runs: the CPU, or the meta device where the node would take too long there.

        What a node costs is estimated from above: each number of its largest tensor meets the weights of its channel, or
        the other tensor's last dimension.
        """
        facts = [self._facts[source] for source in node.all_input_nodes]
        tensors = [part for fact in facts for part in (fact if isinstance(fact, tuple) else (fact,))
                   if isinstance(part, Tensor)]
        largest = max(tensors, key=Tensor.numel, default=torch.zeros(0))
        if node.op == "call_module":
            module: Any = self.model.get_submodule(str(node.target))
            weights = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            channels = getattr(module, "in_channels", getattr(module, "in_features", largest.numel()))
            strides = math.prod(module.stride) if isinstance(module, nn.Conv2d) else 1
            cost = largest.numel() * (1 + weights // max(1, channels) // strides)
        else:
            cost = largest.numel() * max((tensor.shape[-1] for tensor in tensors if tensor.dim()), default=1)
        if self._spent + cost > AFFORDED:
            return META
        self._spent += cost
        return CPU

    def _network(self, device: torch.device) -> nn.Module:
        """Return the network on a device."""
        if device not in self._networks:
            self._networks[device] = sharing_copy(self.model, device)
        return self._networks[device]


def is_in_place(node: fx.Node) -> bool:
    """Return whether a node is a method that changes its tensor, such as `zero_`."""
    name = str(node.target)
    return node.op == "call_method" and name.endswith("_") and not name.startswith("_")


def solid(tensor: Tensor, device: torch.device) -> Tensor:
    """Return zeros of a tensor's shape and type."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)


def sharing_copy(model: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Return a copy of a network that shares its parameters, or whose parameters are on a device."""
    memo: dict[int, Any] = {id(each): nn.Parameter(each.detach().to(device), each.requires_grad) if device else each
                            for each in model.parameters()}
    copied = copy.deepcopy(model, memo)
    return copied.to(device) if device else copied


def attribute_at(root: Any, path: str) -> Any:
    """Return what lies at a dotted path of attributes."""
    for part in path.split("."):
        root = getattr(root, part)
    return root


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a value whose tensors, also those in a tuple or list, are changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return tuple(_changed(part, change) for part in value)
    return value
