"""Find the nearest known name, for messages about unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def spelled(name: str, known: Iterable[str]) -> str:
    """Return the known name that differs only in case, underscores and hyphens, or else the name itself."""
    def plain(text: str) -> str:
        return text.replace("_", "").replace("-", "").lower()
    return next((other for other in known if plain(other) == plain(name)), name)


def closest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" where a known name is near, or else ""."""
    by_plain = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), list(by_plain), n=1)
    return f"; did you mean {by_plain[near[0]]!r}?" if near else ""
