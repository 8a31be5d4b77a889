"""Where the images of a batch lie in a tensor, and what a reshape to fixed sizes does to them.

Exporters write sizes as numbers. A file whose batch is one has a 1 where the number of images belongs, or folds it into
another size. The network takes any number of images, so that each such size is found and scaled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from architectures.onnx_network.network import ImageCount

Sizes = tuple[int, ...]
Lying = tuple[int, int, int]  # axis, that size for one image, and how much of it lies outside of the images


def batch_axis(two: Sequence[int], three: Sequence[int]) -> tuple[int, int] | None:
    """Return the axis whose size grows with the images, and its size for one image; None where no axis does.

    Args:
        two, three: the shape of one tensor for two and for three images.

    Raises:
        ValueError: more than one axis grows, or one in another way than by the number of images.
    """
    axes = [axis for axis, sizes in enumerate(zip(two, three, strict=True)) if sizes[0] != sizes[1]]
    if not axes:
        return None
    (axis,) = axes
    if two[axis] * 3 != three[axis] * 2:
        raise ValueError(f"the sizes {two[axis]} and {three[axis]} for two and three images")
    return axis, two[axis] // 2


def place_images(target: Sequence[int], outside: int, batch: int) -> Lying:
    """Return where the images lie after a reshape that the file states for a fixed number of images.

    Args:
        target: the shape in the file, all sizes known.
        outside: the product of the sizes before the images, in the tensor that is reshaped.
        batch: the number of images in the file.

    Raises:
        ValueError: no size of the target can hold the images.
    """
    before = [math.prod(target[:axis]) for axis in range(len(target))]
    here = [axis for axis in range(len(target)) if before[axis] == outside and target[axis] % batch == 0]
    alone = [axis for axis in here if target[axis] == batch]
    if alone or outside == 1:
        if not here:
            raise ValueError(f"no size of {list(target)} can hold the images")
        axis = (alone or here)[0]
        return axis, target[axis] // batch, 1
    if here and here[0] < len(target) - 1:  # the last size is that of the features
        return here[0], target[here[0]] // batch, 1
    for axis, size in enumerate(target):
        part = outside // before[axis]
        if before[axis] < outside and outside % before[axis] == 0 and size % (part * batch) == 0:
            return axis, size // batch, part
    if here:
        return here[0], target[here[0]] // batch, 1
    raise ValueError(f"no size of {list(target)} can hold the images")


def with_images(target: Sequence[int], axis: int, times: int) -> list[int | ImageCount]:
    """Return a shape in which one size is the number of images, times a number."""
    return [ImageCount(times) if at == axis else size for at, size in enumerate(target)]
