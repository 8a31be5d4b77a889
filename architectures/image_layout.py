"""(N, C, H, W) or (N, H, W, C), and how many images: which of these the input of somebody's model file takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from metadata.errors import VerificationError


def takes_channels_last(path: Path, dims: Sequence[int], input_shape: Sequence[int], layout: str | None,
                        usual: str = "NCHW") -> bool:
    """Return whether a file takes (N, H, W, C), by the sizes that its input states.

    Args:
        path: the file, for the message.
        dims: the four sizes of the input; 0 where the file leaves one open.
        input_shape: (C, H, W) of an image.
        layout: "NHWC" or "NCHW" where the metadata state it.
        usual: the layout where both fit and none is stated.

    Raises:
        VerificationError: no layout fits, or not the stated one.
    """
    shapes = {"NCHW": tuple(input_shape), "NHWC": (*input_shape[1:], input_shape[0])}
    fitting = [name for name, shape in shapes.items()
               if all(stated in (0, size) for stated, size in zip(dims[1:], shape, strict=True))]
    if layout in fitting or (layout is None and fitting):
        return (layout or (usual if usual in fitting else fitting[0])) == "NHWC"
    got = ", ".join(str(size or "any") for size in dims[1:])
    if layout is not None:
        raise VerificationError(f"{path}: the input takes images of shape [{got}], the metadata state the layout {layout} "
                                f"and the preprocessing makes {list(shapes[layout])}")
    raise VerificationError(f"{path}: the input takes images of shape [{got}], the preprocessing makes {list(input_shape)} "
                            "(C, H, W); state an input_shape and a preprocessing (resize, crop) that fit the file")


def answered_in_batches(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray, channels_last: bool, batch: int | None,
                        ) -> np.ndarray:
    """Return a model file's answers to any number of images: in the file's own layout, as many at once as it takes.

    Args:
        run: the file, on as many images as it takes.
        images: (N, C, H, W).
        channels_last: whether the file takes (N, H, W, C).
        batch: the only number of images that the file takes, or None where it takes any; missing ones are zeros.
    """
    if channels_last:
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    batch = batch or len(images)
    if batch == len(images):
        return run(images)
    missing = -len(images) % batch if len(images) else batch
    filled = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)]) if missing else images
    parts = [run(filled[start:start + batch]) for start in range(0, len(filled), batch)]
    return np.concatenate(parts)[:len(images)]
