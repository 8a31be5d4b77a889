"""Oxford-IIIT Pets, 37 breeds of cats and dogs, from torchvision's files or from an image folder.

Source: Parkhi et al. 2012, "Cats and Dogs"; https://www.robots.ox.ac.uk/~vgg/data/pets/.
"""

from __future__ import annotations

import re
from pathlib import Path

from loaders.files import file_splits
from loaders.request import Request
from loaders.sets.image_folder import folder_splits, split_folders
from loaders.splits import Splits, torchvision_root
from metadata.errors import UserError, first_line
from metadata.records import dataset_cards

NAME = "oxford_iiit_pet"
LINE = re.compile(r"(?P<image>(?P<breed>[^\s/]+)_\d+)(\s+\d+){3}")  # great_pyrenees_103 16 2 9: class, species, breed


def oxford_iiit_pet(request: Request) -> Splits:
    """Open the pets with ImageNet preprocessing; hold validation out of trainval, class by class.

    Raises:
        UserError: missing or damaged files, or a failed download.
    """
    preprocessing = dataset_cards()[NAME]["preprocessing"]
    root = torchvision_root(request, NAME)
    if "train" in split_folders(root):
        return folder_splits(request, NAME, preprocessing)
    folder = root / "oxford-iiit-pet"
    if request.download:
        _fetch(root)
    if not (folder / "annotations").is_dir() or not (folder / "images").is_dir():
        raise UserError(f"data.root {root}: expected {folder}/images and {folder}/annotations, or {root}/train/<class>/ "
                        "with an image folder; pass data.download=true to fetch the set")
    listed = [_listed(folder, split) for split in ("trainval", "test")]
    breeds = [sorted({breed for _, breed in rows}) for rows in listed]
    if breeds[0] != breeds[1]:
        odd = sorted(set(breeds[0]) ^ set(breeds[1]))
        raise UserError(f"{folder}/annotations: trainval.txt and test.txt have other classes ({len(breeds[0])} and "
                        f"{len(breeds[1])}); not in both: {', '.join(odd[:5])}; remove {folder} and fetch it again")
    train, test = ([(path, breeds[0].index(breed)) for path, breed in rows] for rows in listed)
    missing = [path for path, _ in [*train, *test] if not path.is_file()]
    if missing and not request.skip_unreadable:
        raise UserError(f"{missing[0]}: there is no such file; of the {len(train) + len(test)} images in the annotations "
                        f"{len(missing)} are missing; remove {folder} and fetch it again with data.download=true, or pass "
                        "data.skip_unreadable=true")
    return file_splits(request, NAME, preprocessing, breeds[0], train, test)


def _fetch(root: Path) -> None:
    """Download and unpack missing files, 800 MB, through torchvision."""
    from torchvision.datasets import OxfordIIITPet

    try:
        OxfordIIITPet(root, download=True)
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(f"data.root {root}: {NAME} cannot be fetched ({first_line(error)}); check the network, or put "
                        f"its files into {root}/oxford-iiit-pet, or give an image folder") from error
    except ValueError:
        pass  # a damaged annotation, which the caller reports with more detail


def _listed(folder: Path, split: str) -> list[tuple[Path, str]]:
    """Return the images of a split and their breeds, named as in torchvision: `great_pyrenees_7` is a Great Pyrenees."""
    path = folder / "annotations" / f"{split}.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); remove {folder} and fetch it again with "
                        "data.download=true") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        match = LINE.fullmatch(line.strip())
        if not match:
            raise UserError(f"{path}:{number}: expected 'IMAGE CLASS SPECIES BREED' such as 'great_pyrenees_103 16 2 9', "
                            f"got {line[:60]!r}; remove {folder} and fetch it again with data.download=true")
        rows.append((folder / "images" / f"{match['image']}.jpg", match["breed"].replace("_", " ").title()))
    if not rows:
        raise UserError(f"{path}: lists no images; remove {folder} and fetch it again with data.download=true")
    return rows


SETS = {NAME: oxford_iiit_pet}
