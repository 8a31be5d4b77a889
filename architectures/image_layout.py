"""(N, C, H, W) or (N, H, W, C): which of the two the input of somebody's model file is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
