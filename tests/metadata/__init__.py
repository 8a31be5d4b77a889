"""Tests of the wing metadata."""
