"""scikit-learn's digits: 1,797 real 8x8 grey images in 10 classes, bundled with the package, no download."""

from __future__ import annotations

from dataclasses import replace

import torch

from loaders.request import Request
from loaders.splits import Splits, array_splits, hold_out
from metadata.records import dataset_cards


def digits(request: Request) -> Splits:
    """Load the digits, as RGB unless the request is for one channel. A fixed fifth (359 images) is the test split.

    The test split does not depend on the seed.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images / 16 * 255).round().to(torch.uint8)[:, None]  # (1797, 1, 8, 8), 17 levels
    labels = torch.from_numpy(bunch.target).long()
    train, test = hold_out(labels, 0.2, seed=0)
    known = dataset_cards()["digits"]
    request = replace(request, channels=3 if request.channels is None else request.channels)
    return array_splits(request, known["class_names"], known["preprocessing"], (pixels[train], labels[train]),
                        lambda: (pixels[test], labels[test]))


SETS = {"digits": digits}
