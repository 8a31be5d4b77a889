"""Authoring models: one family a file, found by the file system. `make(name, **options)` builds, `names()` lists.

A family file defines `MODELS`, a literal dict from a model's name to the function that builds it. Names from the zoos
are taken too: `torchvision:resnet50`, `timm:resnest14d`, or bare (`resnet50`), own families and torchvision first.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import nn

from metadata.closest import closest
from model_loader import UserError

NOT_FAMILIES = {"describe", "source", "timm_bridge"}


def families() -> dict[str, Callable[..., nn.Module]]:
    """The project's own models by name, from every family file in this folder."""
    found: dict[str, Callable[..., nn.Module]] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name not in NOT_FAMILIES:
            found |= importlib.import_module(f"{__name__}.{module.name}").MODELS
    return found


def names() -> list[str]:
    """Names of the project's own models."""
    return sorted(families())


def make(name: str, *, num_classes: int, pretrained: bool = False, **options: Any) -> nn.Module:
    """Builds a model `(N, C, H, W) float32 -> (N, num_classes)` logits.

    Args:
        name: one of `names()`, or a name of torchvision's or timm's, with or without `torchvision:` / `timm:`.
        num_classes: width of the head.
        pretrained: zoo models only: fetch the zoo's weights; the head is fresh where the class count differs.
        options: the model's own options.

    Raises:
        UserError: unknown name or option (with the closest match), or pretrained weights that cannot be had.
    """
    from architectures import timm_bridge

    own = families()
    if name not in own:
        return timm_bridge.make_zoo(name, num_classes=num_classes, pretrained=pretrained, known=list(own), **options)
    if pretrained:
        raise UserError(f"model {name}: there are no pretrained weights for the project's own models; pass a "
                        "checkpoint or train one")
    parameters = inspect.signature(own[name]).parameters
    for option in options:
        if option not in parameters:
            raise UserError(f"model {name}: unknown option {option!r}{closest(option, parameters)} "
                            f"(options: {', '.join(parameters)})")
    return own[name](num_classes=num_classes, **options)
