"""The request for a data set, as `loaders.catalog.load` takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class FileHashes:
    """Hashes of files, by group, that spare the next start the reading; see `loaders/content.py`.

    Args:
        known: for each group of files a hash of their paths, sizes and times, and a hash of their bytes.
        changed: whether a group was read since.
    """

    known: dict[str, tuple[str, str]] = field(default_factory=dict)
    changed: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for a data set.

    Args:
        name: the data set.
        root: the folder of its files, for data sets that have files.
        download: download a missing data set through torchvision; never done without this.
        validation_fraction: fraction of the training split that is held out, class by class; 0 leaves validation empty,
            unless the data set has a validation folder.
        seed: the seed of the choice of held-out images.
        num_classes: refuse a folder with another number of classes.
        preprocessing: replaces keys of the preprocessing of the data set.
        skip_unreadable: skip and count damaged images, instead of stopping at the first.
        memory_limit_gb: stream data sets from disk that are larger than this when decoded.
        workers: the number of threads or processes that decode.
        on_progress: called with (done, total) while images are decoded.
        channels: 3 repeats the channel of grey images; 1 makes colour images grey.
        image_size: pixels of both sides of the input of the model, or (height, width); resize keeps its proportion to
            the crop.
        hashes: the hashes of files of an earlier start; those of the files that are read are added.
        test_fraction: fraction of the images that is held out for testing where the data have no test split.
        image_root: the folder that the paths in a table are relative to; that of the table unless given.
        columns: the names, or numbers from 1, of a table's columns of images and labels, and perhaps of splits.
    """

    name: str
    root: Path | None = None
    download: bool = False
    validation_fraction: float = 0.1
    seed: int = 0
    num_classes: int | None = None
    preprocessing: dict[str, object] = field(default_factory=dict)
    skip_unreadable: bool = False
    memory_limit_gb: float = 4.0
    workers: int = 2
    on_progress: Callable[[int, int], None] | None = None
    channels: int | None = None
    image_size: int | tuple[int, int] | None = None
    hashes: FileHashes = field(default_factory=FileHashes)
    test_fraction: float = 0.2
    image_root: Path | None = None
    columns: list[str] = field(default_factory=list)
