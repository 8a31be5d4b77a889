"""Tests of architectures/: the layer table."""
