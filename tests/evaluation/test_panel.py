"""Submissions of the competition: what its panel can load is scored, with the panel's own answers to every image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compress.evaluation import panel
from compress.evaluation.class_order import ClassOrder
from compress.evaluation.original import OWN_LOADER, OWN_MARKS, file_kind
from compress.evaluation.original_metadata import read_original_metadata
from compress.evaluation.score import accuracy_details
from compress.evaluation.submission import read_submission
from compress.packaging.bundle import bundle
from compress.packaging.import_graph import ROOT as PROJECT
from metadata.errors import VerificationError
from tests.helpers import panel_folders
from tests.helpers.marks import slow_but
from tests.helpers.panel_variants import VARIANTS
from tests.helpers.sharing import shared_folder
from tests.helpers.submissions import compressed_text
from tests.helpers.verdicts import Evaluate, assert_refused

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated")  # competitors use what torch will drop
ALLOW = "--allow_code"
LOADED_BY = {"a loader": "model_loader.py: load_model", "TorchScript": "model.pt: TorchScript",
             "a plain ResNet18": "model.pth: a state dict in torchvision's ResNet18",
             "pickled int8 modules": "model.pth: a pickled module",
             "pretrained weights, overwritten": "model_loader.py: load_model"}


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures of many sizes in four classes."""
    return shared_folder(tmp_path_factory, "photos", panel_folders.draw_photos)


def answers_hash(predictions: list[int]) -> str:
    """The hash that a result gives of a list of answers, in the order of the images."""
    return hashlib.sha256(bytes(str(predictions), "ascii")).hexdigest()


def warned(result: dict[str, Any], *parts: str) -> bool:
    """Whether one warning holds all the parts."""
    return any(all(part in warning for part in parts) for warning in result["details"]["warnings"])


@pytest.mark.parametrize("kind", slow_but(panel_folders.FOLDERS, ["pickled int8 modules"]))
def test_answers_are_those_of_the_panels_procedure(kind: str, photos: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    if "int8" in kind and "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch's x86 engine of int8 modules is not in this build")
    folder = tmp_path / "folder"
    model = panel_folders.FOLDERS[kind](folder, photos)
    expected = panel_folders.panel_answers(model, photos)
    assert len(set(expected)) > 2
    code, result, error = evaluate(folder, ALLOW, data=photos)
    assert code == 0, error
    details = result["details"]
    assert details["accuracy"]["predictions_sha256"] == answers_hash(expected)
    assert details["loaded_by"] == LOADED_BY[kind] and "loaded_by" in details["sandbox"]["stated_by_the_code"]
    weights = next(path for path in folder.iterdir() if path.stem == "model")
    named = sum(len(path.name) for path in folder.iterdir())  # names can hold numbers
    assert result["model_size"] * 2**20 == weights.stat().st_size + named + compressed_text(folder)
    assert details["parameters"]["all"] == panel.numbers(model)["all"] and details["macs"]
    if kind != "a loader":  # its checkpoint holds more than tensors; any other state dict is counted as data
        stated = kind in ("TorchScript", "pickled int8 modules")
        assert ("parameters.all" in details["sandbox"]["stated_by_the_code"]) == stated
    assert warned(result, "asked for pretrained weights", "overwrote") == (kind == "pretrained weights, overwritten")


@pytest.mark.parametrize("variant", slow_but(VARIANTS, []))
def test_variants_of_load_model(variant: str, photos: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    build, way, said = VARIANTS[variant]
    folder = tmp_path / "folder"
    expected = panel_folders.panel_answers(build(folder, photos), photos)
    code, result, error = evaluate(folder, ALLOW, data=photos)
    assert code == 0, error
    details = result["details"]
    assert details["accuracy"]["predictions_sha256"] == answers_hash(expected), variant
    assert details["loaded_by"].startswith("model_loader.py" if way == "loader" else "model.p")
    assert said is None or warned(result, said), details["warnings"]
    assert warned(result, "asked for pretrained weights") == bool(said and any(
        word in said for word in ("pretrained", "overwrote", "a/b", "timm")))


@pytest.mark.parametrize(("kind", "said"), [
    ("a loader", "code: its model_loader.py loads model.pth (a state dict)"), ("TorchScript", "a TorchScript program"),
    ("pickled int8 modules", "a pickled torch.nn.modules.container.Sequential"),
])
def test_a_refusal_says_what_the_folder_is(kind: str, said: str, photos: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    panel_folders.FOLDERS[kind](tmp_path / "folder", photos)
    outcome = evaluate(tmp_path / "folder", data=photos)
    assert_refused(outcome, said, code=2)
    assert "only with --allow_code, in a sandbox" in outcome[2]


def test_outputs_beyond_the_classes_stay_answers_and_are_wrong() -> None:
    order = ClassOrder(names=["b", "a"], matched="by name", warnings=[])
    logits = np.array([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]], np.float32)  # two outputs have no name
    assert order.arranged(logits, ["a", "b"]).tolist() == [[2, 3, 1, 0], [1, 0, 2, 3]]
    assert order.arranged(logits, ["b", "a"]) is logits
    assert order.arranged(logits[:, :2], ["a", "b", "c"]).tolist() == [[2, 3, -np.inf], [1, 0, -np.inf]]
    details = accuracy_details(order.arranged(logits, ["a", "b"]), np.array([1, 0]), ["a", "b"], 1)
    assert details["correct"] == 1 and details["per_class"]["b"]["correct"] == 1


# ---------------------------------------------------------------------------------- what goes wrong, and what is said


LOADERS: dict[str, tuple[str, list[str]]] = {
    # The panel falls back to the standard way, which the weights of this network do not fit.
    "a fault in their file": ("def load_model(path):\n    a = 1\n    return nn.Linear(a, 2)\n",
                              ["model_loader.py:3: NameError: name 'nn' is not defined", "the standard way"]),
    "no return": ("def load_model(path):\n    import torch\n    torch.load(path)\n",
                  ["load_model returned NoneType", "`return model` missing"]),
    "num_workers": (panel_folders.NET + "\n\ndef load_model(path):\n    from torch.utils.data import DataLoader\n"
                    "    for batch in DataLoader([1, 2], num_workers=2):\n        print(batch)\n",
                    ["model_loader.py:21: no other processes here: use num_workers=0 ("]),
    "half precision": (panel_folders.NET + "\n\ndef load_model(path):\n    return Net().half()\n",
                       ["weights are float16 and its images are float32", "convert the images in forward"]),
}


@pytest.mark.parametrize("fault", slow_but(LOADERS, ["a fault in their file"]))
def test_a_failing_loader_is_told_with_its_line(fault: str, photos: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    source, said = LOADERS[fault]
    panel_folders.write(tmp_path / "folder", model_loader=source)
    torch.save(panel_folders.net(photos).state_dict(), tmp_path / "folder" / "model.pth")
    outcome = evaluate(tmp_path / "folder", ALLOW, data=photos)
    for part in said:
        assert_refused(outcome, part)


@pytest.mark.slow
def test_the_standard_way_follows_a_failing_loader_as_for_the_panel(photos: Path, tmp_path: Path,
                                                                    evaluate: Evaluate) -> None:
    """Weights kept random and 1,000 outputs, both said; answers beyond the classes are wrong, as for the panel."""
    panel_folders.write(tmp_path / "folder", model_loader="def load_model(path):\n    return missing\n")
    torch.save(Wide(), tmp_path / "folder" / "model.pth")
    (tmp_path / "folder" / "wide.py").write_text(WIDE)
    code, result, error = evaluate(tmp_path / "folder", ALLOW, data=photos)
    assert code == 0, error
    assert result["details"]["loaded_by"] == "model.pth: a pickled module"
    assert warned(result, "model_loader.py failed", "model_loader.py:2: NameError", "the standard way, as the panel does")
    assert warned(result, "1,000 outputs for the data's 4 classes")
    assert warned(result, "asked for pretrained weights (resnet18-f37072fd.pth)", "kept them")
    assert warned(result, "torch.compile")


WIDE = """
import torch
from torch import nn
from torchvision import models


def make():
    model = torch.compile(models.resnet18(weights="IMAGENET1K_V1"))
    return nn.Sequential(nn.AvgPool2d(7), model)
"""


class Wide:
    """Pickled as a call of `make` in the folder's wide.py."""

    def __reduce__(self) -> Any:
        import sys
        import types
        module = types.ModuleType("wide")
        module.make = make  # type: ignore[attr-defined]
        sys.modules["wide"] = module
        return make, ()


def make() -> None:
    raise AssertionError("runs in the sandbox alone")


make.__module__ = "wide"


# --------------------------------------------------------------------------------------------------- the metadata


@pytest.mark.parametrize("text", [
    '{"username": "a", "teamname": "b", "model_format": "pytorch"}',
    '{"UserName": "a", "Team Name": "b", "modelFormat": "PT",}',
    '{"model_format": ".pth"}', '{"model_format": "TorchScript"}', '{"model_format": "PyTorch (state_dict)"}', "{}",
    '{"model_format": null}', '{"model-format": "torch.jit", "class_names": 5, "preprocessing": "ImageNet, 224x224"}',
    '\ufeff{"model_format": "pytorch", "model_path": "C:\\\\Users\\\\me\\\\model.pth"}',
    '{"model_format": "pytorch", "model_path": "/kaggle/working/model.pth", "class_names": {"0": "cat", "1": "dog"}}',
    '{"model_format": "quantized", "input_size": "224x224", "model_size_mb": 0.1}',
])
def test_metadata_in_the_spellings_of_competitors(text: str, tmp_path: Path) -> None:
    panel_folders.write(tmp_path, text)
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pth")
    files = read_submission(tmp_path)
    assert files.kind == "code" and files.weights.name == "model.pth" and files.ways == ("standard",)
    assert files.preprocessing.crop == 224 and files.class_names in (None, ["cat", "dog"])
    ignored = [note for note in files.notes if "is ignored" in note]
    assert len(ignored) == text.count("ImageNet") + text.count('"class_names": 5') + text.count('"224x224"')


@pytest.mark.parametrize(("text", "said"), [
    ('{"model_format": "tensorflow"}', "this evaluator runs PyTorch models and files of .onnx"),
    ('{"a": 1 "b": 2}', "not valid JSON"), ('["a",]', "not valid JSON"), ('{"a": "b,}"', "not valid JSON"),
])
def test_metadata_that_are_refused(text: str, said: str, tmp_path: Path) -> None:
    panel_folders.write(tmp_path, text)
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pth")
    with pytest.raises(VerificationError, match=said):
        read_submission(tmp_path)


def test_a_comma_in_a_text_stays(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"teamname": "a,}", "notes": ["x\\",]",],}')
    metadata, remarks, _ = read_original_metadata(tmp_path / "metadata.json")
    assert metadata.model_extra == {"teamname": "a,}", "notes": ['x",]']} and remarks == []


# ------------------------------------------------------------------------------------- which file wins, what a file is


def test_which_file_loads_the_weights(photos: Path, tmp_path: Path) -> None:
    panel_folders.write(tmp_path, model_loader="def load_model(path): ...", model="x = 1")
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "model.pth")
    assert read_submission(tmp_path).ways == ("loader", "standard")
    for other in (b"", bundle(), (PROJECT / "model_loader.py").read_bytes()):  # nothing, or the toolkit's own evaluator
        (tmp_path / "model_loader.py").write_bytes(other)
        assert read_submission(tmp_path).ways == ("class", "standard")
    (tmp_path / "model_loader.py").write_text("from net import *")  # load_model may be imported
    assert read_submission(tmp_path).ways == ("loader", "class", "standard")
    for quoted in (OWN_LOADER + ' (mine)"""\n', f'{OWN_LOADER}"""\n# {OWN_MARKS[0]}\n', f"# {bundle()[:300].decode()!r}\n"):
        (tmp_path / "model_loader.py").write_text(quoted + "def load_model(path): ...\n")
        assert read_submission(tmp_path).ways == ("loader", "standard"), quoted
    (tmp_path / "model_loader.py").write_bytes(bundle())
    (tmp_path / "model.py").unlink()
    files = read_submission(tmp_path)
    assert files.ways == ("standard",) and "model_loader.py is the toolkit's own" in files.what
    panel_folders.torchscript(tmp_path, photos)  # model.pt beside model.pth
    files = read_submission(tmp_path)
    assert files.weights.name == "model.pth" and "2 files could be the weights: model.pth" in files.notes[0]
    (tmp_path / "model.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(VerificationError, match="a pointer of Git LFS"):
        read_submission(tmp_path)


@pytest.mark.parametrize(("content", "kind"), [
    ({"a": torch.ones(1)}, "state dict"), (nn.Linear(1, 1).state_dict(), "state dict"),
    ({"model": nn.Linear(1, 1).state_dict(), "epoch": 1}, "state dict"), (nn.Linear(1, 1), "pickled module"),
])
def test_a_file_is_told_by_its_bytes(content: Any, kind: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert file_kind(tmp_path / "w.pth")[0] == kind
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert file_kind(tmp_path / "w.pth") == ("unknown", "")


# ---------------------------------------------------------------------------------------------- ways to call load_model


def first(path: str) -> Any:
    return path, {}


CALLS: dict[str, Callable[..., Any]] = {
    "a path": first,
    "another name": lambda p: (p, {}),
    "a device with a default": lambda model_path="model.pth", device=None: (model_path, {"device": device}),
    "a device": lambda model_path, device: (model_path, {"device": device}),
    "a device by keyword": lambda model_path, *, map_location: (model_path, {"map_location": map_location}),
    "a number of classes": lambda path, num_classes, device="cpu": (path, {"num_classes": num_classes}),
    "a format": lambda path, model_format: (path, {"model_format": model_format}),
    "anything": lambda *args, **kwargs: (args[0], kwargs),
    "a path by keyword": lambda *, model_path: (model_path, {}),
}
GIVEN = {"a device with a default": {"device": None}, "a device": {"device": torch.device("cpu")},
         "a device by keyword": {"map_location": torch.device("cpu")}, "a number of classes": {"num_classes": 7},
         "a format": {"model_format": "pytorch"}}


@pytest.mark.parametrize("call", CALLS)
def test_load_model_is_called_with_the_path_and_what_it_needs(call: str) -> None:
    got = panel.call_loader(CALLS[call], "/a/model.pth", {"classes": 7, "threads": 1})
    assert got == ("/a/model.pth", GIVEN.get(call, {}))


def test_load_model_may_take_nothing_and_names_what_cannot_be_given() -> None:
    assert panel.call_loader(lambda: 3, "model.pth", {}) == 3
    with pytest.raises(TypeError, match="config"):
        panel.call_loader(lambda path, config: 3, "model.pth", {})


def test_the_model_in_what_load_model_returned() -> None:
    module = nn.Linear(1, 1)
    assert panel.module_in(module) is module and panel.module_in((3, module)) is module
    script = torch.jit.script(module)
    assert panel.module_in(script) is script
    assert panel.module_in(None) is None and panel.module_in(module.state_dict()) is None
    assert panel.module_in([nn.Sequential(module), 1]) is not None

    class Wrapped:
        """What the panel can treat as a model: it calls `to`, `eval` and the object."""

        to = eval = __call__ = staticmethod(lambda *_: None)

    wrapped = Wrapped()
    assert panel.module_in(wrapped) is wrapped


def test_multiply_adds_are_counted_in_scripts_and_int8_modules_too() -> None:
    """By hand: 8 x 3 x 3 x 3 for each of 6 x 6 outputs, and 8 x 10 for the head."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
    expected = 8 * 27 * 36 + 80
    shape = [3, 8, 8]
    dynamic = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    models = {"eager": net, "script": torch.jit.script(net), "int8": dynamic,
              "trace": torch.jit.trace(net, torch.zeros(1, 3, 8, 8))}  # type: ignore[no-untyped-call]
    assert {name: panel.macs(model, shape) for name, model in models.items()} == dict.fromkeys(models, expected)
    assert panel.macs(net, [4, 8, 8]) is None  # it cannot take such images
    assert panel.numbers(dynamic)["all"] == 8 * 27 + 8 + 8 * 10 + 10 + 2  # scale and zero point
    assert panel.numbers(net) == {"all": 314, "trainable": 314}
    transposed = nn.ConvTranspose2d(2, 4, 3)
    assert panel.macs(transposed, [2, 5, 5]) == 2 * 25 * 4 * 9


