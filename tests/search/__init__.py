"""Tests of the wing pruning."""
