"""Training: settings, loop, optimizers, schedules. Imports the evaluator's measurements, architectures and loaders."""
