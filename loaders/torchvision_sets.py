"""MNIST, FashionMNIST, CIFAR-10 and CIFAR-100: torchvision's files, or the same set as an image folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loaders.arrays import ArrayImages, Request, Split, Splits, array_splits, preprocessing_for
from loaders.image_folder import folder_splits
from metadata.schemas import DatasetCard, dataset_cards
from model_loader import UserError, first_line

CLASSES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}


def _open(name: str, request: Request, train: bool) -> Any:
    from torchvision import datasets

    if request.root is None:
        raise UserError(f"data.root is not set: {name} is read from torchvision's files or from an image folder "
                        "(train/<class>/, test/<class>/); pass data.root=DIR, and data.download=true to fetch it")
    try:
        return getattr(datasets, CLASSES[name])(request.root, train=train, download=request.download)
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(f"data.root {request.root}: {name} is not there and no image folder either "
                        f"({first_line(error)}); pass data.download=true to fetch it") from error


def _arrays(dataset: Any, order: list[int]) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) uint8 and labels as ranks of the sorted class names, which is what an image folder gives."""
    pixels = torch.from_numpy(np.asarray(dataset.data))
    pixels = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return pixels.contiguous(), torch.tensor(order)[torch.as_tensor(dataset.targets)]


def _loader(name: str) -> Callable[[Request], Splits]:
    def load(request: Request) -> Splits:
        known = dataset_cards()[name]
        if request.root is not None and (request.root / "train").is_dir():
            return folder_splits(request, name, known["preprocessing"])
        train = _open(name, request, train=True)
        names = known.get("class_names") or [str(label) for label in train.classes]
        order = [sorted(names).index(label) for label in names]
        pixels, labels = _arrays(train, order)
        _, channels, height, width = pixels.shape
        card = DatasetCard(name=name, class_names=sorted(names), input_shape=(channels, height, width),
                           preprocessing=preprocessing_for(request, known["preprocessing"], size=height))

        def open_test() -> Split:
            images, targets = _arrays(_open(name, request, train=False), order)
            return Split(ArrayImages(images), targets)

        return array_splits(card, pixels, labels, open_test, request)
    return load


SETS = {name: _loader(name) for name in CLASSES}
