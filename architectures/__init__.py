"""What a network is: the layer table, building, counting, describing, the model families. Imports metadata alone.

`architectures.make` is imported on first use, so that the import of a part of the room stays light.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "make":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from architectures.zoo import make
    return make
