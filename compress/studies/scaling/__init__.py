"""Scaling laws: how the loss falls with parameters N, data D and compute C = N * D * epochs, and how sure that is."""
