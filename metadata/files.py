"""Read and write files: atomically, as JSON by a schema, and never outside a submission's folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from metadata.errors import VerificationError, describe_validation_error, first_line

MAX_JSON_BYTES = 2**24
MAX_JSON_VALUES = 500_000  # of a document, its keys included; an architecture of 10,000 layers has 250,000
MAX_JSON_ENTRIES = 100_000  # of one list or object
MAX_JSON_DEPTH = 64  # lists and objects inside one another
# A text in quotation marks, or what an open one takes to the end: nothing is looked at twice, however the text goes on.
JSON_TEXT = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
MAX_NAME_BYTES = 255  # of a file or folder, on every usual file system


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that readers see the old file or the new one, never half of one, also after SIGKILL.

    Raises:
        OSError: the folder is missing, read-only or full; the old file is untouched and no temporary one is left.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would make submissions unreadable to a panel's account
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, with an indent of two and a final newline."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode(errors="backslashreplace"))  # file names need not be Unicode


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_is_file(path: Path) -> None:
    """Refuse a path of weights at which no file is. A folder may be what several processes saved, a piece each.

    Raises:
        VerificationError: nothing is there, or a folder, or a device.
    """
    if path.is_dir():
        pieces = any(path.glob("*.distcp"))
        raise VerificationError(f"{path}: a folder, expected a file of torch.save or of safetensors; " + (
            "torch makes one of what torch.distributed.checkpoint wrote: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE" if pieces else "name the file in it"))
    if not path.is_file():
        raise VerificationError(f"{path}: " + ("not a plain file" if path.exists() else "there is no such file"))


def check_download(path: Path) -> None:
    """Refuse what often lies in the place of a large file: nothing, a pointer of Git LFS, or a page of a web site.

    Raises:
        VerificationError: the file is one of these; the message says how to get the real one.
    """
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise VerificationError(f"{path}: a pointer of Git LFS, not the file itself; run git lfs pull where it comes from")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise VerificationError(f"{path}: a page of a web site, not the file itself; download it again, and look at the "
                                "page for the reason")
    if path.stat().st_size == 0:
        raise VerificationError(f"{path}: the file is empty; copy or download it again")


def read_json(path: Path, schema: type[BaseModel]) -> Any:
    """Read a JSON file into a schema.

    Raises:
        VerificationError: the file is missing, not JSON, too large, or not of the schema; the message names the file and
            the key.
    """
    try:
        if not path.is_file():
            raise VerificationError(f"{path}: " + ("not a plain file" if path.exists() else "there is no such file"))
        if path.stat().st_size > MAX_JSON_BYTES:
            raise VerificationError(f"{path}: {path.stat().st_size:,} bytes are over JSON's limit of {MAX_JSON_BYTES:,}")
        data = path.read_bytes()
        return schema.model_validate(parse_json(data.decode(json.detect_encoding(data), "surrogatepass")))
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise VerificationError(f"{path}: {describe_validation_error(error)}") from error
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{path}: not valid JSON: {first_line(error)}") from error


def parse_json(text: str) -> Any:
    """Return what a JSON document holds: values that are bounded in number and depth, before a schema looks at them.

    Raises:
        ValueError, RecursionError: not JSON, or over one of the limits. Most documents over a limit are never parsed.
    """
    if _values(text) > MAX_JSON_VALUES and _values(JSON_TEXT.sub("", text)) > MAX_JSON_VALUES:
        raise ValueError(f"it holds over {MAX_JSON_VALUES:,} values")
    content = json.loads(text)
    level = [content]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [value for value in level if isinstance(value, list | dict)]
        if any(len(value) > MAX_JSON_ENTRIES for value in level):
            raise ValueError(f"a list or an object in it has over {MAX_JSON_ENTRIES:,} entries")
        level = [inner for value in level for inner in (value if isinstance(value, list) else value.values())]
        if not level:
            return content
    raise ValueError(f"lists and objects in it lie over {MAX_JSON_DEPTH} levels deep")


def _values(text: str) -> int:
    """Return how many of the characters before a value or a key a text holds, and one for the document itself."""
    return 1 + sum(map(text.count, ",[{:"))


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that a submission names.

    Raises:
        VerificationError: the name, or a symbolic link on its path, points outside the folder; or no file can have it.
    """
    if "\0" in name or any(len(part.encode(errors="surrogatepass")) > MAX_NAME_BYTES for part in Path(name).parts):
        raise VerificationError(f"{folder}: no file has the name {name[:60]!r}")
    path = folder / name
    try:
        lies_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, or half of a surrogate pair
        raise VerificationError(f"{folder}: {name!r} cannot be resolved: {first_line(error)}") from error
    if not lies_inside:
        raise VerificationError(f"{folder}: {name!r} lies outside the submission")
    return path
