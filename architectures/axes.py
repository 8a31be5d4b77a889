"""Where the images are in a traced tensor, and what the tensor is in an architecture, where the images come first.

A network's code may fold windows or heads into the axis of the images, (N * 64, 49, 96), or move that axis, (3, N, 8, 196,
64). In an architecture the first is (N, 64, 49, 96) and the second (N, 3, 8, 196, 64): the images are an axis of their own
and the first one, so that no layer can mix them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from architectures.layers.base import AS_TEACHER, NOT_IN_TABLE, Shape, place_of
from metadata.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, fx

BATCHES = (2, 3)  # the numbers of images that a network is traced for: a layer that keeps images apart does so for both


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The axes of a traced tensor.

    Args:
        shape: the shape for two images; None: not known, and the images come first.
        images: the axis of the images; None: the tensor is the same for every image.
        fold: what is folded into that axis: its size is N * fold.
        where: the tensor's place, for messages.
    """

    shape: Shape | None
    images: int | None = 0
    fold: int = 1
    where: str = ""

    @property
    def others(self) -> list[int]:
        """The axes but that of the images."""
        assert self.shape is not None
        return [axis for axis in range(len(self.shape)) if axis != self.images]

    @property
    def image_shape(self) -> Shape:
        """The shape for one image in the architecture."""
        assert self.shape is not None
        return (*([self.fold] if self.fold > 1 else []), *(self.shape[axis] for axis in self.others))

    @property
    def in_front(self) -> bool:
        """Whether the images come first, so that they stay apart whatever a reshape does to the axes behind."""
        assert self.shape is not None
        return self.images is None or all(size == 1 for size in self.shape[:self.images])

    def dim(self, dim: int) -> int:
        """Return where a dimension is in the architecture's tensor, whose first one is the images.

        Raises:
            UserError: the dimension is that of the images.
            IndexError: there is no such dimension.
        """
        rank = len(self.shape) if self.shape is not None else 8
        if not -rank <= dim < rank:
            raise IndexError(f"there is no dimension {dim} of {rank}")
        if dim % rank == self.images:
            raise UserError(f"layer {self.where}: it works along the images, which {NOT_IN_TABLE}; {AS_TEACHER}")
        return dim if self.shape is None else 1 + (self.fold > 1) + self.others.index(dim % rank)


def axes_of(node: fx.Node) -> Axes:
    """Return the axes of a traced tensor.

    Raises:
        UserError: the tensor mixes images.
    """
    if not node.meta.get("shapes"):
        return Axes(shape=None, where=place_of(node))
    two, three = node.meta["shapes"]
    where = place_of(node)
    if two == three:
        if node.meta.get("of_images", True):
            raise UserError(f"layer {where}: it mixes the images of a batch, which {NOT_IN_TABLE}; {AS_TEACHER}")
        return Axes(shape=two, images=None, where=where)
    different = [axis for axis, sizes in enumerate(zip(two, three, strict=False)) if sizes[0] != sizes[1]]
    if len(two) == len(three) and len(different) == 1:
        axis = different[0]
        fold, rest = divmod(two[axis], BATCHES[0])
        if not rest and three[axis] == fold * BATCHES[1]:
            return Axes(shape=two, images=axis, fold=fold, where=where)
    raise UserError(f"layer {where}: shapes {list(two)} for two images and {list(three)} for three mix the images, which "
                    f"{NOT_IN_TABLE}; {AS_TEACHER}")


def image_dim(node: fx.Node, dim: int) -> int:
    """Return where a dimension of a traced tensor is in the architecture's tensor.

    Raises:
        UserError: the dimension is that of the images.
        IndexError: there is no such dimension.
    """
    return axes_of(node).dim(dim)


def same_for_all(one: Tensor, other: Tensor | None) -> Tensor:
    """Return a tensor that code made for two images, given that for three: the same, or one with the same row for each.

    Raises:
        UserError: it depends on the number of images in another way.
    """
    import torch
    if other is not None and one.dtype == other.dtype and one.shape[1:] == other.shape[1:]:
        if one.shape == other.shape and torch.equal(one, other):
            return one
        if one.dim() and (len(one), len(other)) == BATCHES and all(torch.equal(row, one[0]) for row in (*one, *other)):
            return one[:1]
    raise UserError(f"the network's code makes a tensor that depends on the number of images, which {NOT_IN_TABLE}; "
                    f"{AS_TEACHER}")
