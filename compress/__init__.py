"""The compression toolkit: teacher in, distilled, pruned, int8, packaged, verified and scored submission out."""

__version__ = "0.2.0"
