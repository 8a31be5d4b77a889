"""`train` continues, and reports a finished result, only on the data that it began with."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compress.training.checkpoints import Checkpoints
from compress.training.state import TrainingState
from loaders.content import trained_on
from metadata.errors import UserError
from metadata.records import DatasetCard
from metadata.schemas import StatedPreprocessing
from tests.helpers.commands import Compress, assert_one_line_error
from tests.helpers.folders import draw_folder
from tests.helpers.trainings import fit, settings, small_data


def command(folder: Path, *flags: object) -> list[object]:
    return ["train", "--dataset", "image_folder", "--data_root", folder / "set", "--image_size", "12", "--model_name",
            "simple_mlp", "--num_epochs", "3", "--threads", "1", "--batch_size", "8", "--val_fraction", "0.25", "--log_dir",
            folder / "log", *flags]


@pytest.fixture
def set_folder(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "set", 2, 8)


def test_a_finished_result_is_that_of_its_data(set_folder: Path, compress: Compress, tmp_path: Path) -> None:
    done = compress(*command(tmp_path))
    assert done.returncode == 0, done.stderr
    moved = Path(shutil.copytree(set_folder, tmp_path / "moved"))
    os.utime(set_folder / "train" / "class_000" / "0.png", (1, 1))
    for same in ([], ["--data_root", moved, "--memory_limit_gb", "1e-6", "--num_classes", "2", "--skip_unreadable"]):
        again = compress(*command(tmp_path, *same))
        assert again.returncode == 0 and "finished before" in again.stdout and "warning" not in again.stdout
    gone = compress(*command(tmp_path, "--data_root", tmp_path / "none"))
    assert gone.returncode == 0 and "the data are not compared" in " ".join(gone.stdout.split())
    shutil.copy(set_folder / "test" / "class_000" / "1.png", set_folder / "test" / "class_001" / "more.png")
    (set_folder / "train" / "class_000" / "7.png").unlink()
    other = compress(*command(tmp_path))
    assert_one_line_error(other, "the data are not those of the finished training: 1 image fewer in train (class_000), "
                          "1 image more in test (class_001)", "--log_dir OTHER")
    assert "finished before" not in other.stdout
    config = json.loads((tmp_path / "log" / "config.json").read_text())
    del config["data"]
    (tmp_path / "log" / "config.json").write_text(json.dumps(config))  # as an earlier version left it
    earlier = compress(*command(tmp_path))
    assert earlier.returncode == 0 and "earlier version" in earlier.stdout


def test_a_checkpoint_continues_on_its_data_alone(set_folder: Path, compress: Compress, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt stops the training behind its first checkpoint; then there are more images for one start."""
    save = Checkpoints.save

    def stop(files: Checkpoints, state: TrainingState) -> None:
        save(files, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", stop)
        assert compress(*command(tmp_path, "--checkpoint_seconds=0")).returncode != 0
    checkpoint = (tmp_path / "log" / "checkpoint.pth").read_bytes()
    began_with = torch.load(tmp_path / "log" / "checkpoint.pth", weights_only=True)["data"]
    added = set_folder / "train" / "class_001" / "more.png"
    shutil.copy(set_folder / "train" / "class_000" / "1.png", added)
    assert_one_line_error(compress(*command(tmp_path)),
                          "the data are not those of the checkpoint: 1 image more in train (class_001)", "--log_dir OTHER")
    assert (tmp_path / "log" / "checkpoint.pth").read_bytes() == checkpoint
    added.unlink()
    done = compress(*command(tmp_path))
    assert done.returncode == 0 and "continuing at step" in done.stdout, done.stderr
    assert trained_on(DatasetCard.model_validate_json((tmp_path / "log" / "card.json").read_text())) == began_with


def test_the_test_split_is_not_what_a_training_sees() -> None:
    card = DatasetCard(name="one", class_names=["a"], input_shape=(3, 8, 8), preprocessing=StatedPreprocessing(),
                       content={"train": {"a": "5 images 1"}, "validation": {"a": "2 images 2"},
                                "test": {"a": "3 images 3"}})
    other = {**card.content, "test": {"a": "4 images 4"}}
    assert trained_on(card) == trained_on(card.model_copy(update={"content": other}))
    other["train"] = {"a": "6 images 1"}
    assert trained_on(card) != trained_on(card.model_copy(update={"content": other}))


def test_a_checkpoint_alone_knows_its_data(tmp_path: Path) -> None:
    """Stages and studies keep no list of the data beside it."""
    data = replace(small_data(), fingerprint="one")
    path = tmp_path / "training" / "checkpoint.pth"
    fit(path, settings(epochs=1), data=data)
    fit(path, settings(epochs=1), data=data)
    with pytest.raises(UserError, match=r"checkpoint\.pth: the data are not those of the checkpoint"):
        fit(path, settings(epochs=1), data=replace(data, fingerprint="other"))
