"""What a run keeps and what it would redo, on copies of one finished run; nothing is trained here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.pipeline.config import resolve
from compress.pipeline.folder import StageStatus, remove_stages, survey, to_redo, to_remove
from compress.pipeline.identity import EARLIER_VERSION, StageIdentity, code_hash, code_of
from compress.pipeline.plan import RunPlan, make_plan
from compress.pipeline.stages import evaluate
from metadata.records import baselines
from metadata.schemas import Baselines
from tests.helpers.commands import Compress, PROJECT, assert_one_line_error
from tests.helpers.trainings import quiet

ALL = ["01-teacher", "02-distill", "03-prune", "04-finetune", "05-quantize_dynamic", "06-package", "07-evaluate"]


class Run:
    """A copy of the finished run and of its images."""

    def __init__(self, recipe: Path, finished: Path, folder: Path) -> None:
        self.recipe, self.folder = recipe, Path(shutil.copytree(finished, folder / "tiny"))
        images = resolve(str(recipe)).data.root
        assert images is not None
        self.images = Path(shutil.copytree(images, folder / "images"))

    def plan(self, *overrides: str) -> RunPlan:
        where = [f"run_dir={self.folder.parent}", f"data.root={self.images}"]
        return make_plan(resolve(str(self.recipe), [*where, *overrides]), quiet())

    def survey(self, *overrides: str) -> list[StageStatus]:
        return survey(self.folder, self.plan(*overrides))

    def redone(self, *overrides: str) -> tuple[list[str], str]:
        """Return the stages that would be redone, and the reasons in words."""
        found = self.survey(*overrides)
        return [status.name for status in found if status.state == "stale"], to_redo(found)

    def interrupt(self, stage: str, *work: str) -> None:
        """Leave the folder as if the run had been killed in a stage that had written some files."""
        for name in ALL[ALL.index(stage) + 1:]:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for path in self.folder.joinpath(stage).iterdir():
            if path.name != "stage.key":
                path.unlink()
        for name in work:
            self.folder.joinpath(stage, name).write_bytes(b"")


@pytest.fixture
def run(tiny_recipe: Path, tiny_run: Path, tmp_path: Path) -> Run:
    """A copy of the finished run, whose images are a copy too."""
    return Run(tiny_recipe, tiny_run, tmp_path)


def test_places_times_and_threads_redo_nothing(run: Run) -> None:
    """The images of the run are a copy already, with other time stamps, inodes and paths."""
    os.utime(run.images / "train" / "class_000" / "0.png", (1, 1))
    assert run.redone("data.download=true", "data.memory_limit_gb=1e-6", "data.num_classes=4", "data.skip_unreadable=true",
                      "threads=2", "device=cpu", "teacher.floor=0.2",
                      *(f"{stage}.train.checkpoint_seconds=1" for stage in ("teacher", "distill", "finetune"))) == ([], "")


@pytest.mark.parametrize(("override", "first", "reason"), [
    ("seed=3", "01-teacher", "seed: 0 -> 3"),
    ("data.validation_fraction=0.3", "01-teacher", "data.validation_fraction: 0.25 -> 0.3"),
    ("data.mean=0.5,0.5,0.5", "01-teacher", "data.preprocessing.mean: "),
    ("teacher.train.lr=2e-2", "01-teacher", "teacher.train.lr: 0.01 -> 0.02"),
    ("prune.ratio=0.6", "03-prune", "prune.ratio: 0.4 -> 0.6"),
    ("package.username=ada", "06-package", "package.username:  -> ada"),
    ("evaluate.baselines=resnet50_cifar10", "07-evaluate", "evaluate.baselines: default -> resnet50_cifar10")])
def test_a_changed_setting_redoes_its_stage_and_what_follows(override: str, first: str, reason: str, run: Run,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    known = baselines() | {"resnet50_cifar10": Baselines(size_mb=90)}
    monkeypatch.setattr(evaluate, "baselines", lambda: known)
    names, text = run.redone(override)
    assert names == ALL[ALL.index(first):] and f"{first} ({reason}" in text


def test_changed_baselines_redo_the_evaluation_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "baselines", lambda: {"default": Baselines(size_mb=60)})
    assert run.redone() == (["07-evaluate"], "07-evaluate (evaluate reads baselines.size_mb: 50.0 -> 60.0)")


def test_other_images_redo_what_was_made_from_them(run: Run) -> None:
    one, other = (run.images / "test" / f"class_00{label}" / "0.png" for label in (0, 1))
    before = other.read_bytes()
    shutil.copy(one, other)
    assert run.redone() == (["07-evaluate"], "07-evaluate (the data: other images in test (class_001))")
    other.write_bytes(before)
    assert run.redone() == ([], "")
    shutil.copy(one, run.images / "train" / "class_002" / "more.png")
    names, text = run.redone()
    assert names == ALL and text.startswith("01-teacher (the data: 1 image more in train (class_002)) and what follows it")


def test_the_file_of_a_setting_counts_by_its_bytes(run: Run, tmp_path: Path) -> None:
    def teacher(path: Path) -> StageIdentity:
        return run.plan(f"teacher.checkpoint={path}").identities[0]

    first, copied = (tmp_path / name for name in ("first.pth", "copied.pth"))
    for path in (first, copied):
        shutil.copy(run.folder / "01-teacher" / "weights.pth", path)
    before = teacher(first)
    assert teacher(copied).key == before.key
    weights = torch.load(first, weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in weights.items()}, first)
    assert teacher(first).key != before.key
    assert teacher(first).changes(before.made_from) == ["teacher.checkpoint: the file has other content"]
    assert run.plan().identities[0].changes(before.made_from) == ["teacher.checkpoint: a file -> None"]


def test_an_interrupted_stage_continues_only_what_it_began(run: Run) -> None:
    run.interrupt("02-distill", "checkpoint-student.pth")
    states = [status.state for status in run.survey("prune.ratio=0.6")]  # what has not begun may change
    assert states == ["finished", "begun", *["open"] * 5]
    assert run.redone("distill.temperature=5") == (
        ["02-distill"], "02-distill (distill.temperature: None -> 5.0; it has begun: checkpoint-student.pth)")
    run.interrupt("02-distill")
    assert [status.state for status in run.survey("distill.temperature=5")] == ["finished", *["open"] * 6]


def test_stages_that_are_gone_or_whose_input_is_gone_are_named(run: Run, tmp_path: Path) -> None:
    shutil.rmtree(run.folder / "03-prune")
    names, text = run.redone()
    assert names == ALL[3:] and text.startswith("04-finetune (03-prune before it is not finished) and what follows it")
    shorter = tmp_path / "tiny.yaml"
    shorter.write_text(run.recipe.read_text().replace("  - evaluate\n", ""))
    run.recipe = shorter
    assert to_remove(run.survey()).startswith("07-evaluate (not in the recipe any more)")


def test_a_submission_that_is_gone_is_named(run: Run) -> None:
    shutil.rmtree(run.folder / "submission")
    assert run.redone() == (ALL[5:], "06-package (its submission/ is gone) and what follows it (07-evaluate)")


def test_folders_that_no_stage_made_stay(run: Run, compress: Compress) -> None:
    notes = run.folder / "99-notes" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("precious")
    done = compress("run", run.recipe, f"run_dir={run.folder.parent}", f"data.root={run.images}")
    assert done.returncode == 0 and notes.read_text() == "precious", done.stderr
    remove_stages(run.folder)
    assert notes.read_text() == "precious" and not (run.folder / "01-teacher").exists()


def test_a_damaged_record_of_an_artifact_is_one_line(run: Run, compress: Compress) -> None:
    (run.folder / "06-package" / "submission.json").write_text("x")
    assert_one_line_error(compress("run", run.recipe, f"run_dir={run.folder.parent}", f"data.root={run.images}"),
                          "submission.json: not valid JSON", code=1)


def test_what_an_earlier_version_made_stays(run: Run, compress: Compress) -> None:
    """It recorded a hash alone, in stage.json and in stage.key."""
    for name in ALL:
        record = json.loads((run.folder / name / "stage.json").read_text())
        del record["made_from"]
        (run.folder / name / "stage.json").write_text(json.dumps({**record, "key": "0" * 64}))
        (run.folder / name / "stage.key").write_text("0" * 64)
    command = ["run", run.recipe, f"run_dir={run.folder.parent}", f"data.root={run.images}"]
    before = snapshot(run.folder)
    assert_one_line_error(compress(*command), f"01-teacher ({EARLIER_VERSION}) and what follows it (02-distill", "--update")
    assert snapshot(run.folder) == before
    run.interrupt("02-distill", "checkpoint-student.pth")
    assert run.redone()[1] == f"01-teacher ({EARLIER_VERSION}), 02-distill (it has begun: checkpoint-student.pth)"
    (run.folder / "01-teacher" / "stage.json").write_text("{")
    assert "stage.json: not valid JSON" in run.redone()[1]


def snapshot(folder: Path) -> dict[str, Any]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"}


def test_a_refused_run_changes_nothing_and_a_plan_says_the_same(run: Run, compress: Compress) -> None:
    before = snapshot(run.folder)
    where = [run.recipe, f"run_dir={run.folder.parent}", f"data.root={run.images}"]
    reason = f"03-prune (prune.ratio: 0.4 -> 0.6) and what follows it ({', '.join(ALL[3:])})"
    refused = compress("run", *where, "prune.ratio=0.6")
    assert_one_line_error(refused, f"{reason}; nothing was changed; pass --update")
    assert "[3/7] prune: would be redone: prune.ratio: 0.4 -> 0.6\n" in refused.stdout
    planned = compress("plan", *where, "prune.ratio=0.6")
    assert planned.returncode == 0 and f"{run.folder}: finished before: 01-teacher, 02-distill\n" in planned.stdout
    assert f"{run.folder}: would be redone, with --update: {reason}\n" in planned.stdout
    assert snapshot(run.folder) == before


def edited_toolkit(folder: Path) -> Path:
    """Return a copy of the toolkit with edits of every kind; of those that count, only one concerns the stage `prune`."""
    for part in ("compress", "architectures", "loaders", "metadata"):
        shutil.copytree(PROJECT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for edited, text in {"compress/training/averaging.py": "# a comment", "loaders/sets/oxford_pets.py": "OTHER = 1",
                         "architectures/families/mine.py": "MODELS = {}", "compress/pruning/groups.py": "OTHER = 1",
                         "compress/evaluation/score.py": "OTHER = 1", "metadata/errors.py": "OTHER = 1"}.items():
        with (folder / edited).open("a") as file:
            file.write(f"\n\n{text}\n")
    return folder


def test_only_code_that_a_stage_uses_counts_and_only_its_statements(run: Run, tmp_path: Path) -> None:
    root = edited_toolkit(tmp_path / "project")
    plan = run.plan()
    changed = {}
    for (name, stage), identity in zip(plan.stages, plan.identities, strict=True):
        before = identity.made_from["code"]
        of_data = ["loaders.sets.image_folder"] if name == ALL[0] else []
        after = code_of([type(stage).__module__, *stage.modules(), *of_data], root)
        changed[name] = {module for module in before.keys() | after.keys() if before.get(module) != after.get(module)}
    assert {name: modules for name, modules in changed.items() if modules} == {
        "03-prune": {"compress.pruning.groups"}, "06-package": {"compress.evaluation.score"}}
    families = {name: [module for module in identity.made_from["code"] if module.startswith("architectures.families.")]
                for (name, _), identity in zip(plan.stages, plan.identities, strict=True)}
    assert families == {name: ["architectures.families.slim_resnet"] * (name in ALL[:2]) for name in ALL}


@pytest.mark.slow
def test_a_run_of_another_version_of_the_toolkit_names_what_changed(run: Run, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "compress", "plan", str(run.recipe), f"run_dir={run.folder.parent}"],
                          cwd=edited_toolkit(tmp_path / "project"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{run.folder}: finished before: 01-teacher, 02-distill\n" in done.stdout
    assert "with --update: 03-prune (the toolkit's code changed: compress.pruning.groups)" in done.stdout


def test_comments_docstrings_and_layout_are_no_code() -> None:
    plain = 'def f(a):\n    return a + "#"\n\nclass C:\n    x = 1\n'
    same = """'doc'\n# c\ndef f(a):  # c\n    'doc'\n    return (a\n            + '#')\nclass C:\n    'doc'\n    x = 1"""
    assert code_hash(plain) == code_hash(same)
    others = [plain.replace("+", "-"), plain.replace('"#"', '"# "'), plain.replace("x = 1", "x = 1.0"), plain + "f(1)\n",
              plain.replace("    return", '    """Doc."""\n    "text"\n    return')]
    assert len({code_hash(source) for source in [plain, *others]}) == 6
