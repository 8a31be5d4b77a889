"""The images of a study: decoded once into arrays that all processes map into memory, and their subsets.

Decoding the 60,000 files of an image folder takes longer than the training of many points.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.studies.scaling.results import Results
from compress.training.run import flags_named
from compress.training.trackers import Tracker
from loaders.arrays import ArrayImages, prefetched
from loaders.augment import derive_seed
from loaders.catalog import load, set_name
from loaders.request import Request
from loaders.splits import Split, Splits, fingerprint
from metadata.errors import UserError
from metadata.files import write_json
from metadata.locks import appearing, remove_leftovers, waiting_lock
from metadata.records import DatasetCard

CARD, KNOWN = "card.json", "data.json"
SPLIT_NAMES = ("train", "test")


@dataclass(frozen=True)
class StudyImages:
    """Both splits, (N, C, H, W) uint8 with channels last in memory, and the card of the data set."""

    train: Split
    test: Split
    card: DatasetCard

    def check_size(self, dataset_size: int) -> None:
        """Raise UserError if the training split has fewer images."""
        if dataset_size > len(self.train):
            raise UserError(f"dataset_size {dataset_size:,}: {self.card.name} has {len(self.train):,} training images; "
                            "choose no more")


def prepare_images(results: Results, dataset: str, data_root: Path | None, download: bool, tracker: Tracker) -> Path:
    """Return the folder of the decoded arrays below results/cache; decode the data set if the folder is missing.

    Raises:
        UserError: the data set cannot be opened, or earlier results of the study come from other images of the same name.
    """
    dataset = set_name(dataset)
    data_root = data_root.expanduser() if data_root else None
    cache = results.folder / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    with waiting_lock(cache):  # one process decodes, the others wait
        folder = cache / f"{dataset}-{_key(dataset, data_root)}"
        if not folder.is_dir():
            remove_leftovers(cache)
            _decode(folder, dataset, data_root, download, tracker)
        _check_same(results, dataset, folder)
    return folder


def read(folder: Path) -> StudyImages:
    """Return the arrays that `prepare_images` wrote, mapped into memory."""
    card = DatasetCard.model_validate(json.loads((folder / CARD).read_text()))
    train, test = (_mapped(folder, name) for name in SPLIT_NAMES)
    return StudyImages(train, test, card)


def subset(labels: Tensor, size: int, seed: int) -> Tensor:
    """Return the sorted indices of `size` images; each class has its share, to within one image.

    With the same seed, a larger subset contains a smaller one, so that curves over D differ only by the added images.

    Args:
        labels: (N,) int64 of the whole split.
        size: the size of the subset, at most N.
        seed: the seed of the draw.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "subset"))
    place = torch.empty(len(labels), dtype=torch.float64)  # position of an image in the order of all images, in [0, 1)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().view(-1)
        members = members[torch.randperm(len(members), generator=generator)]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    # The n-th images of equally large classes share a position; a random permutation decides which class goes first.
    shuffled = torch.randperm(len(labels), generator=generator)
    order = shuffled[place[shuffled].argsort(stable=True)]
    return order[:size].sort().values


def taken(split: Split, ids: Tensor) -> Split:
    """Return the images with these indices; the whole split is returned without a copy."""
    if len(ids) == len(split):
        return split
    return Split(ArrayImages(split.images.batch(ids)), split.labels[ids])


def _mapped(folder: Path, name: str) -> Split:
    # Copy on write, because torch warns about read-only arrays; nothing here writes.
    pixels = np.load(folder / f"{name}_images.npy", mmap_mode="c")  # (N, H, W, C)
    return Split(ArrayImages(torch.from_numpy(pixels).permute(0, 3, 1, 2)),
                 torch.from_numpy(np.load(folder / f"{name}_labels.npy")))


def _decode(folder: Path, dataset: str, data_root: Path | None, download: bool, tracker: Tracker) -> None:
    """Decode a data set; the folder appears when it is complete."""
    with tracker.progress("reading images") as advance, flags_named():
        splits = load(Request(name=dataset, root=data_root, download=download, validation_fraction=0, on_progress=advance))
        for text in splits.warnings:
            tracker.warn(text)
        with appearing(folder) as temporary:
            _write_arrays(temporary, splits)


def _write_arrays(folder: Path, splits: Splits) -> None:
    digests, counts = [], {}
    for name, split in (("train", splits.train), ("test", splits.open_test())):
        _, channels, height, width = split.images.batch(torch.zeros(1, dtype=torch.int64)).shape
        pixels = np.lib.format.open_memmap(folder / f"{name}_images.npy", "w+", np.uint8,
                                           (len(split), height, width, channels))
        for ids, batch in prefetched(split.images, torch.arange(len(split)).split(1024)):
            pixels[ids[0]:ids[-1] + 1] = batch.permute(0, 2, 3, 1).numpy()
        pixels.flush()
        np.save(folder / f"{name}_labels.npy", split.labels.numpy())
        digests.append(fingerprint(torch.from_numpy(pixels), split.labels))
        counts[name] = len(split)
    card = splits.card.model_copy(update={"counts": counts, "fingerprint": "-".join(digests), "content": {}})
    write_json(folder / CARD, card.model_dump(mode="json"))


def _check_same(results: Results, dataset: str, folder: Path) -> None:
    """Raise UserError if the study holds results of other images by this name: the id of a point has the name alone."""
    path = results.folder / KNOWN
    try:
        known = json.loads(path.read_text()) if path.is_file() else {}
        found = json.loads((folder / CARD).read_text())["fingerprint"]
        before = known.get(dataset)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} or {folder / CARD}: damaged; remove {folder}, and {path} if that is the damaged file"
                        ) from error
    if before not in (None, found):
        raise UserError(f"{results.folder} holds results of other images by the name {dataset} ({path}); choose another "
                        "--base_dir")
    if before is None:
        write_json(path, known | {dataset: found})


def _key(dataset: str, root: Path | None) -> str:
    """Return a hash of the paths, sizes and modification times of the files."""
    digest = hashlib.sha256(f"{dataset} {root.resolve() if root else ''}".encode())
    for path in sorted(_files(root)) if root else ():
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:12]


def _files(root: Path) -> Iterator[Path]:
    """Return the files of an image folder, or of torchvision's sets those up to three folders deep."""
    patterns = ("train/*/*", "test/*/*", "val/*/*", "validation/*/*", "valid/*/*") if (root / "train").is_dir() else (
        "*", "*/*", "*/*/*")
    return (path for pattern in patterns for path in root.glob(pattern) if path.is_file())
