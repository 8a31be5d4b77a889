"""The last layer with weights on the way to a model's output, found in the graph of a forward pass.

The order in which modules are registered says nothing: a head may be registered first, or not be a module at all. The graph
that autograd records shows which weights the logits are computed with, whatever the model's code looks like.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

ELEMENTWISE = {"AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0"}  # of these a matrix is no layer's weight

Node = Any  # a node of autograd's graph: torch.autograd.graph.Node


def head_parameters(model: nn.Module, example: Tensor) -> dict[str, nn.Parameter]:
    """Return the parameters of the last layer on every path to the output, and those applied to its result, by name.

    A layer here is a matrix product or a convolution with a weight of at least two dimensions.

    Args:
        model: its parameters, buffers and modes stay as they are.
        example: (N, C, H, W) float32 on the model's device.
    """
    owned = dict(model.named_parameters())
    tracked = {name: parameter.detach().requires_grad_(parameter.is_floating_point()) for name, parameter in owned.items()}
    names = {id(tensor): name for name, tensor in tracked.items()}
    images = example.detach().requires_grad_()
    with in_evaluation(model), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        output = functional_call(model, tracked, (images.clone(),))  # a copy, because a model may change its input in place
    if not isinstance(output, Tensor) or output.grad_fn is None:
        return {}
    order = _topological(output.grad_fn)
    depends: dict[Node, bool] = {}
    for node in order:  # inputs first
        depends[node] = getattr(node, "variable", None) is images or any(depends[source] for source in _sources(node))
    if not depends[output.grad_fn]:  # a frozen part ran without gradients, which cuts the graph
        depends = {node: not hasattr(node, "variable") and not _is_weight(node) for node in order}
    found: set[str] = set()
    waiting, seen = [output.grad_fn], set[Node]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        weights = {names[id(leaf.variable)] for source in _sources(node) if not depends[source]
                   for leaf in _topological(source) if id(getattr(leaf, "variable", None)) in names}
        found |= weights
        if node.name() in ELEMENTWISE or all(owned[name].dim() < 2 for name in weights):
            waiting += [source for source in _sources(node) if depends[source]]
    return {name: owned[name] for name in owned if name in found}


def reorder_classes(model: nn.Module, order: Sequence[int], example: Tensor) -> bool:
    """Reorder a model's classes in place: logit i becomes the one that was logit `order[i]`.

    The rows of the last layer are reordered, and the result is proven on the example. A model whose last layer does not
    allow it stays as it is.

    Args:
        model: (N, C, H, W) -> (N, classes).
        order: a permutation of the classes.
        example: images that tell the classes apart, such as random ones.

    Returns:
        Whether the classes were reordered.
    """
    rows = [parameter for parameter in head_parameters(model, example).values()
            if parameter.dim() and len(parameter) == len(order)]
    kept = [parameter.detach().clone() for parameter in rows]
    with in_evaluation(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        wanted = model(example)[:, list(order)]
        for parameter in rows:
            parameter.copy_(parameter[list(order)])
        done = bool(torch.allclose(model(example), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())))
        for parameter, old in zip(rows, kept, strict=True):
            if not done:
                parameter.copy_(old)
    return done


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside the context, and every module back into its own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _sources(node: Node) -> list[Node]:
    return [source for source, _ in node.next_functions if source is not None]


def _is_weight(node: Node) -> bool:
    """Return whether a node only reshapes or transposes a parameter."""
    return all(hasattr(source, "variable") or _is_weight(source) for source in _sources(node)) and len(_sources(node)) == 1


def _topological(start: Node) -> list[Node]:
    """Return the nodes that a node is computed from, and itself, sources first."""
    order: list[Node] = []
    placed: set[Node] = set()
    waiting = [(start, False)]
    while waiting:
        node, expanded = waiting.pop()
        if expanded:
            order.append(node)
        elif node not in placed:
            placed.add(node)
            waiting.append((node, True))
            waiting += [(source, False) for source in _sources(node)]
    return order
