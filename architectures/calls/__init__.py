"""What calls that are not one layer of the table are lowered to. Importing the package enters all of them."""

from __future__ import annotations

from architectures.calls import moves, numbers, weights

__all__ = ["moves", "numbers", "weights"]
