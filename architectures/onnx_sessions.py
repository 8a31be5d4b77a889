"""Sessions of ONNX Runtime, the same for a teacher, an imported network's measure, calibration and the evaluator."""

from __future__ import annotations

from typing import Any

from metadata.machine import machine


def onnxruntime_options(threads: int, may_saturate: bool) -> Any:
    """Return ONNX Runtime's session options: the number of threads, no log, and exact integer products on every CPU.

    On CPUs without VNNI instructions the fast kernel saturates in 16 bits with some weights. For a file with such weights
    an option selects the exact kernel there, which takes up to twice as long.

    Args:
        threads: of one inference.
        may_saturate: see `architectures.onnx_files.may_saturate`.
    """
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    if may_saturate and not {"avx512_vnni", "avx_vnni"} & set(machine()["flags"]):
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options
