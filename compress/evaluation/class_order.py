"""Which output of a submission stands for which class folder of the test images: classes are matched by their names."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from compress.evaluation.facts import SubmissionFacts
from loaders.listing import Listing
from metadata.errors import VerificationError, first_line

SHOWN = 5  # names in a message
BY_NAME = "by name"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassOrder:
    """The classes of a submission's outputs.

    Args:
        names: a name for each output; a class that has a folder is spelled as the folder.
        matched: "by name", or which order was assumed.
        warnings: for the result.
    """

    names: list[str]
    matched: str
    warnings: list[str]

    def numbering_warnings(self, outputs: int | None) -> list[str]:
        """Return the doubt about outputs without names, where a model has more of them than there are class folders."""
        if outputs is None or self.matched == BY_NAME:
            return []
        return [f"the model has {outputs:,} outputs, and they are numbered by the {len(self.names)} class folders that are "
                "there: if the test folder lacks classes of the training, every number behind such a class is shifted and "
                "the accuracy wrong; add an empty folder for each, or state the folders' names as class_names"]

    def arranged(self, logits: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """Return (N, outputs) logits as (N, classes), with -infinity for a class that the submission does not know.

        Outputs beyond the names, of a model that has more, follow after the classes: an answer there is wrong.
        """
        if self.names == list(classes):
            return logits
        columns = {name: column for column, name in enumerate(self.names)}
        arranged = np.full((len(logits), len(classes)), -np.inf, logits.dtype)
        for index, name in enumerate(classes):
            if name in columns:
                arranged[:, index] = logits[:, columns[name]]
        return np.concatenate([arranged, logits[:, len(self.names):]], axis=1)


def class_order(files: SubmissionFacts, listing: Listing) -> ClassOrder:
    """Match a submission's outputs with the class folders of the test images.

    A test set may lack classes that the submission knows. Names that differ only in case, spaces, hyphens and underscores
    are the same class. A submission without names has its outputs in the order of the sorted folders, if there are as many.
    The competition's panel reads neither names nor counts: code of the original style whose metadata contradict the folders
    has its outputs in the order of the sorted folders, too, and so has an ONNX file none of whose names is a folder's.

    Raises:
        VerificationError: images of a class that the submission does not know, names that contradict the metadata, or no
            names and another number of classes.
    """
    if files.class_names is None:
        return _without_names(files, listing)
    try:
        return _by_name(files, files.class_names, listing)
    except VerificationError as error:
        if files.packaged or (files.kind != "code" and _matches(files.class_names, listing.classes)):
            raise
        ignored = dataclasses.replace(files, class_names=None, num_classes=None)
        order = _without_names(ignored, listing)
        said = f"class_names are ignored, and the outputs taken for the class folders in sorted order: {first_line(error)}"
        return dataclasses.replace(order, warnings=[said, *order.warnings[1:]])


def _by_name(files: SubmissionFacts, stated: Sequence[str], listing: Listing) -> ClassOrder:
    """Return the order of a submission that states names. Raise VerificationError as `class_order` says."""
    where = files.metadata_name
    if files.num_classes not in (None, len(stated)):
        raise VerificationError(f"{files.folder}: class_names in {where} has {len(stated)} names, num_classes is "
                                f"{files.num_classes}")
    twice = [name for name, count in Counter(stated).items() if count > 1]
    if twice:
        raise VerificationError(f"{files.folder}: class_names in {where} has {twice[0]!r} more than once")
    folder_of = _matches(stated, listing.classes)
    unmatched = set(listing.classes) - set(folder_of.values())
    unknown = [name for name in listing.classes if name in unmatched and name not in listing.empty]
    if unknown:
        raise VerificationError(f"{listing.folder}: the submission does not know {len(unknown)} of the "
                                f"{len(listing.classes)} classes here: {shown(unknown)}; it knows {shown(sorted(stated))}")
    warnings = []
    respelled = [f"{name} for {folder}" for name, folder in folder_of.items() if name != folder]
    if respelled:
        warnings.append(f"class names that differ from the folders' in spelling alone were taken for the same: "
                        f"{shown(respelled)}")
    lacking = sorted(name for name in stated if folder_of.get(name, name) not in listing.classes or
                     folder_of[name] in listing.empty)
    if lacking:
        warnings.append(f"{listing.folder}: no images of {len(lacking)} of the {len(stated)} classes that the submission "
                        f"knows: {shown(lacking)}; the accuracy is that of the images which are there")
    strange = sorted(unmatched)
    if strange:
        warnings.append(f"{listing.folder}: class folders without images, unknown to the submission: {shown(strange)}")
    return ClassOrder(names=[folder_of.get(name, name) for name in stated], matched=BY_NAME, warnings=warnings)


def shown(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _without_names(files: SubmissionFacts, listing: Listing) -> ClassOrder:
    warnings = [f"the submission states no class_names: its outputs were taken for the class folders in sorted order: "
                f"{shown(listing.classes)}"]
    if files.num_classes not in (None, len(listing.classes)):
        where = files.metadata_name
        if files.kind != "code":
            raise VerificationError(f"{listing.folder}: {len(listing.classes)} class folders, the submission has "
                                    f"{files.num_classes} classes and states no names, so nothing says which output is "
                                    f"which; state class_names in {where}")
        warnings.append(f"{listing.folder}: {len(listing.classes)} class folders, num_classes in {where} is "
                        f"{files.num_classes}, which the panel does not read")
    if listing.empty:
        warnings.append(f"{listing.folder}: class folders without images, which keep their place: {shown(listing.empty)}")
    return ClassOrder(names=list(listing.classes), matched="assumed: the sorted names of the folders", warnings=warnings)


def _matches(stated: Sequence[str], folders: Sequence[str]) -> dict[str, str]:
    """Return the folder of each stated name: the equal one, or else the only one of the same plain spelling."""
    def plain(name: str) -> str:
        return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()

    matches = {name: name for name in stated if name in set(folders)}
    rest = [[name for name in names if name not in matches] for names in (stated, folders)]
    plainly = [Counter(map(plain, names)) for names in (stated, folders)]
    by_plain = {plain(folder): folder for folder in rest[1]}
    for name in rest[0]:
        key = plain(name)
        if key in by_plain and all(counts[key] == 1 for counts in plainly):
            matches[name] = by_plain[key]
    return matches
