"""Structured pruning on modules. Imports architectures and metadata."""
