"""scikit-learn's digits: 1,797 real 8x8 grey images in 10 classes, bundled with the package, no download."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from loaders.request import Request
from loaders.splits import Splits, array_splits, hold_out
from metadata.errors import UserError
from metadata.records import dataset_cards


def packaged_file() -> Path:
    """Return scikit-learn's file of the digits: 64 levels and the digit a row. Importing the package takes over a second.

    Raises:
        UserError: scikit-learn is not installed.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.origin:
        raise UserError("data set digits: its images come with scikit-learn; pip install scikit-learn")
    return Path(found.origin).with_name("datasets") / "data" / "digits.csv.gz"


def digits(request: Request) -> Splits:
    """Load the digits, as RGB unless the request is for one channel. A fixed fifth (359 images) is the test split.

    The test split does not depend on the seed.
    """
    table = np.loadtxt(packaged_file(), delimiter=",")
    pixels = torch.from_numpy(table[:, :-1].reshape(-1, 1, 8, 8) / 16 * 255).round().to(torch.uint8)  # 17 levels
    labels = torch.from_numpy(table[:, -1]).long()
    train, test = hold_out(labels, 0.2, seed=0)
    known = dataset_cards()["digits"]
    request = replace(request, channels=3 if request.channels is None else request.channels)
    return array_splits(request, known["class_names"], known["preprocessing"], (pixels[train], labels[train]),
                        lambda: (pixels[test], labels[test]))


SETS = {"digits": digits}
