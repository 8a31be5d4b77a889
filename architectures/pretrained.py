"""What the zoos' pretrained weights were trained on: mean, deviation, interpolation, size and crop of their images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from architectures.timm_bridge import located, pretrained_error
from architectures.weight_packages import PACKAGES, package_file
from architectures.zoo import families
from metadata.errors import UserError
from metadata.schemas import Preprocessing, height_and_width, read_sides

CLOSE = 0.005  # means and deviations that differ by less are the same


@dataclass(frozen=True, kw_only=True)
class PretrainedInput:
    """The images that pretrained weights expect, and the classes that they know.

    Args:
        mean: per channel, after scaling to [0, 1].
        std: per channel.
        interpolation: of the resize, in Pillow's words.
        resize: pixels of the shorter side, or (height, width) to cover.
        crop: pixels of the central square, or (height, width).
        num_classes: of the head.
    """

    mean: list[float]
    std: list[float]
    interpolation: str
    resize: int | tuple[int, int]
    crop: int | tuple[int, int]
    num_classes: int

    def overrides(self, given: Preprocessing) -> dict[str, Any]:
        """Return the settings of the data that would make its images those that the weights expect.

        Images without a margin around the crop (arrays, or a folder that asks for that) keep it so.
        """
        changes: dict[str, Any] = {}
        for key, wanted, have in (("mean", self.mean, given.mean), ("std", self.std, given.std)):
            if len(wanted) == len(have) and any(abs(a - b) > CLOSE for a, b in zip(wanted, have, strict=True)):
                changes[key] = wanted
        if given.interpolation != self.interpolation:
            changes["interpolation"] = self.interpolation
        if given.crop not in (None, self.crop):
            changes["image_size"] = self.crop
        if given.resize != given.crop and given.window and given.covered:
            margin = given.covered[0] / given.window[0]
            resize = read_sides([round(side * margin) for side in height_and_width(self.crop)]) \
                if "image_size" in changes else given.resize
            if resize != self.resize:
                changes["resize"] = self.resize
        return changes


def pretrained_input(name: str, options: dict[str, Any]) -> PretrainedInput:
    """Return what the pretrained weights of a model of torchvision or timm expect. Nothing is downloaded.

    Args:
        name: as `architectures.zoo.make` takes it; the tag of a timm name selects the weights.
        options: of the model; `img_size` is the size that the model is built for.

    Raises:
        UserError: the name is unknown, there are no pretrained weights for it, or their package is not installed.
    """
    if name in families():
        raise pretrained_error(name)
    if name in PACKAGES:
        package_file(name)
    zoo, bare = located(name)
    if zoo == "torchvision":
        from torchvision import models
        weights = models.get_model_weights(bare).DEFAULT
        images = weights.transforms()
        return PretrainedInput(
            mean=list(images.mean), std=list(images.std), interpolation=images.interpolation.value,
            resize=images.resize_size[0], crop=images.crop_size[0], num_classes=len(weights.meta["categories"]))
    import timm
    stated = timm.get_pretrained_cfg(bare)
    if stated is None or not stated.has_weights:
        raise UserError(f"model {name}: timm has no pretrained weights for it; pass a checkpoint or train one")
    size = options.get("img_size") or stated.input_size[-1]
    sides = [int(side) for side in size] if isinstance(size, list | tuple) else [int(size)] * 2
    return PretrainedInput(mean=list(stated.mean), std=list(stated.std), interpolation=stated.interpolation or "bicubic",
                           resize=read_sides([int(side / stated.crop_pct) for side in sides]), crop=read_sides(sides),
                           num_classes=stated.num_classes)


def pretrained_warning(name: str, options: dict[str, Any], given: Preprocessing, spell: Callable[[str], str]) -> str | None:
    """Return one line with the settings that a model's pretrained weights call for, or None where the data has them.

    Args:
        name: of the model.
        options: of the model.
        given: how the data's images become the model's input.
        spell: how the caller's command writes a setting of the data before its value.

    Raises:
        UserError: see `pretrained_input`.
    """
    changes = pretrained_input(name, options).overrides(given)
    if not changes:
        return None
    shown = " ".join(spell(key) + str(list(value) if isinstance(value, tuple) else value).replace(" ", "")
                     for key, value in changes.items())
    return f"the pretrained weights of {name} were trained on other images than the data gives; pass {shown}"
