"""Hugging Face `datasets` folders with Parquet files: `data/train-00000-of-00001.parquet`, with images as {bytes, path}.

The stored pictures are cut out into a temporary file without a name, because a Parquet file is not read by position. A
picture that many rows share is in it once. Rows are read one at a time: a file of some hundred bytes can hold a picture of
many megabytes in each of its rows, and pyarrow writes every row of a batch out.
Source: https://huggingface.co/docs/hub/datasets-image and the schema that `datasets` writes into a file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loaders.files import Collection, collected_splits
from loaders.labels import MOST_CLASSES, numbered, splits_of
from loaders.packed import MOST_BYTES, Packed, Spool
from loaders.request import Request
from loaders.splits import Splits
from metadata.closest import closest
from metadata.errors import UserError, first_line, some_of

NAME = "parquet"
READ_BYTES = 2**20  # of a column that are read at once, compressed
MOST_TIMES = 100  # the file's own size that its rows may hold, beside MOST_BYTES: pictures are compressed already
MOST_GROUP_BYTES = 2**32  # of a row group's columns, as the file states them
FULL = "such files are made to fill memory; if this one is not, write the set again, without compression"
MOST_CARD_BYTES = 2**22  # of README.md
DEEP = 3  # folders below the root in which files are looked for


@dataclass(frozen=True, kw_only=True)
class Table:
    """A Parquet file.

    Args:
        path: of the file.
        image: the column of pictures.
        label: the column of labels.
        leaves: the columns of bytes and of names in that of pictures.
        names: of the classes by label, if they are stated.
        stated: the bytes of all columns, decompressed; what rows share counts once.
        limit: the bytes that the rows may hold; what rows share counts in each.
    """

    path: Path
    image: str
    label: str
    leaves: list[str]
    names: list[str] | None
    stated: int
    limit: int


def parquet(request: Request) -> Splits:
    """Open the Parquet files of a folder, or one.

    Raises:
        UserError: pyarrow is not installed, a file is damaged or absurd, a column is missing, a label is out of range, or a
            row has no picture.
    """
    if request.root is None:
        raise UserError("data.root is not set: parquet needs a folder with data/train-00000-of-00001.parquet; pass "
                        "data.root=DIR")
    _arrow()
    root = request.root
    paths = _files(root)
    if not paths:
        raise UserError(f"data.root {root}: expected Parquet files such as {root}/data/train-00000-of-00001.parquet")
    card = _card_names(root)
    tables = [_opened(path, request.columns, card) for path in paths]
    first = tables[0]
    for table in tables:
        if (table.image, table.label, table.names) != (first.image, first.label, first.names):
            raise UserError(f"{table.path}: other columns or classes than in {first.path}; pass data.root with the folder "
                            "of one configuration")
    splits = splits_of(paths, root, "file")
    spool = Spool(sum(table.stated for table in tables))
    stored: dict[bytes, int] = {}
    listed: dict[str, list[tuple[Packed, Any]]] = {}
    for table, split in zip(tables, splits, strict=True):
        listed.setdefault(split, []).extend(_rows(table, spool, stored))
    names = first.names or numbered((label for rows in listed.values() for _, label in rows), str(root))
    index = {name: number for number, name in enumerate(names)}
    found = {split: [(picture, label if first.names else index[str(label)]) for picture, label in rows]
             for split, rows in listed.items()}
    return collected_splits(request, NAME, Collection(classes=names, train=found["train"], test=found.get("test"),
                                                      validation=found.get("validation"), where=str(root)))


def _arrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"data.name {NAME}: pyarrow is not installed; pip install pyarrow, or pip install -e "
                        ".[datasets]") from error
    return pyarrow


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    depths = ["/".join(["*"] * depth + ["*.parquet"]) for depth in range(DEEP + 1)]
    return sorted(path for pattern in depths for path in root.glob(pattern)
                  if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts))


def _opened(path: Path, columns: list[str], card: Mapping[str, list[str]]) -> Table:
    """Return what a file's footer says."""
    arrow = _arrow()
    try:
        file = arrow.parquet.ParquetFile(path)
        schema, footer, size = file.schema_arrow, file.metadata, path.stat().st_size
        group_bytes = [_group_bytes(footer.row_group(number)) for number in range(footer.num_row_groups)]
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {first_line(error)}") from error
    if any(not 0 <= size <= MOST_GROUP_BYTES for size in group_bytes) or footer.num_rows < 1:
        raise UserError(f"{path}: {footer.num_rows:,} rows, and a row group of {max(group_bytes, default=0):,} bytes; "
                        f"expected rows, and at most {MOST_GROUP_BYTES:,} bytes in a row group")
    stated, limit = sum(group_bytes), MOST_BYTES + MOST_TIMES * size
    if stated > limit:
        raise UserError(f"{path}: a file of {size:,} bytes that states {stated:,} bytes, over the limit of {limit:,}; "
                        f"{FULL}")
    features = _features(schema, path)
    image, label = _columns(schema, features, columns, path)
    names = features.get(label, {}).get("names") if isinstance(features.get(label), dict) else None
    names = _checked_names(names if names is not None else card.get(label), f"{path}, column {label}")
    kind = schema.field(label).type
    texts = (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)) and names is None
    if not (arrow.types.is_integer(kind) or texts):
        raise UserError(f"{path}: the labels in {label} are {kind}, expected integers, or text; pass "
                        "data.columns=IMAGE,LABEL")
    return Table(path=path, image=image, label=label, names=names, stated=stated, limit=limit,
                 leaves=_leaves(schema, image, path))


def _group_bytes(group: Any) -> int:
    return int(group.total_byte_size) if group.total_byte_size >= 0 else -1


def _features(schema: Any, path: Path) -> dict[str, Any]:
    """Return the features that `datasets` writes into the schema, by column."""
    try:
        content = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        found = content.get("info", {}).get("features", {})
        return found if isinstance(found, dict) else {}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: the features in its schema are damaged: {first_line(error)}") from error


def _columns(schema: Any, features: dict[str, Any], given: list[str], path: Path) -> tuple[str, str]:
    """Return the columns of pictures and labels."""
    for column in given:
        if column not in schema.names:
            raise UserError(f"{path}: there is no column {column!r}{closest(column, schema.names)} (there are: "
                            f"{some_of(schema.names, 9)})")
    if len(given) == 2 and given[0] == given[1]:
        raise UserError(f"data.columns {','.join(given)}: one column for both; expected two: image, label")
    if len(given) == 2:
        return given[0], given[1]
    if given:
        raise UserError(f"data.columns {','.join(given)}: expected two columns: image, label")
    kind = {name: value.get("_type") for name, value in features.items() if isinstance(value, dict)}
    arrow = _arrow()
    images = [name for name in schema.names if kind.get(name) == "Image"] or [
        field.name for field in schema if arrow.types.is_struct(field.type) and any(
            field.type.field(place).name == "bytes" for place in range(field.type.num_fields))] or [
        field.name for field in schema if arrow.types.is_binary(field.type)]
    labels = [name for name in schema.names if kind.get(name) == "ClassLabel"] or [
        name for name in schema.names if name not in images and name.lower() in ("label", "labels", "class", "target")]
    if len(labels) > 1:
        labels = [name for name in labels if name in ("label", "labels")] or labels
    if len(images) != 1 or len(labels) != 1:
        raise UserError(f"{path}: which columns hold images and labels? There are: {some_of(schema.names, 9)}; pass "
                        "data.columns=IMAGE,LABEL")
    return images[0], labels[0]


def _leaves(schema: Any, image: str, path: Path) -> list[str]:
    """Return what to read of the pictures' column: no list in it, which could hold any number of pictures in a row.

    Raises:
        UserError: the column holds no bytes.
    """
    kinds = _arrow().types
    cell = schema.field(image).type
    leaves = {image: cell}
    if kinds.is_struct(cell):
        leaves = {f"{image}.{name}": cell.field(name).type for name in ("bytes", "path") if cell.get_field_index(name) >= 0}
    stored = leaves.get(f"{image}.bytes", leaves.get(image))
    if stored is None or not (kinds.is_binary(stored) or kinds.is_large_binary(stored) or kinds.is_null(stored)):
        raise UserError(f"{path}: the column {image} holds {str(cell)[:80]}, expected the bytes of pictures; write the set "
                        "with the pictures in it (`push_to_hub`), or pass data.columns=IMAGE,LABEL")
    return [name for name, kind in leaves.items() if kind is stored or kinds.is_string(kind)]


def _checked_names(names: Any, where: str) -> list[str] | None:
    if names is None:
        return None
    if not isinstance(names, list) or not 0 < len(names) <= MOST_CLASSES or {type(name) for name in names} != {str}:
        raise UserError(f"{where}: expected a list of class names, got {str(names)[:60]}")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"{where}: the class name {twice[:60]!r} stands for two labels")
    return names


def _card_names(root: Path) -> dict[str, list[str]]:
    """Return the class names in the YAML of README.md, by column."""
    path = (root if root.is_dir() else root.parent) / "README.md"
    try:
        if not path.is_file() or path.stat().st_size > MOST_CARD_BYTES:
            return {}
        text = path.read_text(encoding="utf-8-sig")
        front = text.split("\n---", 1)[0].removeprefix("---") if text.startswith("---") else ""
        content = yaml.load(front, yaml.BaseLoader)  # texts alone: a class may be named no, or 1e3
        info = content.get("dataset_info") if isinstance(content, dict) else None
        info = info[0] if isinstance(info, list) and len(info) == 1 else info
        found = {}
        for feature in info.get("features", []) if isinstance(info, dict) else []:
            names = feature["dtype"]["class_label"]["names"] if isinstance(feature.get("dtype"), dict) else None
            if isinstance(names, dict) and all(isinstance(name, str) for name in names.values()):
                found[feature["name"]] = [names[key] for key in sorted(names, key=int)]
        return found
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError,
            RecursionError) as error:
        raise UserError(f"{path}: the features in its YAML are damaged: {first_line(error)}; correct or remove "
                        "them") from error


def _rows(table: Table, spool: Spool, stored: dict[bytes, int]) -> Iterator[tuple[Packed, Any]]:
    """Yield the pictures of a file with their labels; the bytes go into the temporary file.

    Args:
        table: the file.
        spool: takes the pictures.
        stored: the place in it of each picture, by the hash of its bytes.
    """
    arrow = _arrow()
    row = held = 0
    try:
        with arrow.parquet.ParquetFile(table.path, buffer_size=READ_BYTES) as file:
            for batch in file.iter_batches(batch_size=1, columns=[*table.leaves, table.label], use_threads=False):
                where = f"{table.path}: row {row}"
                if (held := held + batch.nbytes) > table.limit:
                    raise UserError(f"{where}: the rows up to here hold {held:,} bytes, over the limit of {table.limit:,} "
                                    f"for a file of its size; {FULL}")
                content, name = _content(batch.column(table.image)[0], where)
                label = batch.column(table.label)[0].as_py()
                if label is None or (table.names is not None and not 0 <= label < len(table.names)):
                    among = f"0 to {len(table.names) - 1}" if table.names else "one"
                    raise UserError(f"{where}: the label in {table.label} is {label}, expected {among}; -1 marks "
                                    "images without a label, whose split must be moved away")
                named = f"row {row} ({name})" if name else f"row {row}"
                digest = hashlib.sha256(content).digest()
                if digest not in stored:
                    stored[digest] = spool.add(content)
                yield Packed(file=table.path, name=named, offset=stored[digest], size=len(content), spool=spool), label
                row += 1
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{table.path}: damaged behind row {row}: {first_line(error)}") from error


def _content(image: Any, where: str) -> tuple[bytes, str]:
    """Return the stored picture in a cell, and the name that it had."""
    value = image.as_py()
    content, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if not isinstance(content, bytes) or not content:
        path = f", only the path {str(name)[:80]}" if name else ""
        raise UserError(f"{where}: the cell holds no picture{path}; write the set with the pictures in it (`push_to_hub`)")
    if len(content) > MOST_BYTES:
        raise UserError(f"{where}: a picture of {len(content):,} bytes is over the limit of {MOST_BYTES:,}")
    return content, str(name)[:80] if name else ""


def _recognize(root: Path) -> str:
    if root.is_file():
        return "a Parquet file" if root.suffix.lower() == ".parquet" else ""
    paths = _files(root) if root.is_dir() else []
    return f"{len(paths)} Parquet file{'s' * (len(paths) > 1)}, such as {paths[0].relative_to(root)}" if paths else ""


SETS = {NAME: parquet}
RECOGNIZED = {NAME: _recognize}
