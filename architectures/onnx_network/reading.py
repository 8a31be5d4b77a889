"""`read_network`: an ONNX file, checked, as a torch module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from architectures.onnx_data import parse_onnx, read_external_data
from architectures.onnx_files import OnnxFile, read_onnx
from architectures.onnx_network import elementwise, moving, pooling, weighted
from architectures.onnx_network.builder import NetworkBuilder, Traced
from architectures.onnx_network.constants import fold
from architectures.onnx_network.graph import NotExpressibleError, OnnxGraph, graph_of
from architectures.onnx_network.last_softmax import without_softmax
from architectures.onnx_network.network import OnnxNetwork
from architectures.onnx_network.patterns import Patterns
from architectures.onnx_network.registry import OPERATORS
from metadata.errors import UserError, VerificationError, enough_memory

FILES = (elementwise, moving, pooling, weighted)  # each enters its operators into the registry
COLOURS = (1, 3, 4)  # channels of images


@dataclass(frozen=True, kw_only=True)
class OnnxClassifier:
    """An ONNX file that gives logits: a softmax at its end is left out.

    Args:
        path: the file.
        file: what the check of the file found.
        model: the file's content, with its external data and without a softmax at its end.
        input_shape: (C, H, W).
        notes: one line about each change.
    """

    path: Path
    file: OnnxFile
    model: Any
    input_shape: tuple[int, int, int]
    notes: list[str] = field(default_factory=list)


def open_classifier(path: Path, input_shape: Sequence[int] | None = None) -> OnnxClassifier:
    """Check an ONNX file and read it, without running it.

    Args:
        path: the file.
        input_shape: (C, H, W) of the images, for a file that leaves their size open; what a file states must agree.

    Raises:
        UserError: there is no such file, or it is not one that the evaluator would take: see `read_onnx`.
    """
    shape = _image_shape(path, input_shape)
    with _of_the_users(path):
        file = read_onnx(path, shape)
        model = parse_onnx(path)
        if file.content is not None:
            read_external_data(path, model)
    notes = [text for text in [without_softmax(model)] if text]
    if file.channels_last:
        notes.append("the file takes (N, H, W, C), the network takes (N, C, H, W)")
    if file.batch:
        notes.append(f"the file takes {file.batch} image{'s' * (file.batch > 1)} a call, the network any number")
    return OnnxClassifier(path=path, file=file, model=model, input_shape=shape, notes=notes)


def read_network(opened: OnnxClassifier) -> OnnxNetwork:
    """Return a file's network: (N, C, H, W) float32 -> (N, classes) logits, in eval mode.

    Raises:
        NotExpressibleError: an operator has no form in torch that the layer table may know; the operator is named.
        UserError: reading it takes more memory than there is.
    """
    try:
        with _of_the_users(opened.path):
            graph = graph_of(opened.model)
            fold(graph)
            graph.keep_needed()
            Patterns(graph).join()
            build = NetworkBuilder(graph, opened.input_shape, opened.file.channels_last, opened.file.batch or 1)
            network = build.network(_walked(graph, build))
    except NotExpressibleError as error:
        raise NotExpressibleError(f"{opened.path}: {error}") from error
    network.remarks = opened.notes
    return network


def _walked(graph: OnnxGraph, build: NetworkBuilder) -> Traced:
    for node in graph.nodes:
        if node.outputs[0] in build.values:  # a node before it took this one in
            continue
        if build.known(node):
            continue
        function, build.place = OPERATORS.get(node.op), node.place
        if function is None:
            raise node.refuse("no layer stands for it")
        try:
            found = function(node, build)
        except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, AssertionError) as error:
            raise node.refuse("its inputs or attributes do not fit it") from error
        for name, value in zip(node.outputs, found if isinstance(found, list) else [found], strict=False):
            build.values[name] = value
    result = build.value(graph.result)
    if not isinstance(result, Traced):
        raise NotExpressibleError("its output does not depend on the images")
    if (result.batch() or (-1, 0)) != (0, 1) or any(size != 1 for size in result.shape[2:]) or len(result.shape) < 2:
        raise NotExpressibleError(f"its output has the shape {list(result.shape)} for two images, expected (2, classes)")
    return moving.flat_logits(build, result)


@contextlib.contextmanager
def _of_the_users(path: Path) -> Iterator[None]:
    """Let what is wrong with a file be a mistake, and not a claim that does not hold."""
    try:
        with enough_memory(path):
            yield
    except VerificationError as error:
        raise UserError(str(error)) from error


def stated_sizes(path: Path) -> tuple[int, int, int] | None:
    """Return (C, H, W) as an ONNX file's input states it, 0 where it leaves a size open; None where it has not four axes.

    Raises:
        UserError: there is no such file, or it is no ONNX file.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    with _of_the_users(path):
        graph = parse_onnx(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    image = next((value for value in graph.input if value.name not in weights), None)
    stated = [dim.dim_value for dim in image.type.tensor_type.shape.dim] if image is not None else []
    if len(stated) != 4:
        return None
    _, first, second, third = stated
    return (third, first, second) if third in COLOURS and first not in COLOURS else (first, second, third)


def _image_shape(path: Path, wanted: Sequence[int] | None) -> tuple[int, int, int]:
    """Return (C, H, W): as wanted, or as the file states.

    Raises:
        UserError: the file states another size than the one wanted, or leaves a size open and none is wanted.
    """
    sizes = stated_sizes(path)
    if sizes is None and wanted is None:
        raise UserError(f"{path}: expected one input of images, (N, C, H, W) or (N, H, W, C)")
    first, second, third = sizes or (0, 0, 0)  # the checks of the file say what is wrong with it
    if wanted is not None:
        channels, height, width = wanted
        if first == channels and all((second, third)) and [second, third] != [height, width]:
            size = second if second == third else f"[{second},{third}]"
            raise UserError(f"{path}: the file takes images of {second}x{third} pixels, not of {height}x{width}; state "
                            f"that size (in a recipe data.image_size={size}), or export the file with a free size")
        return channels, height, width
    if min(first, second, third) < 1:
        shown = ", ".join(str(size or "?") for size in (first, second, third))
        raise UserError(f"{path}: the file leaves the size of its images open ({shown}); give input_shape, such as "
                        "3,224,224")
    return first, second, third
