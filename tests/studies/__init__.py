"""Tests of the wing studies."""
