"""Images held out by the hash of their content: no name, no order and no copy changes where an image goes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies

from loaders.catalog import load
from loaders.holdout import hold_out_by_content, drawn_for
from loaders.request import Request
from metadata.errors import UserError
from tests.helpers.folders import draw_folder

IMAGES = strategies.lists(strategies.tuples(strategies.integers(0, 3), strategies.integers(0, 40)), min_size=2, max_size=80)


@settings(max_examples=50, deadline=None)
@given(IMAGES, strategies.floats(0.05, 0.9), strategies.integers(1, 2), strategies.randoms(use_true_random=False))
def test_what_is_held_out(images: list[tuple[int, int]], fraction: float, keep: int, order: random.Random) -> None:
    labels, digests = [label for label, _ in images], [str(content) for _, content in images]
    different = {label: {digest for own, digest in zip(labels, digests, strict=True) if own == label} for label in labels}
    if all(len(own) < 2 for own in different.values()):
        return
    try:
        parts = hold_out_by_content(labels, digests, fraction, "test", keep)
    except UserError:  # every class shares its images with others
        assert any(len({label for label, own in different.items() if digest in own}) > 1 for digest in digests)
        return
    assert sorted(parts.kept + parts.held) == list(range(len(images)))
    assert not {digests[place] for place in parts.kept} & {digests[place] for place in parts.held}  # copies stay together
    assert {labels[place] for place in parts.kept} == set(labels)
    assert set(parts.without) == set(labels) - {labels[place] for place in parts.held}
    shuffled = list(range(len(images)))
    order.shuffle(shuffled)
    again = hold_out_by_content([labels[place] for place in shuffled], [digests[place] for place in shuffled], fraction,
                                "test", keep)
    assert {shuffled[place] for place in again.held} == set(parts.held)


def test_classes_are_held_out_alike_and_an_image_that_is_added_moves_no_other() -> None:
    labels, digests = [place % 5 for place in range(1500)], [str(place) for place in range(1500)]
    parts = hold_out_by_content(labels, digests, 0.2, "test")
    for label in range(5):
        assert 30 < sum(labels[place] == label for place in parts.held) < 90  # 60 expected, 7 the deviation
    more = hold_out_by_content([*labels, *labels], [*digests, *(f"new {digest}" for digest in digests)], 0.2, "test")
    assert [place for place in more.held if place < 1500] == parts.held
    other = hold_out_by_content(labels, digests, 0.2, "validation 0")
    both = len(set(other.held) & set(parts.held))
    assert 30 < both < 90  # the choices are independent: 60 expected
    assert 0 <= drawn_for("a", "test") < 1 and drawn_for("a", "test") != drawn_for("a", "validation 0")


def test_small_classes_keep_an_image_in_every_split() -> None:
    labels = [label for label in range(200) for _ in range(3)]
    digests = [str(place) for place in range(600)]
    test = hold_out_by_content(labels, digests, 0.2, "test", keep=2)
    rest = [place for place in range(600) if place not in set(test.held)]
    validation = hold_out_by_content([labels[place] for place in rest], [digests[place] for place in rest], 0.1,
                                     "validation 0")
    assert test.without == validation.without == []
    assert {labels[place] for place in test.held} == {labels[rest[place]] for place in validation.held} == set(range(200))
    with pytest.raises(UserError, match="no class has two different images"):
        hold_out_by_content([0, 1, 1], ["a", "b", "b"], 0.5, "test")


def test_a_flat_folder_with_copies_and_rare_classes(tmp_path: Path) -> None:
    root = draw_folder(tmp_path, 4, 30, splits=("set",)) / "set"
    rare, pair = root / "class_002", root / "class_003"
    for path in sorted(rare.iterdir())[1:]:
        path.unlink()
    for path in sorted(pair.iterdir())[2:]:
        path.unlink()
    (root / "class_001" / "wrong.png").write_bytes((root / "class_000" / "4.png").read_bytes())
    for number in range(3):  # copies under other names
        (root / "class_000" / f"copy {number}.png").write_bytes((root / "class_000" / f"{number}.png").read_bytes())
    request = Request(name="image_folder", root=root, preprocessing={"resize": 12, "crop": 12})
    before = load(request)
    said = "\n".join(before.warnings)
    assert "1 image is in more than one class, to the byte, such as" in said and "wrong.png" in said
    assert f"test has none of them: class_002 ({rare})" in said
    assert f"2 of 4 classes have too few different images, which stay in train, so validation has none of them: " \
           f"class_002, class_003 ({rare})" in said
    assert "data.test_fraction 0.2" in said
    for number, path in enumerate(sorted(root.glob("class_000/*"), reverse=True)):  # names that turn the order about
        path.rename(path.with_name(f"renamed {number:03d}.png"))
    after = load(request)
    assert after.card == before.card
    for seed in (1, 2):
        other = load(Request(name="flat_folder", root=root, seed=seed, preprocessing={"resize": 12, "crop": 12})).card
        assert other.content["test"] == before.card.content["test"]
        assert other.content["validation"] != before.card.content["validation"]
