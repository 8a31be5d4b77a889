"""Where a teacher's weights come from: a checkpoint's classes by name, and what a zoo's weights were trained on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from compress.pipeline.config import resolve
from compress.pipeline.run import run_pipeline
from compress.training.flags import resolve_training
from compress.training.run import prepare_training
from compress.training.trackers import Tracker
from architectures.pretrained import pretrained_input, pretrained_warning
from architectures.zoo import make
from loaders.request import FileHashes, Request
from loaders.splits import preprocessing_for
from metadata.errors import UserError
from metadata.schemas import Preprocessing
from tests.helpers.commands import Compress, assert_one_line_error

CLASSES = [f"class_{number:03d}" for number in range(4)]


def permuted(weights: dict[str, Any], order: list[int]) -> dict[str, Any]:
    return {name: tensor[order] if name.startswith("fc.") else tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("spelled", [str, lambda name: name.upper().replace("_", "-")], ids=["as-it-is", "other-spelling"])
def test_classes_in_another_order_are_put_into_the_datas_by_name(spelled: Any, alone: Path, tiny_run: Path, tmp_path: Path,
                                                                 compress: Compress) -> None:
    weights = torch.load(tiny_run / "01-teacher" / "weights.pth", weights_only=True)
    order = [2, 0, 3, 1]
    torch.save({"model": permuted(weights, order), "class_to_idx": {spelled(CLASSES[number]): place for place, number
                                                                    in enumerate(order)}}, tmp_path / "other.pth")
    overrides = [f"teacher.checkpoint={tmp_path / 'other.pth'}", "teacher.train.epochs=0", f"run_dir={tmp_path}"]
    done = compress("plan", alone, *overrides)
    assert done.returncode == 0 and "its classes are in another order and are put into the data's, by name" in done.stdout
    outcome = run_pipeline(resolve(str(alone), overrides), Console(file=io.StringIO()))
    taken = torch.load(outcome.folder / "01-teacher" / "weights.pth", weights_only=True)
    assert all(torch.equal(taken[name], weights[name]) for name in weights) and not outcome.warnings


def test_other_classes_are_warned_of_and_the_datas_own_order_is_silent(alone: Path, tiny_run: Path, tmp_path: Path,
                                                                       compress: Compress) -> None:
    weights = torch.load(tiny_run / "01-teacher" / "weights.pth", weights_only=True)
    common = ["plan", alone, "teacher.train.epochs=0", f"teacher.checkpoint={tmp_path / 'named.pth'}"]
    torch.save({"model": weights, "classes": CLASSES}, tmp_path / "named.pth")
    done = compress(*common)
    assert done.returncode == 0 and "class_000" not in done.stdout and "warning" not in done.stdout
    torch.save({"model": weights, "classes": ["cat", "dog", "emu", "fox"]}, tmp_path / "named.pth")
    done = compress(*common)
    assert done.returncode == 0 and "warning" in done.stdout
    assert "it names other classes than the data ('cat' where the data has 'class_000')" in " ".join(done.stdout.split())


def test_a_last_layer_that_cannot_be_reordered_is_refused_before_the_run(alone: Path, tmp_path: Path, compress: Compress,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import Tensor, nn

    import architectures.families.slim_resnet as family

    class Odd(nn.Module):
        """Logits that are moved on by one place behind the last layer."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.mean((2, 3))).cumsum(1)

    monkeypatch.setitem(family.MODELS, "odd", lambda num_classes: Odd())
    torch.save({"model": Odd().state_dict(), "classes": CLASSES[::-1]}, tmp_path / "odd.pth")
    done = compress("plan", alone, "teacher.model=odd", "teacher.options={}", "teacher.train.epochs=0",
                    f"teacher.checkpoint={tmp_path / 'odd.pth'}")
    assert_one_line_error(done, "odd.pth", "its classes are the data's in another order", "cannot be reordered")


# ------------------------------------------------------------------------------------------------- the zoos' own images

IMAGENET = Preprocessing()


@pytest.mark.parametrize(("name", "options", "given", "settings"), [
    ("timm:vit_tiny_patch16_224", {}, IMAGENET,
     "data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5] data.interpolation=bicubic data.resize=248"),
    ("timm:vit_tiny_patch16_224", {"img_size": 32}, Preprocessing(resize=32, crop=32),
     "data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5] data.interpolation=bicubic"),
    ("resnet18.a1_in1k", {}, IMAGENET, "data.interpolation=bicubic data.resize=235"),
    ("timm:resnet18.tv_in1k", {}, IMAGENET, None),
    ("resnet18", {}, IMAGENET, None),
    ("torchvision:efficientnet_b0", {}, IMAGENET, "data.interpolation=bicubic"),
    ("inception_v3", {}, IMAGENET, "data.image_size=299"),
    ("efficientnet_b1", {}, Preprocessing(interpolation="bicubic"), "data.interpolation=bilinear data.image_size=240 "
                                                                    "data.resize=255"),
    ("resnet18", {}, Preprocessing(resize=32, crop=32, mean=[0.4914, 0.4822, 0.4465], std=[0.2470, 0.2435, 0.2616]),
     "data.mean=[0.485,0.456,0.406] data.std=[0.229,0.224,0.225] data.image_size=224"),
    ("timm:resnet18", {"in_chans": 1}, Preprocessing(mode="L", resize=32, crop=32, mean=[0.5], std=[0.5]),
     "data.interpolation=bicubic data.image_size=224")])
def test_the_images_that_pretrained_weights_expect(name: str, options: dict[str, Any], given: Preprocessing,
                                                   settings: str | None) -> None:
    text = pretrained_warning(name, options, given, lambda key: f"data.{key}=")
    assert text is None if settings is None else text is not None and text.endswith(f"pass {settings}")


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "resnet18.a1_in1k", "inception_v3", "efficientnet_b1"])
def test_the_settings_that_a_warning_names_silence_it(name: str) -> None:
    changes = pretrained_input(name, {}).overrides(IMAGENET)
    request = Request(name="image_folder", image_size=changes.pop("image_size", None), preprocessing=changes)
    assert pretrained_warning(name, {}, preprocessing_for(request, IMAGENET.model_dump()), str) is None


def test_plan_warns_of_them(alone: Path, compress: Compress) -> None:
    done = compress("plan", alone, "teacher.model=timm:vit_tiny_patch16_224", "teacher.pretrained=true",
                    "teacher.options={img_size: 8, patch_size: 4}", "teacher.train.epochs=1")
    assert done.returncode == 0, done.stderr
    assert ("warning: the pretrained weights of timm:vit_tiny_patch16_224 were trained on other images than the data "
            "gives; pass data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5] data.interpolation=bicubic\n") in done.stdout


def test_train_warns_of_them_and_takes_them(tiny_recipe: Path, tmp_path: Path) -> None:
    images = yaml.safe_load(tiny_recipe.read_text())["data"]["root"]
    weights = tmp_path / "weights.pth"  # where timm looks, instead of in the network
    torch.save(make("timm:test_resnet", num_classes=1000).state_dict(), weights)
    common = ["--dataset=image_folder", f"--data_root={images}", "--pretrained", "--model_name=timm:test_resnet.r160_in1k",
              f"--model_options={{pretrained_cfg_overlay: {{file: {weights}}}}}", "--threads=1"]
    told = []
    for flags in ([], ["--mean=[0.5,0.5,0.5]", "--std=[0.5,0.5,0.5]", "--image_size=160", "--resize=168"]):
        output = io.StringIO()
        splits, _, _ = prepare_training(resolve_training([*common, *flags]), Tracker(Console(file=output, width=500)),
                                        FileHashes())
        told.append(output.getvalue())
    assert "warning: the pretrained weights of timm:test_resnet.r160_in1k" in told[0]
    assert told[0].endswith("pass --mean=[0.5,0.5,0.5] --std=[0.5,0.5,0.5] --image_size=160 --resize=168\n")
    assert "warning" not in told[1] and splits.card.input_shape == (3, 160, 160)
    assert splits.card.preprocessing.resize == 168 and splits.card.preprocessing.mean == [0.5] * 3


def test_the_classes_of_pretrained_weights_are_their_own(alone: Path, compress: Compress) -> None:
    common = ["plan", alone, "teacher.options={}", "teacher.pretrained=true", "teacher.train.epochs=0", "data.resize=32",
              "data.crop=32"]
    assert_one_line_error(compress(*common, "teacher.model=timm:resnetv2_50x1_bit.goog_in21k"), "have 21843 classes",
                          "the data has 4")
    assert_one_line_error(compress(*common, "teacher.model=resnet18"), "have 1000 classes")
    assert_one_line_error(compress(*common, "teacher.model=timm:resnet26t_none"), "unknown")
    assert_one_line_error(compress(*common, "teacher.model=slim_resnet18"), "no pretrained weights")
    assert_one_line_error(compress(*common, "teacher.model=timm:resnet10t.a1_in1k"), "no weights of the tag 'a1_in1k'",
                          "tags: c3_in1k")


def test_tagged_names_of_timm_are_names() -> None:
    for name in ("timm:resnet18.a1_in1k", "resnet18.a1_in1k"):
        assert sum(parameter.numel() for parameter in make(name, num_classes=1000).parameters()) == 11_689_512
    with pytest.raises(UserError, match=r"no weights of the tag 'a1_in1'.*did you mean 'a1_in1k'"):
        make("resnet18.a1_in1", num_classes=3)
    with pytest.raises(UserError, match="did you mean"):
        make("resnet81.a1_in1k", num_classes=3)
