"""Tests of the wing training."""
