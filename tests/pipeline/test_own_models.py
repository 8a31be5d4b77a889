"""Models in the user's own files: their class, their ONNX file, a folder; and their mistakes in one line."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from rich.console import Console

from architectures.named import remarks, without_place
from architectures.onnx_network.runtime import RunOnnxFile
from architectures.zoo import make
from compress.pipeline import importing
from compress.pipeline.config import resolve
from compress.pipeline.own_models import content_of_model
from compress.pipeline.run import run_pipeline
from compress.training.flags import TrainingRun
from compress.training.run import run_training
from metadata.errors import UserError
from tests.helpers.commands import Compress, assert_one_line_error
from tests.helpers.onnx_graphs import drawn, node, with_head, written

NET = '''
import torch
from torch import nn
from parts import WIDTH

class MyNet(nn.Module):
    def __init__(self, num_classes, width=WIDTH, rate=0.1):
        super().__init__()
        rates = [float(value) for value in torch.linspace(0, rate, 3)]
        self.conv, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(x.mean((2, 3)))

class Needs(MyNet):
    def __init__(self, num_classes, depth):
        super().__init__(num_classes)

class Wrong(MyNet):
    def __init__(self):
        super().__init__(7)

class Broken(MyNet):
    def forward(self, x):
        return self.heads(x)

class Plain:
    pass

def build(num_classes):
    return MyNet(num_classes, width=4)

def nothing(num_classes):
    return None

instance = MyNet(4)
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with the user's file and a neighbour that it imports."""
    (tmp_path / "parts.py").write_text("WIDTH = 8\n")
    (tmp_path / "my_net.py").write_text(NET)
    return tmp_path / "my_net.py"


def test_a_class_and_a_function_of_ones_own_file(own: Path) -> None:
    assert make(f"file:{own}:MyNet", num_classes=5, width=6).head.weight.shape == (5, 6)
    assert make(f"file:{own}:build", num_classes=5).head.weight.shape == (5, 4)
    assert without_place(f"file:{own}:MyNet") == "file:my_net.py:MyNet"


@pytest.mark.parametrize(("wanted", "options", "words"), [
    ("MyNot", {}, "my_net.py has no MyNot; did you mean 'MyNet'?"),
    ("Plain", {}, "Plain is no torch.nn.Module and no function that returns one"),
    ("instance", {}, "instance is a module already; name its class"),
    ("nothing", {}, "expected a torch.nn.Module, got NoneType"),
    ("Needs", {}, "it needs the argument 'depth'"),
    ("MyNet", {"widht": 3}, "it takes no option 'widht'; did you mean 'width'?"),
    ("MyNet", {"width": "wide"}, "my_net.py, line 10: TypeError")])
def test_mistakes_in_naming_a_class(wanted: str, options: dict[str, object], words: str, own: Path) -> None:
    with pytest.raises(UserError) as raised:
        make(f"file:{own}:{wanted}", num_classes=4, **options)
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(("text", "words"), [
    ("import torch\nraise RuntimeError('no\\nway')\n", "my_net.py, line 2: RuntimeError: no"),
    ("import sys\nsys.exit(3)\n", "my_net.py, line 2: the file ends the program"),
    ("def broken(:\n", "my_net.py, line 1: SyntaxError"),
    ("import no_such_thing\n", "my_net.py, line 1: ModuleNotFoundError"),
    ("from parts import gone\n", "my_net.py, line 1: ImportError")])
def test_a_file_that_fails_is_told_as_the_users(text: str, words: str, own: Path) -> None:
    own.write_text(text)
    with pytest.raises(UserError) as raised:
        make(f"file:{own}:MyNet", num_classes=4)
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "words"), [
    ("file:none.py:Net", "there is no file none.py"), ("file:my_net.py", "expected file:FILE:CLASS"),
    ("file:README.md:Net", "expected a Python file"), ("onnx:none.onnx", "there is no such file"),
    ("folder:none", "expected a folder with")])
def test_files_that_are_not_there(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(name, num_classes=4)


def test_two_folders_have_neighbours_of_one_name(own: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "parts.py").write_text("WIDTH = 12\n")
    (other / "my_net.py").write_text(NET)
    widths = [make(f"file:{path}:MyNet", num_classes=4).conv.out_channels for path in (own, other / "my_net.py", own)]
    assert widths == [8, 12, 8]


def test_a_plan_names_the_line_of_a_network_that_fails(own: Path, alone: Path, compress: Compress) -> None:
    done = compress("plan", alone, f"teacher.model=file:{own}:Broken", "teacher.options={}")
    assert_one_line_error(done, "my_net.py, line 27: AttributeError", "has no attribute 'heads'")
    assert_one_line_error(compress("describe", f"file:{own}:Wrong", "num_classes=4", "input_shape=3,8,8"),
                          "it has 7 classes, num_classes says 4")
    done = compress("plan", alone, f"teacher.model=file:{own}:Wrong", "teacher.options={}")
    assert_one_line_error(done, "expected logits (N, 4), got [2, 7]")


def test_a_student_of_another_number_of_classes_is_refused_when_planning(
        own: Path, tiny_recipe: Path, compress: Compress) -> None:
    done = compress("plan", tiny_recipe, f"distill.model=file:{own}:Wrong", "distill.options={}")
    assert_one_line_error(done, f"student file:{own}:Wrong: expected logits (N, 4), got (N, 7)")


def test_a_run_with_ones_own_teacher_and_student_continues_and_notices_a_changed_file(
        own: Path, two_stages: Path, tmp_path: Path, compress: Compress) -> None:
    name = f"file:{own}:MyNet"
    overrides = [f"run_dir={tmp_path / 'runs'}", f"teacher.model={name}", "teacher.options={}", "teacher.train.epochs=1",
                 f"distill.model={name}", "distill.options={width: 4}", "distill.train.epochs=1"]
    folder = run_pipeline(resolve(str(two_stages), overrides), Console(file=io.StringIO())).folder
    described = json.loads(next(folder.glob("*-distill/architecture.json")).read_text())
    assert described["model_type"] == "MyNet" and described["training_details"]["teacher"] == "file:my_net.py:MyNet"
    again = compress("run", two_stages, *overrides)
    assert again.returncode == 0 and again.stdout.count("finished before, skipped") == 2
    before = content_of_model(name)
    (own.parent / "parts.py").write_text("WIDTH = 8  # a comment\n")
    assert content_of_model(name) == before and set(before) == {"my_net.py", "parts.py"}
    (own.parent / "parts.py").write_text("WIDTH = 16\n")
    assert_one_line_error(compress("run", two_stages, *overrides), "parts.py", "--update")


def soft_file(folder: Path, resize: bool = False) -> Path:
    """A classifier of four classes with a softmax at its end, for one image of 8x8 a call."""
    nodes, head = with_head([node("Conv", "x stem.weight", "stem", pads=[1, 1, 1, 1]), node("Relu", "stem", "on"),
                             *([node("Resize", "on - twice", "out")] if resize else [])], "out" if resize else "on", 16)
    nodes[-1].output[0] = "logits"
    constants = {"stem.weight": drawn(16, 3, 3, 3), **head}
    if resize:
        constants["twice"] = torch.tensor([1.0, 1, 2, 2]).numpy()
    return written(folder / "theirs.onnx", [*nodes, node("Softmax", "logits", "y", axis=1)], constants,
                   image=(1, 3, 8, 8), output=(1, 4))


@pytest.mark.parametrize("more", ["", pytest.param("  - quantize_dynamic: {arithmetic: int8, allow_slower: true}\n"
                                                   "  - package\n  - evaluate\n", marks=pytest.mark.slow)],
                         ids=["pruned", "to the end"])
def test_an_onnx_file_goes_through_the_pipeline(more: str, tiny_recipe: Path, tmp_path: Path) -> None:
    path, recipe = soft_file(tmp_path), tmp_path / "own.yaml"
    data = tiny_recipe.read_text().split("stages:")[0]
    recipe.write_text(data + "stages:\n  - teacher: {train: {epochs: 0}, floor: 0}\n  - student\n"
                      "  - prune: {ratio: 0.5, multiple: 4, allow_slower: true}\n"
                      f"  - finetune: {{teacher: true, train: {{epochs: 1}}}}\n{more}")
    outcome = run_pipeline(resolve(str(recipe), [f"run_dir={tmp_path}", f"teacher.model=onnx:{path}"]),
                           Console(file=io.StringIO()))
    assert outcome.rows[0].accuracy == outcome.rows[1].accuracy and outcome.rows[2].parameters < outcome.rows[1].parameters
    assert (outcome.results is not None and (outcome.folder / "submission" / "model.py").is_file()) == bool(more)
    student = make(f"folder:{next(outcome.folder.glob('*-student'))}", num_classes=4)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(student(images), make(f"onnx:{path}", num_classes=4)(images), atol=1e-5)


def test_what_has_no_layer_is_a_teacher_on_onnx_runtime(tmp_path: Path, alone: Path, compress: Compress) -> None:
    path = soft_file(tmp_path, resize=True)
    teacher = make(f"onnx:{path}", num_classes=4)
    assert isinstance(teacher, RunOnnxFile) and "operator Resize" in remarks(teacher)[-1]
    logits = teacher(torch.randn(5, 3, 8, 8))
    assert logits.shape == (5, 4) and float(logits.sum(1).std()) > 0.01  # not probabilities
    common = ["plan", alone, f"teacher.model=onnx:{path}", "teacher.options={}"]
    assert_one_line_error(compress(*common), "operator Resize", "set teacher.train.epochs=0")
    done = compress(*common, "teacher.train.epochs=0")
    assert done.returncode == 0 and "ONNX Runtime runs it" in done.stdout and "the Softmax at the end" in done.stdout
    done = compress("import", path, "--out", tmp_path / "out")
    assert_one_line_error(done, "operator Resize", "as a teacher it works: teacher.model=onnx:")
    assert not (tmp_path / "out").exists()


def test_a_file_without_layers_is_no_student_and_its_operator_is_named(tmp_path: Path, tiny_recipe: Path,
                                                                      compress: Compress) -> None:
    path = soft_file(tmp_path, resize=True)
    done = compress("plan", tiny_recipe, f"distill.model=onnx:{path}", "distill.options={}")
    assert_one_line_error(done, f"student onnx:{path}: it is no network of layers", "operator Resize of node 'node_out'")


def test_remarks_are_shown_wherever_a_file_becomes_a_model(tmp_path: Path, tiny_recipe: Path, two_stages: Path,
                                                         compress: Compress) -> None:
    name, said = f"onnx:{soft_file(tmp_path)}", "the Softmax at the end is left out"
    recipe = tmp_path / "student.yaml"
    recipe.write_text(tiny_recipe.read_text().split("stages:")[0] + f"stages:\n  - student: {{model: '{name}'}}\n")
    for command, shown in (("plan", f"{name} as it is, "), ("run", f"student.model {name}: {said}")):
        done = compress(command, recipe, f"run_dir={tmp_path / 'runs'}")
        text = "".join(done.stdout.split())
        assert done.returncode == 0 and "".join(shown.split()) in text and "".join(said.split()) in text, done.stderr
    overrides = [f"run_dir={tmp_path / 'runs'}", f"distill.model={name}", "distill.options={}", "distill.train.epochs=1",
                 "teacher.train.epochs=1"]
    assert said in " ".join(compress("plan", two_stages, *overrides).stdout.split())
    console = Console(file=io.StringIO(), width=1000)
    run_pipeline(resolve(str(two_stages), overrides), console)
    assert f"distill.model {name}, student: {said}" in console.file.getvalue()  # type: ignore[attr-defined]


def test_training_a_file_shows_its_remarks_or_names_its_operator(tmp_path: Path) -> None:
    def trained(path: Path) -> str:
        console = Console(file=io.StringIO(), width=1000)
        run_training(TrainingRun(model_name=f"onnx:{path}", dataset="digits", channels=1, epochs=1,
                                 log_dir=tmp_path / "log"), console)
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    last = [node("Softmax", "logits", "y", axis=1)]
    assert "theirs.onnx: the Softmax at the end is left out" in trained(of_digits(tmp_path / "theirs.onnx", (8, 8), last))
    shutil.rmtree(tmp_path / "log")
    path = of_digits(tmp_path / "largest.onnx", (8, 8), [node("Max", "logits logits", "y")])
    with pytest.raises(UserError, match="operator Max of node 'node_y': the larger or smaller of two tensors; such a"):
        trained(path)


def of_digits(path: Path, sizes: tuple[int | str, int | str], last: list[onnx.NodeProto] | None = None) -> Path:
    """A classifier of gray images of ten digits."""
    nodes, _ = with_head([node("Conv", "x stem.weight", "stem", pads=[1, 1, 1, 1])], "stem", 8)
    if last:
        nodes[-1].output[0], nodes[-1].name = "logits", "head"
    return written(path, [*nodes, *(last or [])], {
        "stem.weight": drawn(8, 1, 3, 3), "head.weight": drawn(10, 8), "head.bias": drawn(10)},
        image=(1, 1, *sizes), output=(1, 10))


def test_import_takes_the_size_of_the_data_where_the_file_leaves_it_open(tmp_path: Path, compress: Compress) -> None:
    path, out = of_digits(tmp_path / "free.onnx", ("h", "w")), tmp_path / "free"
    done = compress("import", path, "--out", out, "--data", "digits")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "import.json").read_text())["input_shape"] == [1, 8, 8]
    assert not list(tmp_path.glob(".*.part"))
    assert_one_line_error(compress("import", path, "--out", tmp_path / "x"), "leaves the size of its images open (1, ?, ?)")


def test_an_import_that_is_interrupted_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(importing, "write_weights", broken)
    with pytest.raises(OSError, match="no space left"):
        importing.import_onnx(soft_file(tmp_path), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs.onnx"]


def test_import_names_an_operator_that_torch_has_and_the_layer_table_has_not(tmp_path: Path, compress: Compress) -> None:
    nodes, head = with_head([node("Conv", "x stem.weight", "stem"), node("Elu", "stem", "out")], "out", 8)
    path = written(tmp_path / "elu.onnx", nodes, {"stem.weight": drawn(8, 3, 3, 3), **head})
    done = compress("import", path, "--out", tmp_path / "out")
    assert_one_line_error(done, "elu (operator Elu of node 'node_out')", "as a teacher it works")
    assert done.stderr.count("teacher it works") == 1 and "can still be used" not in done.stderr


def test_import_writes_a_folder_that_is_a_model(tmp_path: Path, compress: Compress) -> None:
    path, out = soft_file(tmp_path), tmp_path / "theirs"
    done = compress("import", path, "--out", out)
    assert done.returncode == 0 and "largest difference from ONNX Runtime" in done.stdout, done.stderr
    assert "1, 2 and 3 random images" in done.stdout and "the Softmax at the end is left out" in done.stdout
    record = json.loads((out / "import.json").read_text())
    assert record["difference"] < 1e-5 and record["source"] == "theirs.onnx" and record["num_classes"] == 4
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    imported, read = (make(f"{prefix}:{place}", num_classes=4) for prefix, place in (("folder", out), ("onnx", path)))
    assert torch.allclose(imported(images), read(images), atol=1e-5)
    with pytest.raises(UserError, match="it has 4 classes, expected 5"):
        make(f"folder:{out}", num_classes=5)
    assert_one_line_error(compress("import", path, "--out", out), "already there; nothing was written")


def test_import_with_data_compares_its_images_and_scores_both(tmp_path: Path, compress: Compress) -> None:
    path = of_digits(tmp_path / "ten.onnx", (8, 8))
    done = compress("import", path, "--out", tmp_path / "ten", "--data", "digits")
    assert done.returncode == 0 and "images of digits" in done.stdout, done.stderr
    accuracy = json.loads((tmp_path / "ten" / "import.json").read_text())["accuracy"]
    assert accuracy["network"] == accuracy["file"] and (tmp_path / "ten" / "card.json").is_file()
    assert_one_line_error(compress("import", path, "--out", tmp_path / "x", "mean=[0.5]"), "no --data names a data set")
    assert_one_line_error(compress("import", soft_file(tmp_path), "--out", tmp_path / "y", "--data", "digits"),
                          "the file has 4 classes, the data has 10")
