"""Model families, one a file: `MODELS` maps a model's name to the function that builds it."""
