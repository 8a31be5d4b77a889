"""The command line, one file a group of verbs. Imports any room, inside the verbs, so that `--help` imports no torch."""
