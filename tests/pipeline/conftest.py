"""A pipeline that takes seconds: four colours to tell apart, networks of a few channels, and its finished run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from compress.pipeline.config import resolve
from compress.pipeline.run import run_pipeline
from tests.helpers.folders import draw_folder
from tests.helpers.sharing import shared_folder

RECIPE = """# the stages of slim_resnet18_digits on drawn images
data: {{name: image_folder, root: {images}, resize: 8, crop: 8, validation_fraction: 0.25}}
threads: 1
stages:
  - teacher: {{model: slim_resnet18, options: {{width: 4, stem: small}}, floor: 0, train: {train}}}
  - distill: {{model: slim_resnet18, options: {{width: 8, stem: small}}, train: {train}}}
  - prune: {{ratio: 0.4, multiple: 4, allow_slower: true}}
  - finetune: {{teacher: true, train: {train}}}
  - quantize_dynamic: {{arithmetic: int8}}
  - package
  - evaluate
"""
TRAIN = "{epochs: 4, batch_size: 6, optimizer: adam, lr: 0.01, augment: [crop], padding: 1}"


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe; its settings can be overridden as those of a packaged one."""
    def draw(folder: Path) -> None:
        draw_folder(folder, classes=4, images=16, size=8)

    images = shared_folder(tmp_path_factory, "tiny_images", draw)

    def write(folder: Path) -> None:
        (folder / "tiny.yaml").write_text(RECIPE.format(images=images, train=TRAIN))

    return shared_folder(tmp_path_factory, "tiny_recipe", write) / "tiny.yaml"


@pytest.fixture(scope="session")
def tiny_run(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the recipe's finished run, which nothing interrupted. Copy the folder before you change it."""
    def run(runs: Path) -> None:
        run_pipeline(resolve(str(tiny_recipe), [f"run_dir={runs}"]), Console(file=io.StringIO()))

    return shared_folder(tmp_path_factory, "tiny_runs", run) / "tiny"


@pytest.fixture
def four_stages(tiny_recipe: Path, tmp_path: Path) -> Path:
    """The recipe up to its last training."""
    recipe = tmp_path / "four_stages.yaml"
    recipe.write_text(tiny_recipe.read_text().split("  - quantize_dynamic")[0])
    return recipe


@pytest.fixture
def two_stages(tiny_recipe: Path, tmp_path: Path) -> Path:
    """The recipe's teacher and student."""
    recipe = tmp_path / "two_stages.yaml"
    recipe.write_text(tiny_recipe.read_text().split("  - prune")[0])
    return recipe


@pytest.fixture
def alone(tiny_recipe: Path, tmp_path: Path) -> Path:
    """The recipe's teacher and nothing behind it."""
    recipe = tmp_path / "alone.yaml"
    recipe.write_text(tiny_recipe.read_text().split("  - distill")[0])
    return recipe
