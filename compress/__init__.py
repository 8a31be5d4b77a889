"""The compression toolkit: teacher in, distilled, pruned, int8, packaged, verified and scored submission out."""
