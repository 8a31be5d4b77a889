"""A program of torch.export in a `.pt2` file: a graph of ATen operators with its weights, for any number of images."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from compress.packaging.formats.base import ExportFormat
from compress.packaging.onnx_in_torch import OnnxInTorch

USAGE = """    import torch
    import torch.ao.quantization.fx._decomposed  # the int8 operators, where the program is int8
    program = torch.export.load("{file}").module()
    logits = program(images)  # (N, C, H, W) float32, preprocessed, to (N, classes)
"""


def exported_program(model: onnx.ModelProto, free_batch: bool = True) -> ExportedProgram:
    """Return the network as a program of torch.export.

    Args:
        model: an ONNX file of the toolkit.
        free_batch: whether the program takes any number of images, or one.

    Raises:
        UserError: an operator has no form in torch.export.
    """
    dims = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    images = torch.zeros(2 if free_batch else 1, *dims[1:])
    shapes = ({0: Dim("images", min=1)},) if free_batch else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        return torch.export.export(OnnxInTorch(model).eval(), (images,), dynamic_shapes=shapes)


def _check(model: onnx.ModelProto) -> None:
    OnnxInTorch(model)


def write_torch_export(model: onnx.ModelProto) -> dict[str, bytes]:
    """Return the content of the `.pt2` file, without the example images that tracing took."""
    program = exported_program(model)
    program.example_inputs = None
    for node in program.graph.nodes:  # where the operators stand in the toolkit's source helps nobody
        node.meta.pop("stack_trace", None)
        node.meta.pop("nn_module_stack", None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return {".pt2": buffer.getvalue()}


def open_torch_export(path: Path) -> Callable[[Tensor], Tensor]:
    """Return a program that this process has written as a function, opened by torch. torch evaluates what the file says.

    The evaluator opens `.pt2` files of others in another way, as data.
    """
    return torch.export.load(path).module()


FORMAT = ExportFormat(title="torch.export", modules={"torch": "torch"}, suffix=".pt2", check=_check,
                      convert=write_torch_export, requirements="", usage=USAGE,
                      open=open_torch_export)
