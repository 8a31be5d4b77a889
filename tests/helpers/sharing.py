"""Fixtures that are expensive to make: made once per test session and shared by all xdist workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from metadata.locks import appearing, waiting_lock


def shared_folder(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """Return a folder that the first worker to ask for fills; the others wait until the folder is complete.

    Tests must not change what is in the folder.
    """
    own = factory.getbasetemp()
    session = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own  # a worker's folder lies in the session's
    folder = session / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    with waiting_lock(folder):
        if not folder.is_dir():
            with appearing(folder) as partial:
                fill(partial)
    return folder
