"""Recipes, stages, runs and their ledger. Imports everything but studies and the command line."""
