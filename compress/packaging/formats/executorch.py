"""ExecuTorch programs, `.pte` files: the network lowered to XNNPACK's kernels, for one image a call."""

from __future__ import annotations

import logging
import warnings

import onnx

from compress.evaluation.runtime import quiet_library
from compress.packaging.formats.base import ExportFormat
from compress.packaging.formats.torch_export import exported_program
from compress.packaging.onnx_in_torch import OnnxInTorch
from metadata.errors import UserError, first_line

USAGE = """    from executorch.runtime import Runtime
    method = Runtime.get().load_program("{file}").load_method("forward")
    logits = method.execute([images])[0]  # (1, C, H, W) float32, preprocessed, to (1, classes)
"""


def _check(model: onnx.ModelProto) -> None:
    OnnxInTorch(model)


def write_executorch(model: onnx.ModelProto) -> dict[str, bytes]:
    """Return the content of the `.pte` file. What XNNPACK has no kernel for runs on ExecuTorch's portable ones.

    Raises:
        UserError: ExecuTorch cannot lower the network.
    """
    program = exported_program(model, free_batch=False)
    with quiet_library(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own, about itself
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        logging.getLogger("executorch").setLevel(logging.ERROR)
        try:
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            return {".pte": bytes(lowered.to_executorch().buffer)}
        except (RuntimeError, ValueError, TypeError, KeyError, AssertionError, NotImplementedError) as error:
            raise UserError("export.format executorch: ExecuTorch cannot lower the network: "
                            f"{first_line(error)}") from error


FORMAT = ExportFormat(title="ExecuTorch", modules={"executorch": "executorch"}, suffix=".pte", check=_check,
                      convert=write_executorch, requirements="executorch>=1.5\n", usage=USAGE)
