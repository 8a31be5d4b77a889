"""What a caller asks of `loaders.catalog.load`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a caller asks of `loaders.load`.

    Args:
        name: the data set.
        root: where its files are, for the sets that have files.
        download: fetch a missing set (torchvision's); never done unasked.
        validation_fraction: share of the training split that is held out, class by class; 0 leaves validation empty,
            except where a folder gives it apart.
        seed: decides which images are held out.
        num_classes: refuse a folder with another number of classes.
        preprocessing: replaces keys of the set's own preprocessing.
        skip_unreadable: leave damaged images out and count them, instead of stopping at the first.
        memory_limit_gb: decoded sets above this stream from disk.
        workers: threads or processes that decode.
        on_progress: called with (done, total) while images are decoded.
        channels: 3 repeats the pixels of a grey set; an RGB set is not turned into a grey one.
        image_size: side of the model's square input; the set's own resize keeps its proportion to the crop.
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
    image_size: int | None = None
