"""How values reach their settings: from the command line, YAML files and Python, by the type of the setting."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies

import compress as verbs
from compress.evaluation.command import parse
from compress.pipeline.config import RunConfig, resolve
from compress.settings import load_yaml
from compress.studies.scaling.plans import read_plan
from compress.training.flags import TrainingRun, resolve_training
from compress.training.settings import TrainingSettings
from metadata.errors import UserError
from tests.helpers.commands import Compress, assert_one_line_error

# What YAML 1.1 reads as a number, a date, a truth value, nothing, a list or a comment.
ODD = ["2024_05", "007", "1e3", "5:32", "yes", "off", "true", "2024-05-01", "0x1F", "1.10", "[a", "{a: b}", "a: b", "a #1",
       "#1", "'a'", '"', "*a", "&a", "!a", "%a", "@a", "- a", "a\tb", " a", "~nobody_of_that_name/a", "a=b", "a,b", "ä/ü"]


def stage(config: RunConfig, name: str) -> dict[str, Any]:
    found, = (entry[name] for entry in config.stages if name in entry)
    return found


def recipe(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(f"{text}\nstages: [{{teacher: {{checkpoint: 2024_05}}}}]\n")
    return str(path)


@pytest.mark.parametrize("text", ODD)
def test_paths_and_texts_are_taken_as_they_stand(text: str) -> None:
    config = resolve("slim_resnet18_digits", [f"data.root={text}", f"run_dir={text}", f"package.username={text}",
                                              f"teacher.checkpoint={text}", f"data.name={text}"])
    assert config.data.root == config.run_dir == Path(text) and config.data.name == text
    assert stage(config, "package") == {"username": text} and stage(config, "teacher")["checkpoint"] == text
    trained = resolve_training([f"--data_root={text}", "--log_dir", text, "--model_name", text])
    assert trained.data_root == trained.log_dir == Path(text) and trained.model_name == text


@given(strategies.text(strategies.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_text_is_read_as_anything_else(text: str) -> None:
    config = resolve("slim_resnet18_digits", [f"package.username={text}", f"data.root=/{text}"])
    assert stage(config, "package")["username"] == text and str(config.data.root) == str(Path(f"/{text}"))
    assert resolve_training([f"--model_name={text}"]).model_name == text


@given(strategies.one_of(strategies.floats(1e-30, 1e30), strategies.integers(1, 10**20)))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_numbers_are_read_as_python_writes_them(number: float) -> None:
    config = resolve("slim_resnet18_digits", [f"distill.temperature={number!r}", f"distill.options.width={number!r}"])
    assert stage(config, "distill")["temperature"] == stage(config, "distill")["options"]["width"] == number
    assert resolve_training([f"--lr={number!r}"]).lr == float(number)
    assert load_yaml(f"{{{int(number)}: [{number!r}]}}") == {int(number): [number]}


@pytest.mark.parametrize("name", ["2024_05", "007", "1e3", "yes", "1.10", "null"])
def test_names_and_paths_of_files_are_taken_as_they_are_written(name: str, tmp_path: Path) -> None:
    config = resolve(recipe(tmp_path, f"name: {name}\nrun_dir: {name}\ndata: {{name: {name}}}"))
    assert (config.name, config.run_dir, config.data.name) == (name, Path(name), name)
    assert stage(config, "teacher")["checkpoint"] == "2024_05"
    (tmp_path / "train.yaml").write_text(f"model_name: {name}\nlog_dir: {name}\n")
    trained = resolve_training(["--config", str(tmp_path / "train.yaml")])
    assert (trained.model_name, trained.log_dir) == (name, Path(name))
    (tmp_path / "plan.yaml").write_text(f"dataset: {name}\nbase_dir: {name}\nkind: width\nwidths: [4]\ndataset_size: 9\n")
    plan = read_plan(str(tmp_path / "plan.yaml"))
    assert (plan.dataset, plan.base_dir) == (name, Path(name))


def test_a_tilde_is_the_home_folder_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Compress) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    there = tmp_path / "a b"
    config = resolve(recipe(tmp_path, "run_dir: ~/a b\ndata: {root: ~/a b}"), ["teacher.checkpoint=~/a b"])
    assert config.run_dir == config.data.root == there and stage(config, "teacher")["checkpoint"] == "~/a b"
    assert resolve(recipe(tmp_path, ""), ["run_dir=~/a b", "data.root=~"]).run_dir == there
    assert resolve("~/mine.yaml").name == "mine" and resolve_training(["--log_dir=~/a b"]).log_dir == there
    (tmp_path / "train.yaml").write_text("data_root: ~/a b\n")
    assert resolve_training(["--config=~/train.yaml"]).data_root == there
    flags = parse(["--submission_dir=~/a b", "--data_dir=~/a b", "--output_file=~/a b", "--compare=~/a b"])
    assert {flags.submission_dir, flags.data_dir, flags.output_file, flags.compare} == {str(there)}
    done = compress("export_data", "digits", "--out=~/a b")
    assert done.returncode == 0 and len(list(there.glob("*/*.png"))) == 359
    assert_one_line_error(compress("package", "~/a b", "--out=~/c"), f"{there}: not a run's folder")
    assert_one_line_error(compress("scaling", "fit", "~/none.csv"), str(tmp_path / "none.csv"))


def test_nothing_is_no_value_and_an_empty_list() -> None:
    changed = resolve("slim_resnet18_digits", ["data.root=", "data.num_classes=", "teacher.checkpoint=null",
                                               "quantize_dynamic.exclude=", "teacher.train.augment=", "teacher.options=",
                                               "distill.train.augment=crop, flip", "package.weights_name=null"])
    assert changed.data.root is changed.data.num_classes is None and stage(changed, "package")["weights_name"] is None
    assert stage(changed, "teacher")["checkpoint"] is None and stage(changed, "teacher")["options"] == {}
    assert stage(changed, "quantize_dynamic")["exclude"] == stage(changed, "teacher")["train"]["augment"] == []
    assert stage(changed, "distill")["train"]["augment"] == ["crop", "flip"]
    assert resolve("slim_resnet18_digits", ["data.mean=0.5, 0.4,1e-1"]).data.mean == [0.5, 0.4, 0.1]
    for empty in (["--augment", ""], ["--augment="], ["--augment=[]"]):
        assert resolve_training(empty).augment == []
    assert resolve_training(["--augment=null"]).augment is None
    assert resolve_training(["--model_options="]).model_options == {}
    with pytest.raises(UserError, match="run_dir"):
        resolve("slim_resnet18_digits", ["run_dir="])
    with pytest.raises(UserError, match="log_dir"):
        resolve_training(["--log_dir="])


@pytest.mark.parametrize("written", ["5:32", "{5: 32}", "{5:32}", "5: 32"])
def test_a_schedule_is_not_a_number_of_base_60(written: str, tmp_path: Path) -> None:
    from_flags = resolve_training(["--size_schedule", written, f"--bs_schedule={written}"])
    assert from_flags.size_schedule == from_flags.batch_size_schedule == {5: 32}
    quoted = f"'{written}'" if written == "5: 32" else written
    (tmp_path / "mine.yaml").write_text(f"size_schedule: {quoted}\nbs_schedule: {quoted}\n")
    assert resolve_training(["--config", str(tmp_path / "mine.yaml")]) == from_flags.model_copy(
        update={"log_dir": Path("runs/mine")})


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "&a [1, [*a]]"])
def test_yaml_that_holds_itself_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="holds itself"):
        load_yaml(text)
    assert load_yaml("{a: &a [1], b: *a}") == {"a": [1], "b": [1]}


@pytest.mark.parametrize(("override", "said"), [
    ("stages=[]", r"give the settings of a stage one by one, such as teacher\.KEY=VALUE"),
    ("prune=3", r"such as prune\.KEY=VALUE"), ("prun=3", "unknown key 'prun'; did you mean 'prune'")])
def test_a_stage_as_a_whole_is_no_override(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolve("slim_resnet18_digits", [override])


def test_yaml_has_the_numbers_of_version_1_2_and_still_yes_and_no() -> None:
    found = load_yaml("{a: 1e-3, b: 010, c: 0x1f, d: 1_000, e: yes, f: OFF, g: ~, h: -.5, i: .inf, j: '1', k: nO, l: 1.}")
    assert list(found.values()) == [0.001, 10, 31, "1_000", True, False, None, -0.5, float("inf"), "1", "nO", 1.0]
    assert load_yaml("{1: a, on: b, 1.5: c}") == {1: "a", "on": "b", "1.5": "c"}
    config = resolve_training(["--use_amp=yes", "--drop_last=no", "--max_steps=1e2",
                               "--model_options={bias: off, width: 8}"])
    assert (config.precision, config.drop_last, config.max_steps) == ("mixed", False, 100)
    assert config.model_options == {"bias": False, "width": 8}


def test_python_gives_values_as_they_are(tmp_path: Path) -> None:
    config = verbs.plan("slim_resnet18_digits", name="007", run_dir=tmp_path / "a #1", package={"username": "'a'"},
                        distill={"train": {"size_schedule": {0: 6, 2: 8}, "augment": []}}, quiet=True).config
    assert (config.name, config.run_dir) == ("007", tmp_path / "a #1")
    train = TrainingSettings.model_validate(stage(config, "distill")["train"])
    assert (train.size_schedule, train.augment) == ({0: 6, 2: 8}, [])
    assert stage(config, "package") == {"username": "'a'"}


def test_values_that_are_no_yaml_get_one_line(compress: Compress) -> None:
    done = compress("plan", "slim_resnet18_digits", "prune.ratio=[0.3")
    assert_one_line_error(done, "prune.ratio=[0.3", "not a YAML value")
    assert_one_line_error(compress("train", "--lr", "{"), "--lr '{'", "not a YAML value")


def test_every_path_of_every_setting_is_of_a_type_that_expands() -> None:
    """A path kept as `str` would be taken as it stands, `~` included."""
    for settings_class in (RunConfig, TrainingRun):
        for key, info in settings_class.model_fields.items():
            if re.search(r"(_dir|_root|root|checkpoint|folder)$", key):
                assert info.annotation in (Path, Path | None), key
