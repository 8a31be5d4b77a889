"""The compression toolkit: distill, prune, quantize, package, verify and score image classifiers.

The verbs of the package are imported on first use, so that `import compress` does not import torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_MODULES = {
    "run": "compress.api", "plan": "compress.api", "train": "compress.api", "prune": "compress.api",
    "import_onnx": "compress.api",
    "quantize_dynamic": "compress.quantization.dynamic", "evaluate_submission": "compress.evaluation.evaluate",
    "load_model": "compress.evaluation.runtimes"}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
