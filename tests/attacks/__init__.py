"""Attacks on the evaluator, each through the evaluator's own command line: nobody scores more than they earned."""
