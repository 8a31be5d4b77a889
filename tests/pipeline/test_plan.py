"""What a plan refuses before anything runs: each mistake gets one line, and nothing is written."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from architectures.zoo import make
from compress.pipeline.config import resolve
from compress.pipeline.plan import make_plan
from compress.pipeline.run import run_pipeline
from compress.training.trackers import Tracker
from metadata.errors import UserError
from tests.helpers.folders import draw_folder
from tests.helpers.commands import Compress, SMALL, assert_one_line_error


NARROW = ["teacher.options.width=8", "distill.options.width=8", "threads=1"]
SHORT = "{model: scaling_cnn, options: {width: 16, depth: 1}}"
NETWORKS = f"{{teacher: {SHORT}}}, {{distill: {SHORT}}}"
FEW_LAYERS = [f"{stage}.{setting}" for stage in ("teacher", "distill")
              for setting in ("model=scaling_cnn", "options={width: 16, depth: 1}")] + ["threads=1"]


@pytest.mark.parametrize(("arguments", "parts"), [
    (["slim_resnet81_digits"], ["did you mean 'slim_resnet18_digits'"]),
    (["nowhere.yaml"], ["no such file"]),
    (["slim_resnet18_digits", "prune.ration=0.3"], ["unknown key 'ration'", "did you mean 'ratio'"]),
    (["slim_resnet18_digits", "teacher.train.epoch=3"], ["unknown key 'train.epoch'", "did you mean 'epochs'"]),
    (["slim_resnet18_digits", "data.nam=mnist"], ["unknown key 'data.nam'", "did you mean 'name'"]),
    (["slim_resnet18_digits", "prun.ratio=0.3"], ["did you mean 'prune'"]),
    (["slim_resnet18_digits", "prune.ratio"], ["expected key=value"]),
    (["slim_resnet18_digits", "prune.ratio=1.5"], ["ratio", "less than 1"]),
    (["slim_resnet18_digits", "prune.ratio=0.97"], ["leaves none of its"]),
    (["slim_resnet18_digits", "prune.ratio=0.01"], ["pruning removed nothing"]),
    (["slim_resnet18_digits", "prune.criterion=l3"], ["criterion"]),
    (["slim_resnet18_digits", "distill.model=vit_b_16", "distill.options={}"], ["layer", "can still be used as a teacher"]),
    (["slim_resnet18_digits", "teacher.model=resnet19"], ["did you mean 'resnet18'"]),
    (["slim_resnet18_digits", "teacher.model=torchvision:alexnet", "teacher.options={}"], ["does not take images"]),
    (["slim_resnet18_digits", "teacher.options.in_channels=1"], ["does not take images of shape [3, 8, 8]"]),
    (["slim_resnet18_digits", "distill.model=resnet18", "distill.options={groups: 2}"], ["resnet18"]),
    (["slim_resnet18_digits", "seed=100000000000000000000"], ["seed"]),
    (["slim_resnet18_digits", "data.mean=[0.5]"], ["needs 3 values"]),
    (["slim_resnet18_digits", "data.resize=16"], ["data.resize"]),
    (["slim_resnet18_digits", "teacher.checkpoint=/nowhere.pth"], ["/nowhere.pth", "no such file"]),
    (["slim_resnet18_digits", "teacher.train.epochs=0"], ["the teacher would be untrained"]),
    (["slim_resnet18_digits", "quantize_dynamic.exclude=[stem]"], ["'stem' is no Conv2d or Linear"]),
    (["slim_resnet18_digits", "evaluate.baselines=mine"], ["evaluate.baselines 'mine': unknown"]),
    (["slim_resnet18_digits", "data.name=digit"], ["did you mean 'digits'"]),
    (["slim_resnet18_digits", "name=../up"], ["name"]),
    (["slim_resnet18_digits", "device=cuda"], ["no CUDA device"]),
    (["slim_resnet18_cifar10"], ["data.root is not set"]),
    (["slim_resnet18_100", "data.root=/nowhere"], ["/nowhere/train"]),
], ids=lambda value: " ".join(value)[:60])
def test_mistakes_get_one_line_and_leave_nothing(arguments: list[str], parts: list[str], compress: Compress,
                                                 tmp_path: Path) -> None:
    if arguments[-1] == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    few = FEW_LAYERS if arguments[0] == "slim_resnet18_digits" else []  # none of these mistakes depends on the networks
    done = compress("run", arguments[0], *few, *arguments[1:], f"run_dir={tmp_path / 'runs'}")
    assert_one_line_error(done, *parts)
    assert list(tmp_path.iterdir()) == []


def test_stages_that_do_not_chain(compress: Compress, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: {name: digits}\nstages: [teacher, prune, quantise_dynamic]\n")
    done = compress("plan", recipe)
    assert_one_line_error(done, "stage prune takes a student, but the stage before it gives a teacher",
                          "did you mean 'quantize_dynamic'")
    recipe.write_text("stages: [teacher\n")
    assert_one_line_error(compress("plan", recipe), "not valid YAML")
    recipe.write_text("stages: {teacher: 1}\n")
    assert_one_line_error(compress("plan", recipe), "list of stages")
    recipe.write_text("stages: []\n")
    assert_one_line_error(compress("plan", recipe), "stages")
    recipe.write_text("stages: [distill]\n")
    assert_one_line_error(compress("plan", recipe), "stage distill takes a teacher")


@pytest.mark.parametrize("stage", ["prune", "finetune", "quantize_dynamic"])
def test_stages_that_need_float_weights_are_refused_behind_int8(stage: str, compress: Compress, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"data: {{name: digits}}\nstages: [{NETWORKS}, quantize_dynamic, {stage}, package]\n")
    assert_one_line_error(compress("plan", recipe), f"stage {stage}: the model is int8 by then")


@pytest.mark.slow
def test_steps_that_round_back_are_left_out_in_the_plan_and_in_the_run(tiny_recipe: Path, tmp_path: Path) -> None:
    """Widths 8 to 64 in multiples of 8: a step of 0.05 removes nothing, the whole ratio of 0.2 does."""
    recipe = tmp_path / "steps.yaml"
    recipe.write_text(tiny_recipe.read_text().split("  - finetune")[0])
    config = resolve(str(recipe), ["prune.ratio=0.2", "prune.multiple=8", "prune.steps=4", "prune.train.max_steps=1",
                                   "teacher.train.max_steps=1", "distill.train.max_steps=1",
                                   f"run_dir={tmp_path}"])
    drawn = make_plan(config, Tracker(Console(file=io.StringIO()))).sketch.lines[2]
    assert "in 4 steps with 2 trainings" in drawn
    outcome = run_pipeline(config, Console(file=io.StringIO()))
    assert f"-> {outcome.rows[-1].parameters:,} parameters" in drawn
    too_little = resolve(str(recipe), ["prune.ratio=0.02", "prune.multiple=8", "prune.steps=4"])
    with pytest.raises(UserError, match="pruning removed nothing"):
        make_plan(too_little, Tracker(Console(file=io.StringIO())))


def test_a_stage_that_occurs_twice_is_addressed_by_its_place(compress: Compress, tmp_path: Path) -> None:
    recipe = tmp_path / "twice.yaml"
    recipe.write_text(f"data: {{name: digits}}\nstages: [{NETWORKS}, finetune, finetune, package]\n")
    assert_one_line_error(compress("plan", recipe, "finetune.train.epochs=3"), "occurs 2 times", "finetune#1.train")
    done = compress("plan", recipe, "finetune#2.train.epochs=3")
    assert done.returncode == 0 and "3 epochs" in done.stdout and "5 epochs" in done.stdout
    assert_one_line_error(compress("plan", recipe, "finetune#3.train.epochs=3"), "there is no #3")


def test_teacher_with_other_classes_is_refused(small_run: Path, compress: Compress, tmp_path: Path) -> None:
    from architectures.zoo import make
    path = tmp_path / "teacher.pth"
    model = make("slim_resnet18", num_classes=12, width=8, stem="small")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()}}, path)
    common = ["slim_resnet18_digits", *NARROW, "teacher.train.epochs=0", f"teacher.checkpoint={path}"]
    done = compress("plan", *common)
    assert_one_line_error(done, "the teacher has 12 classes, the data has 10")
    good = small_run / "01-teacher" / "weights.pth"
    done = compress("plan", *common[:-1], f"teacher.checkpoint={good}")
    assert done.returncode == 0 and "from checkpoint" in done.stdout
    (tmp_path / "bad.pth").write_bytes(good.read_bytes()[:5000])
    done = compress("plan", *common[:-1], f"teacher.checkpoint={tmp_path / 'bad.pth'}")
    assert_one_line_error(done, "bad.pth", "cut short")


def test_a_teacher_without_class_names_for_numbered_classes(tmp_path: Path) -> None:
    """torchvision's folders sort 1, 10, 2; timm's 1, 2, 10: nothing in the file tells which it was."""
    draw_folder(tmp_path / "images", classes=11, images=4, size=8)
    for split in (tmp_path / "images").iterdir():
        for number, folder in enumerate(sorted(split.iterdir()), 1):
            folder.rename(split / str(number))
    torch.save(make("slim_resnet18", num_classes=11, width=4, stem="small").state_dict(), tmp_path / "teacher.pth")
    (tmp_path / "recipe.yaml").write_text(f"""
data: {{name: image_folder, root: {tmp_path / 'images'}, resize: 8, crop: 8, validation_fraction: 0.25}}
stages: [teacher: {{model: slim_resnet18, options: {{width: 4, stem: small}}, checkpoint: {tmp_path / 'teacher.pth'},
                    train: {{epochs: 0}}}}]
""")
    plan = make_plan(resolve(str(tmp_path / "recipe.yaml")), Tracker(Console(file=io.StringIO())))
    assert plan.splits.card.class_names[:3] == ["1", "10", "11"]
    assert "sorted as text (1, 10, 11, ...)" in plan.sketch.warnings[0] and "(1, 2, 3, ...)" in plan.sketch.warnings[0]


def test_safetensors_teacher(small_run: Path, compress: Compress, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    weights = torch.load(small_run / "01-teacher" / "weights.pth", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "teacher.safetensors")
    common = ["plan", "slim_resnet18_digits", *NARROW, "teacher.train.epochs=0"]
    assert compress(*common, f"teacher.checkpoint={tmp_path / 'teacher.safetensors'}").returncode == 0
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    assert_one_line_error(compress(*common, f"teacher.checkpoint={tmp_path / 'bad.safetensors'}"),
                          "not a safetensors file")


def test_folder_that_is_something_else_is_left_alone(compress: Compress, tmp_path: Path) -> None:
    mine = tmp_path / "small" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("three years of work")
    done = compress("run", "slim_resnet18_digits", f"run_dir={tmp_path}", "name=small", *SMALL)
    assert_one_line_error(done, "already there and not a run's folder")
    assert mine.read_text() == "three years of work" and len(list(mine.parent.iterdir())) == 1


def test_unwritable_places(compress: Compress, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = compress("run", "slim_resnet18_digits", f"run_dir={tmp_path / 'file'}", *SMALL)
    assert_one_line_error(done, str(tmp_path / "file"))
