"""SimpleMLP: flattened pixels through linear layers with ReLU, the plainest network that can be compressed."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from metadata.errors import UserError


class SimpleMLP(nn.Sequential):
    """A plain chain of layers: (N, C, H, W) -> (N, num_classes)."""


def simple_mlp(*, num_classes: int, hidden: Sequence[int] = (256, 128), dropout: float = 0.0,
               input_shape: Sequence[int] = (1, 28, 28)) -> SimpleMLP:
    """Build a SimpleMLP.

    Args:
        num_classes: width of the head.
        hidden: widths of the hidden layers, in order; an empty list gives logistic regression.
        dropout: probability, after every hidden layer.
        input_shape: (C, H, W) of the images; their product is the width of the first linear layer.

    Raises:
        UserError: an option is out of its range.
    """
    for name, values, count in (("num_classes", [num_classes], 1), ("hidden", hidden, None),
                                ("input_shape", input_shape, 3)):
        if not isinstance(values, Sequence) or isinstance(values, str) or count not in (None, len(values)) \
                or not all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values):
            raise UserError(f"simple_mlp: {name} must be {'(C, H, W), ' if count == 3 else ''}positive whole numbers, "
                            f"got {values!r}")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"simple_mlp: dropout must be at least 0 and below 1, got {dropout!r}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten(1))
    widths = [math.prod(input_shape), *hidden]
    for number, (before, after) in enumerate(pairwise(widths), start=1):
        layers[f"fc{number}"] = nn.Linear(before, after)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        if dropout:
            layers[f"dropout{number}"] = nn.Dropout(dropout)
    layers["fc"] = nn.Linear(widths[-1], num_classes)
    return SimpleMLP(layers)


MODELS = {"simple_mlp": simple_mlp}
