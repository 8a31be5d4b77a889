"""The verbs of the package, for type checkers; `__init__.py` imports them on first use."""

from compress.api import import_onnx as import_onnx, plan as plan, prune as prune, run as run, train as train
from compress.evaluation.evaluate import evaluate_submission as evaluate_submission
from compress.evaluation.runtimes import load_model as load_model
from compress.quantization.dynamic import quantize_dynamic as quantize_dynamic

__version__: str
__all__ = ["__version__", "evaluate_submission", "import_onnx", "load_model", "plan", "prune", "quantize_dynamic", "run",
           "train"]
