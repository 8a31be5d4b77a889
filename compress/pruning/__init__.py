"""Structured pruning of modules: groups of coupled channels and their importance. Imports metadata."""
