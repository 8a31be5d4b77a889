"""Tests of the wing packaging."""
