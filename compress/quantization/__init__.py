"""Int8, dynamic and static. Imports packaging, training, the evaluator, architectures and loaders."""
