"""Benchmark scripts, and their recorded results in `results/`. Pytest does not collect them."""
