"""The wall clock of a search over all its sittings: what is spent is on disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from metadata.files import read_json, write_json
from metadata.schemas import Strict

BEAT_SECONDS = 2.0  # between notes of what is spent


class _Spent(Strict):
    spent: float


class SearchClock:
    """Counts the seconds of a search while it is open.

    Args:
        path: where the seconds of all sittings are kept.
        seconds: that the search may take.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self.before: float = read_json(path, _Spent).spent if path.is_file() else 0.0
        self.started = time.monotonic()
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> SearchClock:
        self.started = time.monotonic()
        self._beats.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._beats.join()
        self._save()

    @property
    def spent(self) -> float:
        """Seconds over all sittings."""
        return self.before + time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds that are left; 0 where the time is over."""
        return max(self.seconds - self.spent, 0.0)

    def share(self, fraction: float) -> float:
        """Return a fraction of all seconds, of those that are left at most."""
        return min(fraction * self.seconds, self.left)

    def until(self, moment: float) -> Callable[[], bool]:
        """Return a function that says whether a moment, in seconds of this clock, is still to come."""
        return lambda: self.spent < moment

    def said(self) -> str:
        """Return the time left in words."""
        return f"{self.left / 60:.1f} of {self.seconds / 60:g} minutes left"

    def _save(self) -> None:
        write_json(self.path, {"spent": round(self.spent, 3)})

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            self._save()
