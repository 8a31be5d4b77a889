"""The nearest known name, for messages about unknown ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def spelled(name: str, known: Iterable[str]) -> str:
    """The known name that differs in case, underscores and hyphens alone, or the name as it is."""
    def plain(text: str) -> str:
        return text.replace("_", "").replace("-", "").lower()
    return next((other for other in known if plain(other) == plain(name)), name)


def closest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' where some known name is near, or nothing."""
    by_plain = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), list(by_plain), n=1)
    return f"; did you mean {by_plain[near[0]]!r}?" if near else ""
