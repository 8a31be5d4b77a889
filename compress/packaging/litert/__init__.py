"""The writer of `.tflite` files: an ONNX network of the toolkit, float or int8, as a file for LiteRT."""
