"""Structured pruning: what is coupled, how important it is, and the network without some of it. Imports architectures."""
