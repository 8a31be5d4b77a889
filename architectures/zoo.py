"""Models by name: `make(name, **options)` builds a model, `names()` lists the project's own.

Each file in `architectures/families/` is a family. A family file defines `MODELS`, a dict from a model's name to the
function that builds the model. `make` also takes the names of torchvision and timm, with their prefix
(`torchvision:resnet50`, `timm:resnest14d`) or without
(`resnet50`, `resnet18.a1_in1k`). A bare name is looked up in the families first, then
in torchvision, then in timm. `file:my_net.py:MyNet`, `onnx:FILE` and `folder:DIR` are the user's own, see
`architectures/named.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import architectures.families
from architectures import named
from architectures.own_code import own_error
from metadata.closest import closest, spelled
from metadata.errors import UserError, first_line

DRAWN = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_)
QUICK_FORWARD = 2**34  # weights times pixels: about a second for the slowest network of that size


class _NothingDrawn(TorchFunctionMode):
    """Initialization that leaves tensors without values as they are: torch would import its compiler to draw nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DRAWN and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Build modules on the meta device: nothing is allocated, drawn or computed."""
    with torch.device("meta"), _NothingDrawn():
        yield


def families() -> dict[str, Callable[..., nn.Module]]:
    """Return the project's own models: name -> the function that builds the model, from every family file."""
    found: dict[str, Callable[..., nn.Module]] = {}
    for module in pkgutil.iter_modules(architectures.families.__path__):
        found |= importlib.import_module(f"architectures.families.{module.name}").MODELS
    return found


def family_modules(name: str) -> list[str]:
    """Return the module in `architectures/families/` that holds a model; none for a model of torchvision or timm."""
    modules = [f"architectures.families.{module.name}" for module in pkgutil.iter_modules(architectures.families.__path__)]
    return [module for module in modules if name in importlib.import_module(module).MODELS]


def names() -> list[str]:
    """Return the names of the project's own models, sorted."""
    return sorted(families())


def own_name(name: str) -> str:
    """Return the project's spelling of a model's name: `simple_mlp` for `SimpleMLP`. Return other names unchanged."""
    return spelled(name, families())


def fitted_options(name: str, options: dict[str, Any], input_shape: Sequence[int]) -> dict[str, Any]:
    """Return a model's options with those that follow from its images (C, H, W), where the project's own model takes them.

    Options that are given take precedence.
    """
    if named.is_own(name):
        return named.stated_options(name, input_shape) | options
    takes = inspect.signature(families()[name]).parameters if name in families() else {}
    known = {"input_shape": list(input_shape), "in_channels": input_shape[0]}
    return {key: value for key, value in known.items() if key in takes} | options


def check_forward(module: nn.Module, name: str, input_shape: tuple[int, int, int], num_classes: int,
                  advice: str = "") -> None:
    """Run a module on two images, in train and in eval mode.

    A small network runs on zeros first. The meta device computes nothing, but takes seconds to import torch's compiler. A
    module with values, such as that of a user's file, runs where it is.

    Args:
        module: on the meta device, where it stays, or to be thrown away.
        name: what the message calls the module.
        input_shape: (C, H, W).
        num_classes: width of the logits.
        advice: end of the message about a wrong output.

    Raises:
        UserError: the module does not take the images, or its output is not (N, num_classes).
    """
    tensors = [*module.parameters(), *module.buffers()]
    device = "meta" if any(tensor.is_meta for tensor in tensors) or not tensors else "cpu"
    small = sum(tensor.numel() for tensor in module.parameters()) * math.prod(input_shape[1:]) <= QUICK_FORWARD
    if device == "meta" and small and _answers_zeros(module, input_shape, num_classes):
        return
    for training in (True, False):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                output = module.train(training)(torch.zeros(2, *input_shape, device=device))
        except UserError:
            raise
        except Exception as error:  # whatever the network's own code raises
            raise UserError(f"{name}: it does not take images of shape {list(input_shape)}: "
                            f"{own_error(error) or first_line(error)}") from error
        if not isinstance(output, torch.Tensor) or tuple(output.shape) != (2, num_classes):
            raise UserError(f"{name}: expected logits (N, {num_classes}), got "
                            f"{list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__} in "
                            f"{'train' if training else 'eval'} mode{advice}")


def _answers_zeros(module: nn.Module, input_shape: tuple[int, int, int], num_classes: int) -> bool:
    """Tell whether a module whose weights are all zero gives logits for two images of zeros, in train and in eval mode."""
    values = {name: torch.zeros(tensor.shape, dtype=tensor.dtype)
              for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    images = torch.zeros(2, *input_shape)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            answers = [torch.func.functional_call(module.train(training), values, (images,)) for training in (True, False)]
    except Exception:  # the run on the meta device says what is wrong; a tensor outside the state dict has no values here
        return False
    return all(isinstance(answer, torch.Tensor) and answer.shape == (2, num_classes) for answer in answers)


def make(name: str, *, num_classes: int, pretrained: bool = False, **options: Any) -> nn.Module:
    """Build a model `(N, C, H, W) float32 -> (N, num_classes)` logits.

    Args:
        name: one of `names()`, or a name of torchvision or timm, with or without `torchvision:` or `timm:`.
        num_classes: width of the head.
        pretrained: fetch the weights of a torchvision or timm model; the head is fresh where the number of classes
            differs.
        options: the model's own options.

    Raises:
        UserError: an unknown name or option (with the closest match), pretrained weights that cannot be fetched, or
            whatever is wrong with a file of the user's.
    """
    from architectures import timm_bridge

    if named.is_own(name):
        if pretrained:
            raise UserError(f"model {name}: a file of one's own has no pretrained weights to fetch; leave pretrained out")
        return named.make_named(name, num_classes=num_classes, **options)
    own = families()
    if name not in own:
        return timm_bridge.make_zoo(name, num_classes=num_classes, pretrained=pretrained, known=list(own), **options)
    if pretrained:
        raise timm_bridge.pretrained_error(name)
    parameters = inspect.signature(own[name]).parameters
    for option in options:
        if option not in parameters:
            raise UserError(f"model {name}: unknown option {option!r}{closest(option, parameters)} "
                            f"(options: {', '.join(parameters)})")
    return own[name](num_classes=num_classes, **options)
