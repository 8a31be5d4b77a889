"""The differences between the toolkit and the single file of a submission, which is joined from the same sources."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

from metadata.errors import UserError
from metadata.files import sha256

STANDALONE = __name__ != "compress.evaluation.extras"
HOME = Path(__file__).parents[0 if STANDALONE else 2]
SOURCES = ("metadata/*.py", "architectures/**/*.py", "loaders/images.py", "loaders/listing.py", "compress/evaluation/*.py")


def toolkit(flag: str, module: str) -> Any:
    """Import a module of `compress.evaluation` that is not in the single file, for the flag that needs the module.

    Raises:
        UserError: the evaluator is the single file.
    """
    if STANDALONE:
        raise UserError(f"{flag} needs the toolkit: this {Path(__file__).name} is the bundled evaluator, which "
                        "stands alone; run the toolkit's own model_loader.py")
    return importlib.import_module(f"compress.evaluation.{module}")


def evaluator_sha256() -> str:
    """Return which evaluator measures: the single file's SHA-256, or "toolkit" and a SHA-256 over the sources."""
    if STANDALONE:
        return sha256(Path(__file__))
    digest = hashlib.sha256()
    for path in toolkit_sources():
        digest.update(f"{path.relative_to(HOME)}\0".encode())
        digest.update(path.read_bytes())
    return f"toolkit {digest.hexdigest()}"


def toolkit_sources() -> list[Path]:
    """Return the toolkit's files that decide a verdict."""
    return sorted(path for pattern in SOURCES for path in HOME.glob(pattern))
