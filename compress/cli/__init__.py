"""The command line, one file a group of verbs. Imports everything below, inside the verbs."""
