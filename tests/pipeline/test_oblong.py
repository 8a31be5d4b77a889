"""Images that are not square, through the whole pipeline: loaders, augmentation, networks, export, package, evaluator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.training.data import shrunk_size
from compress.training.flags import resolve_training
from loaders.catalog import load
from loaders.request import Request
from loaders.splits import write_image_folder
from metadata.errors import UserError
from metadata.schemas import Preprocessing
from tests.helpers.commands import Compress, assert_one_line_error
from tests.helpers.folders import draw_folder

OBLONG = """
data: {{name: image_folder, root: {root}, image_size: [24, 40], resize: [26, 44], validation_fraction: 0.25}}
threads: 1
stages:
  - teacher: {{model: slim_resnet18, options: {{width: 8, stem: small}}, train: {{epochs: 6, batch_size: 8, lr: 0.05,
             augment: [crop, flip, cutout, affine]}}}}
  - distill: {{model: slim_resnet18, options: {{width: 8, stem: small}}, train: {{epochs: 6, batch_size: 8, lr: 0.05,
             size_schedule: {{0: 16, 2: 24}}}}}}
  - prune: {{ratio: 0.4}}
  - finetune: {{train: {{epochs: 3, batch_size: 8, lr: 0.02}}}}
  - {quantize}
  - package
  - evaluate
"""


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["quantize_dynamic", "export\n  - quantize_static"], ids=["dynamic", "static"])
def test_the_whole_pipeline_on_images_that_are_not_square(quantize: str, tmp_path: Path, compress: Compress) -> None:
    root = draw_folder(tmp_path / "set", 3, 12, size=(30, 48))
    recipe = tmp_path / "oblong.yaml"
    recipe.write_text("# images that are not square" + OBLONG.format(root=root, quantize=quantize))
    done = compress("run", recipe, f"run_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    stated = json.loads((tmp_path / "oblong" / "submission" / "model_metadata.json").read_text())
    assert stated["input_shape"] == [3, 24, 40]
    assert (stated["preprocessing"]["crop"], stated["preprocessing"]["resize"]) == ([24, 40], [26, 44])
    results = json.loads((tmp_path / "oblong" / "results.json").read_text())
    assert results["accuracy"] > 80  # the classes differ in colour


def test_sizes_of_two_sides_are_read_everywhere(tmp_path: Path, compress: Compress) -> None:
    root = draw_folder(tmp_path / "set", 2, 4, size=(30, 48))
    splits = load(Request(name="image_folder", root=root, image_size=(24, 40)))
    assert splits.card.input_shape == (3, 24, 40)
    assert splits.card.preprocessing.resize == (27, 46)  # 256 to 224, as of square images
    assert splits.train.images.batch(torch.arange(1)).shape == (1, 3, 27, 46)  # room for the random crop
    assert Preprocessing(resize=[32, 32], crop=[28.0, 28]).model_dump()["resize"] == 32  # type: ignore[arg-type]
    assert resolve_training(["--image_size", "[24, 40]"]).image_size == (24, 40)
    for wrong in ("[24]", "[24,40,3]", "[]", "24x40", "0", "[24,-1]", ".inf", "true"):
        assert_one_line_error(compress("plan", "slim_resnet18_digits", f"data.image_size={wrong}"), "data.image_size",
                              "expected")
    with pytest.raises(UserError, match=r"data\.image_size \[24, 40\], data\.crop 24: both set"):
        load(Request(name="image_folder", root=root, image_size=(24, 40), preprocessing={"crop": 24}))
    with pytest.raises(UserError, match=r"the image is 48x30, smaller than the crop of 40x50"):
        load(Request(name="image_folder", root=root, preprocessing={"resize": None, "crop": [50, 40]}))
    assert shrunk_size((24, 40), 12) == (12, 20) and shrunk_size((32, 32), 24) == (24, 24)


def test_arrays_become_oblong_as_their_files_would(tmp_path: Path) -> None:
    """Digits are squares in memory: covered, then cropped, to the same pixels as image files of the same pictures."""
    squares, oblong = load(Request(name="digits")), load(Request(name="digits", image_size=(6, 11)))
    assert oblong.card.input_shape == (3, 6, 11)
    write_image_folder(squares.open_test(), squares.card.class_names, tmp_path / "train")
    (tmp_path / "test").symlink_to(tmp_path / "train")
    files = load(Request(name="image_folder", root=tmp_path, image_size=(6, 11), validation_fraction=0,
                         preprocessing={"resize": [6, 11]})).open_test()
    test = oblong.open_test()
    order = test.labels.argsort(stable=True)
    assert torch.equal(files.images.batch(torch.arange(len(files))), test.images.batch(order))
