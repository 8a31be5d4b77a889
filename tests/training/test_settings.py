"""The settings of a training: one default each, every other name of a setting, and what is refused."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from compress.pipeline.config import resolve
from compress.pipeline.stage import stage_class
from compress.settings import RECIPES, load_yaml, read_mapping, recipe_names
from compress.studies.mnist_challenge import CHALLENGE_MODELS
from compress.studies.scaling.plans import Point, TRAINING
from compress.training.data import augmentations
from compress.training.flags import TRAINING_RECIPES, TrainingRun, resolve_training, validated
from compress.training.optimizers import OPTIMIZERS
from compress.training.precision import autocast_dtype, usable
from compress.training.schedules import SCHEDULES
from compress.training.settings import Augmentation, TrainingSettings
from loaders.augment import AUGMENTATIONS
from loaders.catalog import load
from loaders.request import Request
from metadata.errors import UserError
from metadata.records import DatasetCard
from metadata.schemas import Preprocessing

OTHER_NAMES: list[tuple[str, Any, str, Any]] = [
    ("num_epochs", 3, "epochs", 3), ("scheduler", "StepLR", "schedule", "step"),
    ("bs_schedule", "0:64,5:128", "batch_size_schedule", {0: 64, 5: 128}), ("use_amp", True, "precision", "mixed"),
    ("use_amp", 1, "precision", "mixed"),     ("use_amp", False, "precision", "float32")]


@pytest.mark.parametrize(("name", "value", "key", "expected"), OTHER_NAMES)
def test_other_names_of_a_setting(name: str, value: Any, key: str, expected: Any) -> None:
    settings = TrainingSettings.model_validate({name: value})
    assert getattr(settings, key) == expected
    assert settings == TrainingSettings.model_validate(settings.model_dump(mode="json"))
    assert TrainingSettings.merged({name: value}, {key: 1}) == {key: 1}
    assert TrainingSettings.merged({key: 1}, {name: value}) == {name: value}


def test_flags_change_a_recipe_whatever_name_either_uses(tmp_path: Any) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("num_epochs: 7\nval_fraction: 0.2\nuse_amp: true\n")
    assert resolve_training(["--config", str(file)]).precision == "mixed"
    changed = resolve_training(["--config", str(file), "--epochs", "2", "--val_fraction=0.3", "--amp_dtype", "float16"])
    assert (changed.epochs, changed.validation_fraction, changed.precision) == (2, 0.3, "float16")
    assert resolve_training(["--config", str(file), "--precision", "float32", "--num_epochs", "3"]).precision == "float32"
    digits = resolve_training(["--config", "digits", "--num_epochs", "2", "--use_amp"])
    assert (digits.epochs, digits.precision) == (2, "mixed")
    assert resolve_training(["--amp_dtype", "float16"]).precision == "auto"  # without use_amp


def test_overrides_of_a_pipeline_change_a_recipe_whatever_name_either_uses() -> None:
    def teacher(*overrides: str) -> TrainingSettings:
        content, = (stage["teacher"] for stage in resolve("slim_resnet18_digits", overrides).stages if "teacher" in stage)
        return TrainingSettings.model_validate(content["train"])

    assert teacher("teacher.train.num_epochs=3", "teacher.train.scheduler=linear") == teacher(
        "teacher.train.epochs=3", "teacher.train.schedule=linear")
    assert teacher("teacher.train.precision=float32", "teacher.train.use_amp=true").precision == "mixed"


@pytest.mark.parametrize(("content", "message"), [
    ({"num_epochs": 3, "epochs": 3}, "num_epochs and epochs are the same setting"),
    ({"use_amp": True, "precision": "float32"}, "use_amp and precision are the same setting"),
    ({"use_amp": "perhaps"}, "use_amp: expected true or false"), ({"use_amp": None}, "use_amp: expected true or false"),
    ({"amp_dtype": "fp16"}, "amp_dtype: expected auto, float16 or bfloat16"),
    ({"use_amp": True, "amp_dtype": "float8"}, "amp_dtype: expected auto, float16 or bfloat16"),
    ({"measure_every": 2}, "set monitor train"), ({"lr": 0}, "lr"), ({"epoch": 3}, "epoch"),
    ({"batch_size_schedule": "0:64,0:32"}, "twice")])
def test_what_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainingSettings.model_validate(content)


def test_an_unknown_key_is_refused_with_the_closest_match() -> None:
    with pytest.raises(UserError, match="unknown key 'num_epoch'; did you mean 'num_epochs'"):
        validated({"num_epoch": 3}, "mine")
    with pytest.raises(UserError, match="num_epochs: expected 1 or more"):
        validated({"num_epochs": 0}, "mine")


def test_stages_and_the_command_have_the_same_defaults() -> None:
    run = TrainingRun()
    for key, info in TrainingSettings.model_fields.items():
        assert getattr(run, key) == info.default, key
    for name in ("teacher", "distill", "finetune", "prune"):
        assert stage_class(name).model_fields["train"].annotation is TrainingSettings
    assert run.training == TrainingSettings() and type(run.training) is TrainingSettings


def test_weights_that_are_kept() -> None:
    assert not TrainingSettings().keeps_best and TrainingSettings(early_patience=3).keeps_best
    assert TrainingSettings(keep="best").keeps_best and not TrainingSettings(early_patience=3, keep="last").keeps_best


@pytest.mark.parametrize("name", recipe_names(TRAINING_RECIPES))
def test_recipes_of_the_command_write_out_what_their_results_depend_on(name: str) -> None:
    content = read_mapping(name, TRAINING_RECIPES, "")[1]
    assert {"warmup", "keep", "precision"} <= content.keys()
    assert validated(content, name).precision == "float32"


@pytest.mark.parametrize("name", [name for name in recipe_names() if "digits" in name])
def test_pipelines_on_digits_never_mirror(name: str) -> None:
    stages = load_yaml((RECIPES / f"{name}.yaml").read_text())["stages"]
    trained = [settings["train"] for stage in stages if isinstance(stage, dict) for settings in stage.values()
               if "train" in settings]
    assert trained and all(settings["augment"] == ["crop"] for settings in trained)


def test_a_points_identity_and_training_are_those_of_earlier_studies() -> None:
    assert Point().id == "w32-d2-D50000-e100-s0-be6b77b5d7"
    point = Point(num_epochs=7, batch_size=64, test_freq=3)
    assert (point.training.epochs, point.training.batch_size, point.training.measurements()) == (7, 64, 3)
    assert TRAINING.warmup == 0 and TRAINING.monitor == "train" and not TRAINING.keeps_best and not TRAINING.drop_last


def test_choices_are_what_there_is() -> None:
    def choices(key: str) -> set[str]:
        return set(get_args(TrainingSettings.model_fields[key].annotation))

    assert set(get_args(Augmentation)) == set(AUGMENTATIONS)
    assert choices("optimizer") == {*OPTIMIZERS, "sam"} and choices("sam_base") == set(OPTIMIZERS)
    assert choices("schedule") == {*SCHEDULES, "one_cycle", "plateau"}


def test_the_card_says_whether_images_are_mirrored() -> None:
    def card(name: str) -> DatasetCard:
        return DatasetCard(name=name, class_names=["0", "1"], input_shape=(1, 8, 8), preprocessing=Preprocessing())

    for name, expected in {"digits": ["crop"], "mnist": ["crop"], "fashion_mnist": ["crop", "flip"],
                           "image_folder": ["crop", "flip"]}.items():
        assert augmentations(TrainingSettings(), card(name)) == expected
        assert augmentations(TrainingSettings(augment=["flip"]), card(name)) == ["flip"]
        assert augmentations(TrainingSettings(augment=[]), card(name)) == []
    assert load(Request(name="digits")).card.flip is False
    own = card("image_folder").model_copy(update={"flip": False})
    assert augmentations(TrainingSettings(), own) == ["crop"]
    assert DatasetCard.model_validate(own.model_dump()) == own


def test_the_challenge_writes_out_its_schedule() -> None:
    for entry in CHALLENGE_MODELS.values():
        assert {"optimizer", "lr", "schedule", "warmup", "augment", "weight_decay"} <= entry.settings.keys()


def test_precision() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    warnings: list[str] = []
    assert autocast_dtype("auto", cpu) is None and autocast_dtype("auto", cuda) is torch.bfloat16
    assert autocast_dtype("float32", cuda) is None and autocast_dtype("float16", cpu) is torch.float16
    with pytest.raises(UserError, match="is for CUDA"):
        usable(TrainingSettings(precision="float16"), cpu, warnings.append)
    for settings in (TrainingSettings(), TrainingSettings(precision="float32")):
        assert usable(settings, cpu, warnings.append) is settings
    assert usable(TrainingSettings(precision="float16"), cuda, warnings.append).precision == "float16" and not warnings
    mixed = usable(TrainingSettings(precision="mixed"), cpu, warnings.append)
    assert (mixed.precision == "float32") == bool(warnings) == (autocast_dtype("mixed", cpu) is None)
