"""The file formats that `export.format` names beside ONNX: one file for each, found by its name."""
