"""Data sets: from bytes on disk to `Splits(train, validation, test, card)`. Imports only `metadata`.

`loaders.load` is imported on first use, so that the import of a part of the room stays light.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loaders.catalog import load
    return load
