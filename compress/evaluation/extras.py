"""The differences between the toolkit and the single file of a submission, which is joined from the same sources."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

from metadata.errors import UserError
from metadata.files import sha256

STANDALONE = __name__ != "compress.evaluation.extras"


def toolkit(flag: str, module: str) -> Any:
    """Import a module of `compress.evaluation` that is not in the single file, for the flag that needs the module.

    Raises:
        UserError: the evaluator is the single file.
    """
    if STANDALONE:
        raise UserError(f"{flag} needs the toolkit: {Path(__file__).name} stands alone here; run the toolkit's own "
                        "model_loader.py")
    return importlib.import_module(f"compress.evaluation.{module}")


def evaluator_sha256() -> str:
    """Return which evaluator measures: the single file's SHA-256, or "toolkit" and a SHA-256 over the sources."""
    if STANDALONE:
        return sha256(Path(__file__))
    home, digest = Path(__file__).parents[2], hashlib.sha256()
    for pattern in ("metadata/*.py", "architectures/**/*.py", "loaders/images.py", "compress/evaluation/*.py"):
        for path in sorted(home.glob(pattern)):
            digest.update(f"{path.relative_to(home)}\0".encode())
            digest.update(path.read_bytes())
    return f"toolkit {digest.hexdigest()}"
