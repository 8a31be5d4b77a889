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

import torch
from torch import nn

import architectures.families

from metadata.closest import closest, spelled
from metadata.errors import UserError, first_line

def families() -> dict[str, Callable[..., nn.Module]]:
    """The project's own models by name, from every family file in this folder."""
    found: dict[str, Callable[..., nn.Module]] = {}
    for module in pkgutil.iter_modules(architectures.families.__path__):
        found |= importlib.import_module(f"architectures.families.{module.name}").MODELS
    return found


def names() -> list[str]:
    """Names of the project's own models."""
    return sorted(families())


def own_name(name: str) -> str:
    """The project's own spelling of a name, `SimpleMLP` for `simple_mlp`; a name of no own model as it is."""
    return spelled(name, families())


def check_forward(module: nn.Module, name: str, input_shape: tuple[int, int, int], num_classes: int,
                  advice: str = "") -> None:
    """Lets a module on the meta device look at two images, in train and in eval mode.

    Raises:
        UserError: it does not take their shape, or its output is not (N, num_classes); `name` and `advice` are in it.
    """
    for training in (True, False):
        try:
            output = module.train(training)(torch.empty(2, *input_shape, device="meta"))
        except (RuntimeError, AssertionError, ValueError, TypeError, LookupError, NotImplementedError) as error:
            raise UserError(f"{name}: it does not take images of shape {list(input_shape)}: {first_line(error)}"
                            ) from error
        if not isinstance(output, torch.Tensor) or tuple(output.shape) != (2, num_classes):
            raise UserError(f"{name}: expected logits (N, {num_classes}), got "
                            f"{list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__} in "
                            f"{'train' if training else 'eval'} mode{advice}")


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
