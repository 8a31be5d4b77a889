"""MNIST, FashionMNIST, CIFAR-10 and CIFAR-100, from torchvision's files or from an image folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from loaders.request import Request
from loaders.sets.image_folder import folder_splits, split_folders
from loaders.splits import LabelledPixels, Splits, array_splits, torchvision_root
from metadata.errors import UserError, first_line
from metadata.records import dataset_cards

CLASSES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}

# The errors of torchvision for missing files (RuntimeError) and for damaged files.
DAMAGED = (RuntimeError, OSError, EOFError, AssertionError, LookupError, TypeError, ValueError)


def _open(name: str, request: Request, train: bool) -> Any:
    from torchvision import datasets

    root = torchvision_root(request, name)
    try:
        return getattr(datasets, CLASSES[name])(root, train=train, download=request.download)
    except DAMAGED as error:
        packed = next(root.glob(f"{CLASSES[name]}/raw/*-ubyte.gz"), None)
        reason = first_line(error).partition(" You can use download")[0]
        if root.name == CLASSES[name] and root.joinpath("raw").is_dir():
            advice = f"the root is the folder above: pass data.root={root.parent}"
        elif request.download:
            advice = "remove files that are damaged, see that there is a network, or give an image folder"
        else:
            advice = f"unpack {packed} and the other .gz files with gunzip, or pass" if packed else "pass"
            advice += " data.download=true to fetch it, after removing files that are damaged, or give an image folder"
        raise UserError(f"data.root {root}: {name} is not there, or damaged ({reason}); {advice}") from error


def _arrays(dataset: Any, classes: int, where: str) -> LabelledPixels:
    """Return (N, C, H, W) uint8 and labels as the data set numbers them."""
    pixels, labels = torch.from_numpy(np.asarray(dataset.data)), torch.as_tensor(dataset.targets)
    if len(pixels) != len(labels) or len(labels) == 0 or int(labels.max()) >= classes:
        raise UserError(f"{where}: expected as many labels below {classes} as images, got {len(labels)} for "
                        f"{len(pixels)} images; remove the set and pass data.download=true to fetch it again")
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return pixels.contiguous(), labels.long()


def _loader(name: str) -> Callable[[Request], Splits]:
    def load(request: Request) -> Splits:
        known = dataset_cards()[name]
        if request.root is not None and "train" in split_folders(request.root):
            return folder_splits(request, name, known["preprocessing"], known.get("class_names", ()))
        train = _open(name, request, train=True)
        names = known.get("class_names") or [str(label) for label in train.classes]

        def open_test() -> LabelledPixels:
            return _arrays(_open(name, request, train=False), len(names), f"{request.root}, test split of {name}")

        return array_splits(request, names, known["preprocessing"],
                            _arrays(train, len(names), f"{request.root}, training split of {name}"), open_test)
    return load


SETS = {name: _loader(name) for name in CLASSES}
