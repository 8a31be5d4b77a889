"""scikit-learn's digits: 1,797 real 8x8 grey images in 10 classes, bundled with the package, no download."""

from __future__ import annotations

import torch

from loaders.arrays import ArrayImages, Request, Split, Splits, array_splits, hold_out, preprocessing_for
from metadata.schemas import DatasetCard, dataset_cards


def digits(request: Request) -> Splits:
    """Loads the digits as RGB; a fixed fifth of them (359 images) is the test split, whatever the seed."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images / 16 * 255).round().to(torch.uint8)  # (1797, 8, 8), 17 levels
    pixels = grey[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(bunch.target).long()
    train, test = hold_out(labels, 0.2, seed=0)
    known = dataset_cards()["digits"]
    card = DatasetCard(name="digits", class_names=known["class_names"], input_shape=(3, 8, 8),
                       preprocessing=preprocessing_for(request, known["preprocessing"], size=8))
    return array_splits(card, pixels[train], labels[train], lambda: Split(ArrayImages(pixels[test]), labels[test]),
                        request)


SETS = {"digits": digits}
