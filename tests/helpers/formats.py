"""Small data sets in the formats that people keep them in, of the pictures of a folder `<split>/<class>/<image>`."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Labelled = list[tuple[str, str, Path]]  # split, class, file


def pictures(folder: Path) -> Labelled:
    return [(path.parts[-3], path.parts[-2], path) for path in sorted(folder.glob("*/*/*")) if path.is_file()]


def write_csv(folder: Path, out: Path) -> Path:
    """A CSV of path, label and split, beside a folder with the images."""
    rows = ["file,label,split"]
    for number, (split, name, path) in enumerate(pictures(folder)):
        target = out / "images" / f"{number}{path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        rows.append(f"images/{target.name},{name},{split}")
    (out / "labels.csv").write_text("\n".join(rows) + "\n")
    return out


def write_tiny_imagenet(folder: Path, out: Path) -> Path:
    """The layout of tiny-imagenet-200, with the bounding boxes that nothing needs."""
    names, lines = set(), []
    for number, (split, name, path) in enumerate(pictures(folder)):
        wnid = "n" + name.rpartition("_")[2].zfill(8)
        names.add(wnid)
        place = out / "train" / wnid / "images" if split == "train" else out / "val" / "images"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.JPEG").write_bytes(path.read_bytes())
        if split == "train":
            (out / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        else:
            lines.append(f"{number}.JPEG\t{wnid}\t0\t0\t62\t62")
    (out / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (out / "wnids.txt").write_text("\n".join(sorted(names, reverse=True)))
    (out / "words.txt").write_text("n00000000\tgoldfish, Carassius auratus\nn00000001\tfrog\nn99999999\tnothing\n")
    (out / "test" / "images").mkdir(parents=True)
    (out / "test" / "images" / "test_0.JPEG").write_bytes(path.read_bytes())
    return out


def add_member(tar: tarfile.TarFile, name: str, content: bytes, **changes: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in changes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content) if member.isreg() else None)


def write_webdataset(folder: Path, out: Path, label: str = "cls") -> Path:
    """Two tars a split, with the label in a file `.cls`, or in one `.json`."""
    out.mkdir(parents=True)
    listed = pictures(folder)
    for split in ("train", "test"):
        own = [entry for entry in listed if entry[0] == split]
        for shard in range(2):
            with tarfile.open(out / f"{split}-{shard:04d}.tar", "w") as tar:
                for number, (_, name, path) in list(enumerate(own))[shard::2]:
                    text = json.dumps({"label": name, "other": 1}) if label == "json" else name
                    add_member(tar, f"{number:06d}.{label}", text.encode())
                    add_member(tar, f"{number:06d}.png", path.read_bytes())
                    add_member(tar, f"._{number:06d}.png", b"what macOS packs")
    return out


def write_parquet(folder: Path, out: Path, stated: str = "schema") -> Path:
    """Two Parquet files, as `datasets` writes them; the class names are in the schema, in README.md, or the labels' own."""
    import pyarrow
    from pyarrow import parquet

    listed = pictures(folder)
    names = sorted({name for _, name, _ in listed})
    (out / "data").mkdir(parents=True)
    for split in ("train", "test"):
        own = [entry for entry in listed if entry[0] == split]
        table = pyarrow.table({
            "image": pyarrow.array([{"bytes": path.read_bytes(), "path": path.name} for _, _, path in own],
                                   pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
            "label": pyarrow.array([name for _, name, _ in own] if stated == "labels" else
                                   [names.index(name) for _, name, _ in own])})
        if stated == "schema":
            features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        parquet.write_table(table, out / "data" / f"{split}-00000-of-00001.parquet", row_group_size=7)
    if stated == "card":
        lines = ["---", "dataset_info:", "  features:", "  - name: image", "    dtype: image", "  - name: label",
                 "    dtype:", "      class_label:", "        names:",
                 *(f"          '{number}': {name}" for number, name in enumerate(names)), "---", "# A set", ""]
        (out / "README.md").write_text("\n".join(lines))
    return out


def write_flat(folder: Path, out: Path) -> Path:
    """The images of both splits in folders of their classes."""
    for split, name, path in pictures(folder):
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name / f"{split}_{path.name}").write_bytes(path.read_bytes())
    return out


FORMATS: dict[str, Callable[[Path, Path], Path]] = {
    "flat_folder": write_flat, "csv": write_csv, "tiny_imagenet": write_tiny_imagenet, "webdataset": write_webdataset,
    "parquet": write_parquet}


def renamed(root: Path, names: Iterable[tuple[str, str]]) -> None:
    for old, new in names:
        (root / old).rename(root / new)
