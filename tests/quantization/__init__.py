"""Tests of the wing quantization."""
