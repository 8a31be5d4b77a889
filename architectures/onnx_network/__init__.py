"""An ONNX classifier as a torch module: `read` makes a network of a file, the other files hold one function an operator."""
