"""The operators that a `.pt2` file may call, and what is checked of a call before torch makes it.

Operators are looked up in a table by their full names: no text of a file names an attribute of anything. All of them are
functional: they change no tensor, draw no random number and keep nothing.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any, TYPE_CHECKING

from architectures.build import MAX_ACTIVATION_ELEMENTS

if TYPE_CHECKING:
    from torch import Tensor

TorchOperator = tuple[str, str, str]  # space, name, overload

# What torch.export writes for classifiers, before and after `run_decompositions`, and for `onnx_in_torch.py`.
_ATEN_OPERATORS = """
    _adaptive_avg_pool2d.default _log_softmax.default _native_batch_norm_legit_no_training.default _prelu_kernel.default
    _softmax.default _to_copy.default abs.default adaptive_avg_pool2d.default adaptive_max_pool2d.default add.Scalar
    add.Tensor addmm.default alias.default amax.default amin.default any.dim arange.start_step avg_pool2d.default
    batch_norm.default bmm.default cat.default chunk.default clamp.Tensor clamp.default clamp_min.default clone.default
    constant_pad_nd.default contiguous.default conv2d.default conv2d.padding convolution.default cos.default
    detach.default div.Scalar div.Tensor dropout.default elu.default eq.Scalar erf.default exp.default expand.default
    expand_as.default feature_dropout.default flatten.using_ints floor.default full.default full_like.default
    gelu.default group_norm.default gt.Scalar hardsigmoid.default hardswish.default hardtanh.default index.Tensor
    index_select.default instance_norm.default layer_norm.default leaky_relu.default lift_fresh_copy.default
    linalg_vector_norm.default linear.default log_softmax.int logical_not.default lt.Scalar masked_fill.Scalar
    matmul.default max_pool2d.default max_pool2d_with_indices.default maximum.default mean.default mean.dim
    minimum.default mish.default mm.default mul.Scalar mul.Tensor native_group_norm.default native_layer_norm.default
    ne.Scalar neg.default ones.default pad.default permute.default pixel_shuffle.default pow.Scalar pow.Tensor_Scalar
    pow.Tensor_Tensor prelu.default reciprocal.default relu.default relu6.default reshape.default roll.default
    rsqrt.default rsub.Scalar scalar_tensor.default scaled_dot_product_attention.default select.int sigmoid.default
    silu.default sin.default slice.Tensor softmax.int softplus.default split.Tensor split_with_sizes.default sqrt.default
    squeeze.default squeeze.dim squeeze.dims stack.default sub.Scalar sub.Tensor sum.default sum.dim_IntList
    swapaxes.default sym_size.int t.default tanh.default transpose.int unbind.int unflatten.int unsqueeze.default
    upsample_bilinear2d.default upsample_bilinear2d.vec upsample_nearest2d.default upsample_nearest2d.vec var.correction
    var.dim var_mean.correction view.default where.self zeros.default"""
_QUANTIZED_OPERATORS = "quantize_per_tensor.default dequantize_per_tensor.default dequantize_per_channel.default"


def _operators_of(space: str, names: str) -> list[TorchOperator]:
    parts = [name.split(".") for name in names.split()]
    return [(space, name, overload) for name, overload in parts]


TORCH_OPERATORS: tuple[TorchOperator, ...] = (*_operators_of("aten", _ATEN_OPERATORS),
                                              *_operators_of("quantized_decomposed", _QUANTIZED_OPERATORS))
TORCH_TARGETS = {f"torch.ops.{'.'.join(operator)}": operator for operator in TORCH_OPERATORS}
# Operators that work in place, as plain torch.export writes them; the functional ones of the same names are called.
_IN_PLACE_OPERATORS = """add_.Tensor sub_.Tensor mul_.Tensor div_.Tensor clamp_.default dropout_.default elu_.default
    hardsigmoid_.default hardswish_.default hardtanh_.default leaky_relu_.default mish_.default relu_.default
    relu6_.default sigmoid_.default silu_.default tanh_.default"""
IN_PLACE_TARGETS = {f"torch.ops.aten.{name}": TORCH_TARGETS[f"torch.ops.aten.{name.replace('_.', '.')}"]
                    for name in _IN_PLACE_OPERATORS.split()}
# Operators that always give memory of their own, in which nothing else lies.
FRESH_OPERATORS = frozenset({
    "add", "addmm", "adaptive_avg_pool2d", "batch_norm", "conv2d", "convolution", "div", "group_norm", "layer_norm",
    "linear", "mean", "mul", "sub", "_native_batch_norm_legit_no_training"})
FACTORY_OPERATORS = frozenset({"arange", "full", "ones", "scalar_tensor", "zeros"})
# Of arguments that make an operator random or change its statistics: the value that leaves it plain.
PLAIN_SETTINGS = {"batch_norm": ("training", False), "dropout": ("train", False), "feature_dropout": ("train", False),
         "instance_norm": ("use_input_stats", True), "scaled_dot_product_attention": ("dropout_p", 0.0)}
# What torch raises for arguments that it does not take.
CALL_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError,
               MemoryError)


@functools.cache
def _torch_operators() -> dict[TorchOperator, Any]:
    """Return torch's operators by the names of the table.

    Raises:
        AssertionError: the installed torch has made one of them change its arguments.
    """
    import torch
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers quantized_decomposed
    found: dict[TorchOperator, Any] = {}
    for space, name, overload in TORCH_OPERATORS:
        operator = getattr(getattr(getattr(torch.ops, space), name), overload)
        if not isinstance(operator, torch._ops.OpOverload) or operator._schema.is_mutable:
            raise AssertionError(f"torch's {name}.{overload} is no functional operator")
        found[space, name, overload] = operator
    return found


def bound_arguments(operator: TorchOperator, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by the names in the operator's schema, with its defaults for those left out.

    Raises:
        ValueError: too many, one twice, an unknown or a missing one.
    """
    stated = _torch_operators()[operator]._schema.arguments
    names = [each.name for each in stated if not each.kwarg_only]
    known = {each.name for each in stated}
    given = dict(zip(names, args, strict=False))
    if len(args) > len(names) or given.keys() & kwargs.keys() or not kwargs.keys() <= known:
        raise ValueError(f"{operator[1]} does not take the arguments {[*names[:len(args)], *kwargs][:9]}")
    defaults = {each.name: each.default_value for each in stated if each.has_default_value()}
    found = defaults | given | kwargs
    if found.keys() != known:
        raise ValueError(f"{operator[1]} needs the arguments {sorted(known - found.keys())}")
    return {each.name: found[each.name] for each in stated}


def call_operator(operator: TorchOperator, args: Sequence[Any], kwargs: dict[str, Any], results: int, device: Any
                  ) -> list[Any]:
    """Call an operator of the table. Return its results: tensors and whole numbers.

    Args:
        operator: one of `TORCH_OPERATORS`.
        args, kwargs: tensors, numbers, texts and lists of these.
        results: how many the file names.
        device: where an operator makes a tensor that takes none.

    Raises:
        ValueError: an argument would make the operator random or change its statistics, or its results are others than
            the file names, or too large. Also what torch raises: `CALL_ERRORS`.
    """
    import torch
    function, name = _torch_operators()[operator], operator[1]
    bound = bound_arguments(operator, args, kwargs)
    _check_plain(name, bound)
    _check_parts(name, bound, results)
    if name in FACTORY_OPERATORS:
        sizes = bound["size"] if "size" in bound else [1] if name == "scalar_tensor" else [
            abs(bound["end"] - bound["start"]) / abs(bound["step"])]
        if math.prod(sizes) > MAX_ACTIVATION_ELEMENTS:
            raise ValueError(f"{name} makes over {MAX_ACTIVATION_ELEMENTS:,} elements")
        kwargs = {**kwargs, "device": device}
    result = function(*args, **kwargs)
    found = list(result) if isinstance(result, list | tuple) else [result]
    if len(found) != results or not all(isinstance(each, torch.Tensor | int) for each in found):
        raise ValueError(f"{name} gives {len(found):,} results or others than tensors, the file names {results:,}")
    return found


def _check_plain(name: str, bound: dict[str, Any]) -> None:
    """Refuse training: what answers today must answer tomorrow."""
    if name in PLAIN_SETTINGS:
        argument, plain = PLAIN_SETTINGS[name]
        if type(bound[argument]) not in (bool, int, float) or bound[argument] != plain:
            raise ValueError(f"{name} with {argument} {str(bound[argument])[:20]}: a program in training, export it after "
                             "eval()")
    if name == "instance_norm" and (bound["running_mean"] is not None or bound["running_var"] is not None):
        raise ValueError("instance_norm with running statistics: a program in training, export it after eval()")


def _check_parts(name: str, bound: dict[str, Any], results: int) -> None:
    """Refuse to split a tensor into other parts than the file names: there could be as many as elements."""
    if name not in ("chunk", "split", "unbind"):
        return
    tensor: Tensor = bound["self"]
    size = tensor.shape[bound["dim"]]
    step = -(-size // bound["chunks"]) if name == "chunk" else bound["split_size"] if name == "split" else 1
    parts = -(-size // step) if step > 0 else 0
    if parts != results:
        raise ValueError(f"{name} gives {parts:,} parts, the file names {results:,}")
