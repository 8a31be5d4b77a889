"""Dynamic int8: fold BatchNorm, then give every Conv2d and Linear int8 weights; each layer quantizes its input at run time.

PyTorch's own dynamic quantization skips every Conv2d silently. Here a table lists for each layer its type with the reason,
its error and its latency. A layer that cannot become int8 is an error, or a warning in a model outside the layer table. A
layer that int8 arithmetic would make slower stores int8 weights and computes in float32; its row shows both latencies.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from architectures.describe import lower
from architectures.folding import fold_batch_norm
from architectures.int8 import int8_layers
from architectures.kernels import QuantizedTensor, why_not_int8
from architectures.program import Program, Step, int8_graph
from compress.quantization.int8_table import Int8Row, check_excluded, sqnr_db
from compress.quantization.weights import DEFAULT_FORM, WeightForm, quantize_weight
from metadata.errors import UserError, first_line

PASSES = 25  # timed passes of each form of a network, interleaved
GAIN = 1.03  # the speedup over float from which int8 arithmetic is worth its error
FLOAT_LAYER = "weights only, float is faster here"
FLOAT_NETWORK = "weights only, the network as a whole is faster in float"


# ---------------------------------------------------------------------------------------------- models of any kind


def quantize_dynamic(model: nn.Module, example_input: Tensor, exclude: Collection[str] = (),
                     weights: WeightForm = DEFAULT_FORM) -> nn.Module:
    """Return an int8 copy of a model, tuned for images of the example's size; it runs on one thread or several.

    A model of the layer table becomes a graph with BatchNorm folded and activations fused; its state dict is int8 data. In
    any other model, replace each Conv2d and Linear in place.

    Args:
        model: the trained model, which is not changed.
        example_input: (N, C, H, W) float32, preprocessed. Use real images to get meaningful errors in the table.
        exclude: names of layers that keep float weights.
        weights: which integers are allowed, see `quantize_weight`. On CPUs without VNNI only "pair" and "7-bit" weights
            run on int8 kernels; 8-bit ones compute the same in float32.

    Raises:
        UserError: the model does not accept the example; an excluded name is no Conv2d or Linear; a layer cannot be
            quantized and is not excluded; or there is nothing to quantize.
    """
    return quantize(model, example_input, exclude, weights)[0]


def quantize(model: nn.Module, example_input: Tensor, exclude: Collection[str] = (),
             weights: WeightForm = DEFAULT_FORM) -> tuple[nn.Module, list[Int8Row]]:
    """Return the result of `quantize_dynamic` and the table's rows."""
    _check_numbers(model, example_input)
    try:
        with torch.no_grad():
            copy.deepcopy(model).eval()(example_input)
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
        raise UserError(f"quantize_dynamic: the model does not take inputs of shape {list(example_input.shape)}, "
                        f"{example_input.dtype}: {first_line(error)}") from error
    try:
        _, channels, height, width = example_input.shape
        graph = as_graph(model, (channels, height, width))
    except (UserError, ValueError):  # the input is no image, or the layer table does not cover the model
        return _quantize_in_place(copy.deepcopy(model).eval(), example_input, exclude, weights)
    return quantize_graph(graph, exclude, example_input, weights=weights)


def _check_numbers(model: nn.Module, example_input: Tensor) -> None:
    """Raise UserError for an empty or non-float example, and for NaN or infinite values."""
    if example_input.dtype not in (torch.float32, torch.float64) or not len(example_input):
        raise UserError(f"quantize_dynamic: the example must be one image or more in float32, not "
                        f"{list(example_input.shape)} in {example_input.dtype}")
    for name, tensor in (("the example", example_input), *model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"quantize_dynamic: {name} holds NaN or infinite values")


def as_graph(model: nn.Module, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """Return the model as a graph of the layer table, in eval mode, with copies of its weights.

    Raises:
        UserError: the layer table does not cover the model.
    """
    return lower(model, input_shape).build()


def quantize_graph(model: fx.GraphModule, exclude: Collection[str] = (), example_input: Tensor | None = None,
                   choose: bool = True, weights: WeightForm = DEFAULT_FORM) -> tuple[fx.GraphModule, list[Int8Row]]:
    """Return a folded copy of a graph with int8 layers, and the table's rows.

    Args:
        model: a graph from `architectures.build.build`, which is not changed.
        exclude: names of layers that keep float weights.
        example_input: (N, C, H, W) images; without them nothing is measured, and all layers compute in int8.
        choose: let layers compute in float32 where float32 is faster.
        weights: which integers are allowed, see `quantize_weight`.

    Raises:
        UserError: see `quantize_dynamic`.
    """
    folded = fold_batch_norm(model)
    called = [str(node.target) for node in folded.graph.nodes if node.op == "call_module"]
    layers: dict[str, nn.Module] = {name: layer for name in called if isinstance(
        layer := folded.get_submodule(name), (nn.Conv2d, nn.Linear))}
    quantized = copy.deepcopy(folded)
    chosen = _replace(quantized, layers, exclude, weights)
    measured = example_input is not None and not why_not_int8(quantized)
    times: dict[str, tuple[float, float]] = {}
    as_float = FLOAT_LAYER
    if measured:
        times, as_float = _choose(quantized, folded, chosen, example_input[:1], choose)  # type: ignore[index]
    rows = _int8_rows(quantized, folded, layers, example_input, times, as_float)
    return int8_graph()(quantized, quantized.graph, class_name=type(model).__name__).eval(), rows


def _quantize_in_place(model: nn.Module, example_input: Tensor, exclude: Collection[str], weights: WeightForm,
                       ) -> tuple[nn.Module, list[Int8Row]]:
    layers: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.MultiheadAttention))}
    check_excluded("quantize_dynamic", exclude, layers)
    left = _left_float(layers, _observe(model, example_input, layers))
    quantized = copy.deepcopy(model)
    chosen = _replace(quantized, layers, {*exclude, *left}, weights)
    times = {} if why_not_int8(quantized) else _choose_in_place(quantized, model, chosen, example_input[:1])
    silent = {name: reason for name, reason in left.items() if name not in exclude}
    rows = [replace(row, reason=silent.get(row.layer, row.reason))
                for row in _int8_rows(quantized, model, layers, example_input, times)]
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for name in chosen:
        alone = _alone(quantized.get_submodule(name))
        for alias in names[id(layers[name])]:
            quantized.set_submodule(alias, alone)
    if silent:
        warnings.warn("quantize_dynamic: float stays " + "; ".join(f"{name} ({why})" for name, why in silent.items()),
                      UserWarning, stacklevel=3)
    return quantized, rows


def _left_float(layers: dict[str, nn.Module], called: Collection[str]) -> dict[str, str]:
    """Return the layers that cannot be replaced in place, with the reason."""
    left = {}
    for name, layer in layers.items():
        if isinstance(layer, nn.MultiheadAttention):
            left[name] = "its projections' weights belong to no layer"
        elif "forward" in vars(layer) or type(layer).forward not in (nn.Conv2d.forward, nn.Linear.forward):
            left[name] = f"a {type(layer).__name__} with a forward of its own"
        elif name not in called:
            left[name] = "not called by itself: another module may use its weights"
    return left


def _alone(layer: nn.Module) -> fx.GraphModule:
    """Return a graph of this layer alone, which runs on the int8 kernels."""
    graph = fx.Graph()
    graph.output(graph.call_module("int8", (graph.placeholder("input"),)))
    return int8_graph()(nn.ModuleDict({"int8": layer}), graph).eval()


# ---------------------------------------------------------------------------------------------------- layer by layer


def _replace(quantized: nn.Module, layers: dict[str, nn.Module], exclude: Collection[str],
             weights: WeightForm) -> list[str]:
    """Put int8 layers into a copy of the model, and return their names."""
    check_excluded("quantize_dynamic", exclude, layers)
    chosen = [name for name in layers if name not in exclude]
    if not chosen:
        raise UserError("quantize_dynamic: nothing became int8; the model has no Conv2d or Linear that is not excluded")
    for name in chosen:
        quantized.set_submodule(name, _int8_module(layers[name], name, weights))
    return chosen


def _choose(quantized: fx.GraphModule, folded: fx.GraphModule, chosen: Sequence[str], image: Tensor, choose: bool,
            ) -> tuple[dict[str, tuple[float, float]], str]:
    """Return each layer's milliseconds as float and as int8, and the reason for computing in float32.

    With `choose`, let each layer compute in float32 where float32 is faster; if the whole network is faster in float32, let
    all layers compute in float32.
    """
    as_float, as_int8 = _medians((Program(folded), Program(quantized)), image)

    def keep_float(name: str) -> None:
        quantized.get_submodule(name).activations = "float32"  # type: ignore[assignment]

    why = FLOAT_LAYER
    if choose:
        for name in chosen:
            if as_float[name] < GAIN * as_int8[name]:
                keep_float(name)
        whole_float, whole_mixed = (row[""] for row in _medians((Program(folded), Program(quantized)), image))
        if GAIN * whole_float < whole_mixed:  # converting between the types costs more than the layers save
            why = FLOAT_NETWORK
            for name in chosen:
                keep_float(name)
    return {name: (as_float[name], as_int8[name]) for name in chosen}, why


class _Timed(nn.Module):
    """A layer that records the milliseconds of each call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.taken: list[float] = []

    def forward(self, input: Tensor) -> Tensor:
        start = time.perf_counter_ns()
        output: Tensor = self.layer(input)
        self.taken.append((time.perf_counter_ns() - start) / 1e6)
        return output


@torch.no_grad()
def _choose_in_place(quantized: nn.Module, model: nn.Module, chosen: Sequence[str], image: Tensor,
                     ) -> dict[str, tuple[float, float]]:
    """Do the same as `_choose` for layers replaced in place."""
    as_float, as_int8 = copy.deepcopy(model), copy.deepcopy(quantized)
    for name in chosen:
        as_float.set_submodule(name, _Timed(as_float.get_submodule(name)))
        as_int8.set_submodule(name, _Timed(_alone(as_int8.get_submodule(name))))
    for _ in range(3 + PASSES):
        as_float(image)
        as_int8(image)
    times = {}
    for name in chosen:
        before, after = (statistics.median(cast(_Timed, copied.get_submodule(name)).taken[3:])
                         for copied in (as_float, as_int8))
        times[name] = round(before, 4), round(after, 4)
        if before < GAIN * after:
            quantized.get_submodule(name).activations = "float32"  # type: ignore[assignment]
    return times


def _int8_rows(quantized: nn.Module, model: nn.Module, layers: dict[str, nn.Module], images: Tensor | None,
              times: dict[str, tuple[float, float]], as_float: str = FLOAT_LAYER) -> list[Int8Row]:
    """Return the table's rows. `quantized` must still compute layer by layer, so that each layer can be observed."""
    before = {} if images is None else _observe(model, images, layers)
    after = {} if images is None else _observe(quantized, images, {
        name: quantized.get_submodule(name) for name in layers})
    weights = {name: layer.weight if isinstance(layer, (nn.Conv2d, nn.Linear)) else next(layer.parameters())
               for name, layer in layers.items()}  # a parametrized layer's first parameter is not its weight
    macs = {name: _macs(weight, before.get(name)) for name, weight in weights.items()}
    rows = []
    for name, layer in layers.items():
        dtype, reason = _type_and_reason(quantized.get_submodule(name), as_float)
        before_ms, after_ms = times.get(name, (None, None))
        rows.append(Int8Row(
            layer=name, kind=type(layer).__name__, dtype=dtype, reason=reason, weights=weights[name].numel(),
            macs_share=macs[name] / max(sum(macs.values()), 1),
            sqnr_db=sqnr_db(before[name], after[name]) if name in after and name in before else None,
            before_ms=before_ms, after_ms=after_ms))
    return rows


def _type_and_reason(layer: nn.Module, as_float: str) -> tuple[str, str]:
    if isinstance(layer, (nn.Conv2d, nn.Linear, nn.MultiheadAttention)):
        return "float32", "excluded by the recipe"
    if layer.activations == "float32":
        return "int8", as_float
    return "int8", "dynamic, per channel"


@torch.no_grad()
def _observe(model: nn.Module, images: Tensor, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Return the first output of each layer that is called."""
    seen: dict[str, Tensor] = {}

    def observed(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def observe(*inputs: Any, **options: Any) -> Any:
            output = forward(*inputs, **options)
            if name not in seen and isinstance(output, Tensor):  # an attention layer returns a tuple
                seen[name] = output.clone()
            return output
        return observe
    own = [(layer, vars(layer).get("forward")) for layer in layers.values()]
    for name, layer in layers.items():  # no hooks: they keep a TransformerEncoderLayer from its fast path
        layer.forward = observed(name, layer.forward)
    try:
        model.eval()(images)
    finally:
        for layer, forward in own:
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward
    return seen


def _macs(weight: Tensor, output: Tensor | None) -> int:
    """Return a layer's multiply-adds for one image; the number of weights where the layer was not called."""
    return weight.numel() if output is None else weight.numel() * output[0].numel() // len(weight)


@torch.no_grad()
def _layer_times(program: Program, image: Tensor) -> dict[str, float]:
    """Return the milliseconds of each layer with weights in one pass over the network.

    In a whole pass the weights and inputs are as cold in the caches as in use. A tensor's range and integers are computed
    once; all int8 layers that read the tensor share that time.
    """
    marks: list[tuple[str | None, int]] = []
    readers: dict[int, list[str]] = {}
    quantizing: dict[int, float] = {}
    held: list[QuantizedTensor] = []  # keeps them alive, so that no two have the same id

    def watch(step: Step, source: QuantizedTensor) -> None:
        if step.layer is not None and getattr(step.function, "int8", False):
            held.append(source)
            readers.setdefault(id(source), []).append(step.layer)
            start = time.perf_counter_ns()
            source.parts()
            taken = (time.perf_counter_ns() - start) / 1e6
            quantizing[id(source)] = quantizing.get(id(source), 0.0) + taken
            marks.append((None, start))
        marks.append((step.layer, time.perf_counter_ns()))

    program.one(image, watch)
    marks.append((None, time.perf_counter_ns()))
    times = {layer: (end - start) / 1e6 for (layer, start), (_, end) in itertools.pairwise(marks) if layer is not None}
    for source, layers in readers.items():
        for layer in layers:
            times[layer] += quantizing[source] / len(layers)
    return times


def _medians(programs: Sequence[Program], image: Tensor) -> list[dict[str, float]]:
    """Return each program's layer times, medians over interleaved passes; "" is the whole pass."""
    passes: list[list[dict[str, float]]] = [[] for _ in programs]
    for turn in range(-3, PASSES):
        for program, seen in zip(programs, passes, strict=True):
            start = time.perf_counter_ns()
            program(image)
            whole = (time.perf_counter_ns() - start) / 1e6
            if turn >= 0:
                seen.append(_layer_times(program, image) | {"": whole})
    return [{name: round(statistics.median(row[name] for row in seen), 4) for name in seen[0]} for seen in passes]


def in_half(numbers: Tensor, tolerated: Tensor) -> Tensor:
    """Return float32 numbers rounded to those that float16 holds, which a file stores in half the bytes.

    Where that changes one of them by more than is tolerated, all stay as they are.

    Args:
        numbers: (out,), scales or biases of a layer.
        tolerated: (out,), the largest change of each.
    """
    rounded = numbers.half().float()
    return rounded if bool(((rounded - numbers).abs() <= tolerated).all()) else numbers


@torch.no_grad()
def _int8_module(layer: nn.Module, name: str, weights: WeightForm) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise UserError(f"layer {name}: padding {layer.padding!r}, mode {layer.padding_mode!r} has no int8 form; list "
                            "it in quantize_dynamic.exclude")
        module = int8_layers().Int8Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride,
                                      layer.padding, layer.dilation, layer.groups)
    else:
        assert isinstance(layer, nn.Linear)
        module = int8_layers().Int8Linear(layer.in_features, layer.out_features)
    depthwise = isinstance(layer, nn.Conv2d) and layer.in_channels == layer.out_channels == layer.groups
    weight, scale = quantize_weight(layer.weight.detach().float().cpu(), weights, depthwise, name)
    bias = torch.zeros(len(scale)) if layer.bias is None else layer.bias.detach().float().cpu()
    # A bias may change as much as half a step of the layer's largest weights, a scale its largest weight by half a step.
    bias = in_half(bias, scale.max().expand_as(scale) / 2)
    scale[~weight.flatten(1).any(1)] = 1  # of a channel of zeros, whatever it is
    state = {"weight": weight, "weight_scale": in_half(scale, scale / 256), "bias": bias}
    module.load_state_dict(state)
    return module.eval()
