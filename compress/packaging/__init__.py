"""What leaves the house: ONNX files, submission folders, the bundled evaluator. Imports the evaluator and below."""
