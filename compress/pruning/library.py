"""torch-pruning, imported without timm: its counter of operations would take two seconds to import it, and is not used."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def import_torch_pruning() -> Any:
    """Return the package torch_pruning. It does without timm, as where timm is not installed, unless timm is loaded."""
    if "timm" in sys.modules:
        return importlib.import_module("torch_pruning")
    sys.modules["timm"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("torch_pruning")
    finally:
        del sys.modules["timm"]


tp = import_torch_pruning()
