"""Int8, dynamic and static. Imports packaging, training, the evaluator, architectures and loaders."""

from compress.quantization.dynamic import quantize_dynamic as quantize_dynamic
