"""The evaluator beyond our own packages: ONNX, foreign code, comparing, the synthetic task."""
