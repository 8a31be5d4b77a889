"""Images held out by the hash of their content: the choice depends on no name and no order, and copies stay together.

An image that is held out stays held out when others are added. So the number of held-out images follows the fraction only
about, as chance has it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from loaders.packed import Picture, Pictures
from metadata.errors import UserError, some_of


@dataclass(frozen=True, kw_only=True)
class Division:
    """Images divided in two.

    Args:
        kept: the places of the images that stay, in order.
        held: the places of the others.
        without: the classes that have too few different images to give one away.
    """

    kept: list[int]
    held: list[int]
    without: list[int]


def drawn_for(digest: str, purpose: str) -> float:
    """Return a number from 0 to below 1 that depends on an image's content and on what it is asked for."""
    return int(hashlib.sha256(f"{purpose} {digest}".encode()).hexdigest()[:13], 16) / 16**13


def hold_out_by_content(labels: Sequence[int], digests: Sequence[str], fraction: float, purpose: str,
                        keep: int = 1) -> Division:
    """Hold out about a fraction of each class: the images whose content hashes below it.

    Of a class none of whose images does, the lowest is held out. At least `keep` different images of each class stay.

    Args:
        labels: the class of each image.
        digests: the hash of each image's content.
        fraction: of the images.
        purpose: what they are held out for; other purposes give other images.
        keep: the number of different images that a class keeps; classes with fewer than two keep all.

    Raises:
        UserError: no class can give an image away.
    """
    classes: dict[int, set[str]] = {}
    owners: dict[str, set[int]] = {}
    for label, digest in zip(labels, digests, strict=True):
        classes.setdefault(label, set()).add(digest)
        owners.setdefault(digest, set()).add(label)
    place = {digest: drawn_for(digest, purpose) for digest in owners}
    held = {digest for digest in owners if place[digest] < fraction}
    for _, own in sorted(classes.items()):
        # An image that is in several classes moves for all of them, so it is the last to be moved for one.
        order = sorted(own, key=lambda digest: (len(owners[digest]) > 1, place[digest]))
        least = min(keep, max(1, len(own) - 1))
        for digest in sorted(own, key=lambda digest: (len(owners[digest]) > 1, -place[digest])):
            if len(own - held) < least:
                held.discard(digest)
        if len(own) > 1 and not own & held:
            held.add(order[0])
    for _, own in sorted(classes.items()):  # whatever copies in several classes did: every class is trained on
        if own <= held:
            held.discard(max(own, key=place.__getitem__))
    if not held:
        raise UserError(f"no class has two different images, so none can be held out for {purpose.partition(' ')[0]}; add "
                        "images")
    chosen = [digest in held for digest in digests]
    return Division(kept=[index for index, is_held in enumerate(chosen) if not is_held],
                   held=[index for index, is_held in enumerate(chosen) if is_held],
                   without=[label for label, own in sorted(classes.items()) if not own & held])


def copies_warnings(files: Pictures, digests: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """Return which images are in more than one class, to the byte."""
    first: dict[str, tuple[Picture, int]] = {}
    odd: dict[str, tuple[Picture, Picture]] = {}
    for (picture, label), digest in zip(files, digests, strict=True):
        other, known = first.setdefault(digest, (picture, label))
        if known != label:
            odd.setdefault(digest, (other, picture))
    if not odd:
        return []
    one, other = next(iter(odd.values()))
    return [f"{len(odd)} image{'s are' if len(odd) > 1 else ' is'} in more than one class, to the byte, such as {one} and "
            f"{other}; remove the wrong copies"]


def without_warnings(without: Sequence[int], purpose: str, class_names: Sequence[str], files: Pictures) -> list[str]:
    """Return which classes have no held-out image because they have too few."""
    if not without:
        return []
    example = next(picture for picture, label in files if label == without[0])
    names = some_of([class_names[label] for label in without], 5)
    return [f"{len(without)} of {len(class_names)} classes have too few different images, which stay in train, so "
            f"{purpose} has none of them: {names} ({example.parent}); add images"]
