"""Source files written on the spot."""

from __future__ import annotations

from pathlib import Path


def plant(root: Path, **files: str) -> Path:
    """Write a package `house` with modules of the given texts."""
    (root / "house").mkdir()
    (root / "house" / "__init__.py").write_text('"""A house."""\n')
    for name, text in files.items():
        (root / "house" / f"{name}.py").write_text(text)
    return root
