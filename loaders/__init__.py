"""Bytes on disk -> `Splits(train, validation, test, card)`. Imports metadata alone."""
