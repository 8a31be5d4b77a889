"""Augmentation: each operation against its definition, and independence of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from loaders.augment import AUGMENTATIONS, Affine, Augmenter, center_crop, derive_seed, windows_by_pixel, windows_by_row
from tests.helpers.trainings import numbered_images


def augmenter(*names: str, size: int = 8, padding: int = 0, seed: int = 0, samples: int = 400,
              affine: Affine | None = None) -> Augmenter:
    return Augmenter(names=list(names), size=(size, size), padding=padding, seed=seed, samples=samples,
                     affine=affine or Affine())


def augmented(images: Tensor, *names: str, padding: int = 0, size: int | None = None,
              affine: Affine | None = None) -> Tensor:
    """The first view of the images, at their own size unless another is given."""
    make = augmenter(*names, size=size or images.shape[3], padding=padding, samples=len(images), affine=affine)
    return make(images, torch.arange(len(images)), 0)


@pytest.mark.parametrize("names", [*([name] for name in AUGMENTATIONS), ["crop", "flip", "cutout"]], ids=str)
def test_augmentation_depends_on_sample_and_view_not_on_the_batch(names: list[str]) -> None:
    images, ids = numbered_images(40), torch.arange(40)
    whole = augmenter(*names, padding=2, seed=3, samples=40)(images, ids, view=1)
    order = torch.randperm(40)
    pieces = [augmenter(*names, padding=2, seed=3, samples=40)(images[part], part, view=1) for part in order.split(7)]
    assert torch.equal(torch.cat(pieces), whole[order])
    assert not torch.equal(augmenter(*names, padding=2, seed=3, samples=40)(images, ids, view=2), whole)
    assert not torch.equal(augmenter(*names, padding=2, seed=4, samples=40)(images, ids, view=1), whole)


def test_crop_shifts_each_image_by_whole_pixels_within_the_padding() -> None:
    images = numbered_images(200)
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    shifts = set()
    for image, cropped in zip(padded, augmented(images, "crop", padding=2), strict=True):
        found = [(y, x) for y in range(5) for x in range(5) if torch.equal(image[:, y:y + 8, x:x + 8], cropped)]
        assert found
        shifts.add(found[0])
    assert len(shifts) == 25  # every offset occurs in 200 draws of 25


def test_windows_are_the_same_row_by_row_and_pixel_by_pixel() -> None:
    images = numbered_images(50, size=12).permute(0, 2, 3, 1)
    top, left = (torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected = torch.stack([image[y:y + 9, x:x + 8] for image, y, x in zip(images, top, left, strict=True)])
    assert torch.equal(windows_by_pixel(images, top, left, 9, 8), expected)
    assert torch.equal(windows_by_row(images, top, left, 9, 8), expected)


def test_alternating_flip_shows_both_sides_in_two_views() -> None:
    images = numbered_images(100)
    alternating = augmenter("alternating_flip", samples=100)
    views = [alternating(images, torch.arange(100), view) for view in range(4)]
    assert torch.equal(views[0].flip(3), views[1]) and torch.equal(views[0], views[2])
    mirrored = sum(torch.equal(a.flip(2), b) for a, b in zip(images, views[0], strict=True))
    assert 30 < mirrored < 70


def test_affine_without_limits_leaves_the_image() -> None:
    images = numbered_images(60, size=16)
    assert torch.equal(augmented(images, "affine", affine=Affine(degrees=0, scale=0, shear=0, shift=0)), images)


def test_affine_shifts_no_further_than_its_limit() -> None:
    point = torch.zeros(60, 1, 17, 17, dtype=torch.uint8)
    point[:, :, 8, 8] = 255
    spread = augmented(point, "affine", affine=Affine(degrees=0, scale=0, shear=0, shift=1.0)).float()
    assert float(spread[:, 0, 7:10, 7:10].sum()) == pytest.approx(float(spread.sum()))  # no further than a pixel
    assert len({int(image.argmax()) for image in spread.flatten(1)}) > 5  # and not all alike


def test_affine_turns_by_the_angle_and_keeps_corners_black() -> None:
    bar = torch.zeros(200, 1, 31, 31, dtype=torch.uint8)
    bar[:, :, 15, 3:28] = 255
    turned = augmented(bar, "affine", affine=Affine(degrees=30.0, scale=0, shear=0, shift=0))[:, 0].float()
    rows, columns = torch.meshgrid(torch.arange(31.) - 15, torch.arange(31.) - 15, indexing="ij")
    angles = torch.rad2deg(torch.atan2((turned * rows * columns.sign()).sum((1, 2)),
                                       (turned * columns.abs()).sum((1, 2))))
    assert 25 < float(angles.max()) < 31 and -31 < float(angles.min()) < -25
    assert int(turned[:, ::30, ::30].max()) == 0


def test_flip_mirrors_about_half_and_cutout_blackens_a_square() -> None:
    images = numbered_images(400)
    flipped = augmented(images, "flip")
    mirrored = torch.tensor([torch.equal(a.flip(2), b) for a, b in zip(images, flipped, strict=True)])
    same = torch.tensor([torch.equal(a, b) for a, b in zip(images, flipped, strict=True)])
    assert bool((mirrored ^ same).all()) and 150 < int(mirrored.sum()) < 250
    black = (augmented(images.clamp(min=1), "cutout") == 0).all(1).flatten(1).sum(1)
    assert int(black.max()) == 9 and int(black.min()) >= 4  # 3x3, or the part of the square inside the image


def test_larger_images_are_cropped_without_padding_and_centrally_without_a_crop() -> None:
    images = numbered_images(10, size=12)
    assert augmented(images, "crop", size=8, padding=4).shape == (10, 3, 8, 8)
    assert torch.equal(augmented(images, size=8, padding=4), images[:, :, 2:10, 2:10])
    assert center_crop(images, (12, 12)).shape == images.shape


def test_seeds_for_different_purposes_differ() -> None:
    assert len({derive_seed(0, "order", 0), derive_seed(0, "order", 1), derive_seed(0, "augment", 0),
                derive_seed(1, "order", 0)}) == 4


def test_affine_moves_oblong_images_as_it_moves_them_on_a_square_canvas() -> None:
    """A rotation by an angle must not shear images whose sides differ."""
    canvas = torch.zeros(20, 3, 40, 40, dtype=torch.uint8)
    images = torch.randint(0, 256, (20, 3, 24, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = nn.functional.avg_pool2d(images.float(), 5, 1, 2).to(torch.uint8)  # smooth
    canvas[:, :, 8:32] = images
    limits = Affine(degrees=40, scale=0.2, shear=0.2, shift=3)
    square = Augmenter(names=["affine"], size=(40, 40), padding=0, seed=0, samples=20, affine=limits)
    oblong = Augmenter(names=["affine"], size=(24, 40), padding=0, seed=0, samples=20, affine=limits)
    expected = center_crop(square(canvas, torch.arange(20), 0), (24, 40)).int()
    assert (oblong(images, torch.arange(20), 0).int() - expected).abs().max() <= 1


@pytest.mark.parametrize("name", ["crop", "flip", "alternating_flip", "cutout"])
def test_oblong_images_keep_their_sides(name: str) -> None:
    images = torch.randint(1, 256, (40, 3, 10, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    cropped = Augmenter(names=[name], size=(8, 13), padding=0, seed=0, samples=40)(images, torch.arange(40), 0)
    assert cropped.shape == (40, 3, 8, 13)
    if name == "crop":  # every image is a window of its original
        assert all(any(torch.equal(image[:, y:y + 8, x:x + 13], window) for y in range(3) for x in range(4))
                   for image, window in zip(images, cropped, strict=True))
