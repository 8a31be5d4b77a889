"""Data sets: from bytes on disk to `Splits(train, validation, test, card)`. Imports only `metadata`."""
