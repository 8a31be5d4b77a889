"""Scripts that measure, and `results/` with what they measured; never collected by pytest."""
