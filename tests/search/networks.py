"""Networks for the tests of a search, and their spaces."""

from __future__ import annotations

import functools

from torch import fx

from architectures.architecture import Architecture
from compress.search.space import Space
from tests.helpers.graphs import graph


@functools.cache
def network(name: str) -> tuple[fx.GraphModule, Architecture]:
    """Return a network with random weights and statistics: "slim", "mobile", "compact", "residual" or "little"."""
    if name == "slim":
        return graph(width=16, stem="small", size=16)
    if name == "mobile":
        return graph("torchvision:mobilenet_v2", size=32)
    if name == "little":  # of some hundred sub-networks
        return graph("compact_net", size=16, block="residual", widths=[16, 16, 24], depths=[1, 2, 1], expansion=1)
    block = "inverted" if name == "compact" else "residual"
    return graph("compact_net", size=16, block=block, widths=[16, 24, 32], depths=[2, 2, 2])


@functools.cache
def space(name: str) -> Space:
    """Return the sub-networks of a network."""
    model, architecture = network(name)
    return Space.of(architecture, model.state_dict())
