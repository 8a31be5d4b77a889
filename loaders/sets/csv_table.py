"""A CSV of paths and labels, with or without a header, perhaps with a column of splits."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path

from loaders.files import Collection, collected_splits
from loaders.labels import numbered
from loaders.listing import IMAGE_SUFFIXES, SPLITS
from loaders.packed import Pictures
from loaders.request import Request
from loaders.splits import Splits
from metadata.closest import closest
from metadata.errors import UserError, first_line, some_of

NAME = "csv"
SUFFIXES = (".csv", ".tsv")
MOST_BYTES = 2**30
ADDED = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif")  # to a name without a suffix
PATHS = {"file", "file_name", "filename", "filepath", "file_path", "id", "image", "image_file", "image_id", "image_name",
         "image_path", "images", "img", "img_path", "name", "path", "paths"}
LABELS = {"breed", "category", "class", "class_id", "class_name", "classes", "label", "labels", "species", "target", "y"}
SPLIT_COLUMNS = {"partition", "set", "split", "subset", "usage"}
ADVICE = "pass data.columns=PATH,LABEL or data.columns=PATH,LABEL,SPLIT, by name or by number from 1"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table: the number of its line, and what its columns of interest say."""

    line: int
    path: str
    label: str
    split: str | None


def csv_table(request: Request) -> Splits:
    """Open the images that a CSV lists. Paths are relative to the CSV's folder, or to `image_root`.

    Raises:
        UserError: a file that is missing, no text or no table, a path that leads out of the folder, a missing image, an
            empty label, or an image that is listed with two labels.
    """
    if request.root is None:
        raise UserError("data.root is not set: csv needs a table with a column of paths and one of labels; pass "
                        "data.root=FILE")
    tables = _tables(request.root)
    base = request.image_root or (request.root if request.root.is_dir() else request.root.parent)
    rows: dict[str | None, list[tuple[Path, Row]]] = {}
    for split, path in tables.items():
        for row in _rows(path, base, request.columns):
            rows.setdefault(split or row.split, []).append((path, row))
    _check_splits(rows, next(iter(tables.values())))
    where = str(request.root)
    classes = numbered((row.label for listed in rows.values() for _, row in listed), where)
    index = {name: number for number, name in enumerate(classes)}
    warnings: list[str] = []
    found = _pictures({split or "train": listed for split, listed in rows.items()}, index, base, request.skip_unreadable,
                      warnings)
    return collected_splits(request, NAME, Collection(
        classes=classes, train=found["train"], test=found.get("test"), validation=found.get("validation"), where=where,
        warnings=warnings))


def _tables(root: Path) -> dict[str | None, Path]:
    """Return the CSV files by split; None: a file for all."""
    if root.is_file():
        return {None: root}
    paths = [path for path in sorted(root.iterdir()) if path.suffix.lower() in SUFFIXES and path.is_file()
             ] if root.is_dir() else []
    splits: dict[str | None, Path] = {SPLITS[path.stem.lower()]: path for path in paths if path.stem.lower() in SPLITS}
    if "train" in splits and len(splits) > 1:
        return splits
    if len(paths) != 1:
        found = f"found {some_of([path.name for path in paths], 5)}" if paths else "there is none"
        raise UserError(f"data.root {root}: expected one CSV, or train.csv and test.csv; {found}; pass data.root=FILE.csv")
    return {None: paths[0]}


def _text(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise UserError(f"{path}: {size:,} bytes are over the limit of {MOST_BYTES:,}")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: expected UTF-8, got the byte 0x{content[error.start]:02x}; save the table as "
                        "UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}:{line}: a zero byte; save the table as UTF-8 text")
    return text


def _rows(path: Path, base: Path, columns: list[str]) -> list[Row]:
    """Return the rows of a CSV."""
    text = _text(path)
    head = text[:text.find("\n")] if "\n" in text else text
    delimiter = max(",;\t", key=lambda sign: head.count(sign))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                lines.append((reader.line_num, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not a row of a CSV: {first_line(error)}; check the quotes") from error
    if not lines:
        raise UserError(f"{path}: the table is empty; expected rows of a path and a label")
    width = len(lines[0][1])
    for line, cells in lines:
        if len(cells) != width:
            raise UserError(f"{path}:{line}: {len(cells)} columns, the first row has {width}; quote a name with a "
                            f"{'tab' if delimiter == chr(9) else repr(delimiter)} in it")
    header = None if any(_is_picture(base, cell) for cell in lines[0][1]) else lines[0][1]
    rows = lines[1:] if header else lines
    if not rows:
        raise UserError(f"{path}: no rows behind the header ({some_of(lines[0][1], 5)}), or its only row names no image "
                        f"below {base}")
    chosen = _given(columns, header, width, path) if columns else _found(header, rows, width, path, base)
    return [Row(line=line, path=cells[chosen[0]], label=cells[chosen[1]],
                split=_split(cells[chosen[2]], f"{path}:{line}") if len(chosen) > 2 else None) for line, cells in rows]


def _is_picture(base: Path, cell: str) -> bool:
    return os.path.splitext(cell)[1].lower() in IMAGE_SUFFIXES or (cell != "" and os.path.isfile(_located(base, cell)))


def _located(base: Path, cell: str) -> Path:
    """Return the file that a cell names: with the slashes of this system, and with a suffix if only that is missing."""
    path = base / cell
    if "\\" in cell and not os.path.exists(path):
        path = base / cell.replace("\\", "/")
    if path.suffix or os.path.exists(path):
        return path
    return next((file for suffix in ADDED if os.path.isfile(file := path.with_name(path.name + suffix))), path)


def _given(columns: list[str], header: list[str] | None, width: int, path: Path) -> list[int]:
    """Return the places of the columns that the request names."""
    if len(columns) not in (2, 3):
        raise UserError(f"data.columns {','.join(columns)}: expected two or three columns: path, label, split")
    places = []
    for column in columns:
        if header and column in header:
            places.append(header.index(column))
        elif column.isdecimal() and 1 <= int(column[:9]) <= width:
            places.append(int(column[:9]) - 1)
        else:
            known = header or [str(number + 1) for number in range(width)]
            raise UserError(f"{path}: there is no column {column!r}{closest(column, known)} (there are: "
                            f"{some_of(known, 9)})")
    if len(set(places)) < len(places):
        raise UserError(f"data.columns {','.join(columns)}: one column for two things; expected a column each for path, "
                        "label and split")
    return places


def _found(header: list[str] | None, rows: list[tuple[int, list[str]]], width: int, path: Path, base: Path) -> list[int]:
    """Return the places of the columns of paths and labels, and of splits if there is one."""
    shown = some_of(header, 9) if header else f"no header, {width} columns"
    plain = [name.lower().replace(" ", "_") for name in header] if header else []
    first = rows[0][1]
    pictures = [place for place in range(width) if _is_picture(base, first[place])]
    if len(pictures) > 1:
        pictures = [place for place in pictures if plain and plain[place] in PATHS] or pictures
    if len(pictures) != 1:
        what = "no column holds" if not pictures else "more than one column holds"
        raise UserError(f"{path}: {what} paths of images below {base} ({shown}; the first row: "
                        f"{some_of([cell[:40] for cell in first], 5)}); {ADVICE}")
    rest = [place for place in range(width) if place != pictures[0]]
    splits = [place for place in rest if plain and plain[place] in SPLIT_COLUMNS] or [
        place for place in rest if not plain and all(cells[place].lower() in SPLITS for _, cells in rows)]
    rest = [place for place in rest if place not in splits]
    labels = [place for place in rest if plain and plain[place] in LABELS] or rest
    if len(labels) != 1 or len(splits) > 1:
        raise UserError(f"{path}: which column holds the labels? ({shown}); {ADVICE}")
    return [pictures[0], labels[0], *splits]


def _split(text: str, where: str) -> str:
    if text.lower() not in SPLITS:
        raise UserError(f"{where}: the split {text[:40]!r}: expected {', '.join(sorted(SPLITS))}")
    return SPLITS[text.lower()]


def _check_splits(rows: dict[str | None, list[tuple[Path, Row]]], path: Path) -> None:
    if None not in rows and "train" not in rows:
        raise UserError(f"{path}: no row is of the split train (found: {', '.join(sorted(map(str, rows)))})")


def _pictures(rows: dict[str, list[tuple[Path, Row]]], index: dict[str, int], base: Path, skip: bool,
              warnings: list[str]) -> dict[str, Pictures]:
    """Return the files of each split with the indices of their classes; each file once."""
    above = base.resolve()
    found: dict[Path, tuple[str, str, str]] = {}  # by file: split, label, where it says so
    missing: list[str] = []
    total = sum(map(len, rows.values()))
    for split, table, row in ((split, table, row) for split, listed in rows.items() for table, row in listed):
        where = f"{table}:{row.line}"
        if not row.label:
            raise UserError(f"{where}: {row.path[:80]} has no label; fill it in, or remove the row")
        if not row.path:
            raise UserError(f"{where}: no path; fill it in, or remove the row")
        path = _located(base, row.path)
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(above):
            raise UserError(f"{where}: {row.path[:80]!r} leads out of {base} to {str(real)[:200]}; pass "
                            "data.image_root=DIR with a folder above all images")
        if not os.path.isfile(path):
            missing.append(f"{where}: {str(path)[:300]}: there is no such file")
            continue
        before = found.setdefault(real, (split, row.label, where))
        for what, one, other in (("split", before[0], split), ("label", before[1], row.label)):
            if one != other:
                raise UserError(f"{where}: {row.path[:80]} has the {what} {other[:40]!r}, in {before[2]} "
                                f"{one[:40]!r}; keep one")
    if missing and not skip:
        raise UserError(f"{missing[0]} ({len(missing)} of {total} images are missing); paths are relative to {base}: pass "
                        "data.image_root=DIR for another, or data.skip_unreadable=true to leave these images out")
    if missing:
        warnings.append(f"{len(missing)} of {total} images are missing and were left out, the first: {missing[0]}")
    if copies := total - len(missing) - len(found):
        warnings.append(f"{base}: {copies} rows name an image again, and count once")
    return {split: [(path, index[label]) for path, (own, label, _) in found.items() if own == split] for split in rows}


def _recognize(root: Path) -> str:
    if root.is_file():
        return "a table of paths and labels" if root.suffix.lower() in SUFFIXES else ""
    try:
        return f"{_tables(root)[None].name} lists paths and labels" if root.is_dir() else ""
    except KeyError:
        return "train.csv and others list paths and labels"
    except (OSError, UserError):
        return ""


SETS = {NAME: csv_table}
RECOGNIZED = {NAME: _recognize}
