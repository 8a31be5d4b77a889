"""The type that a network computes in while it trains; its weights stay float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from compress.training.settings import Precision, TrainingSettings
from metadata.errors import UserError


def autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Return torch's autocast to a type, or a context that does nothing for None."""
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return the type to compute in, None for float32."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else None
    if precision == "mixed":
        if has_bfloat16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else None
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device has bfloat16 instructions."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(False))
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def usable(settings: TrainingSettings, device: torch.device, warn: Callable[[str], None]) -> TrainingSettings:
    """Return the settings, in float32 with a warning where a CPU has no instructions for the precision asked for.

    Raises:
        UserError: float16 on a CPU, where float16 is slower than float32 and saves nothing.
    """
    if device.type != "cpu":
        return settings
    if settings.precision == "float16":
        raise UserError("precision float16 (amp_dtype float16) is for CUDA; on a CPU use bfloat16 or float32")
    if settings.precision in ("mixed", "bfloat16") and not has_bfloat16(device):
        warn(f"precision {settings.precision} (use_amp): this CPU has no bfloat16 instructions; training in float32")
        return settings.model_copy(update={"precision": "float32"})
    return settings
