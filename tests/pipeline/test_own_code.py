"""Code of the user's that ends the program, raises what nobody catches, or has layers without sizes: one line each."""

from __future__ import annotations

from pathlib import Path

import pytest

from architectures.zoo import make
from metadata.errors import UserError
from tests.helpers.commands import Compress, assert_one_line_error

NET = """import sys
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, num_classes)

    def forward(self, x):
        LINE
        return self.head(x.flatten(1))
"""


@pytest.mark.parametrize(("verb", "line", "words"), [
    ("describe", "sys.exit(0)", "my_net.py, line 10: the file ends the program"),
    ("plan", "sys.exit(0)", "my_net.py, line 10: the file ends the program"),
    ("plan", "raise type('Own', (BaseException,), {})('stop')", "my_net.py, line 10: Own: stop")])
def test_a_forward_that_ends_the_program_is_told(verb: str, line: str, words: str, tiny_recipe: Path, tmp_path: Path,
                                                 compress: Compress) -> None:
    own = tmp_path / "my_net.py"
    own.write_text(NET.replace("LINE", line))
    if verb == "describe":
        done = compress(verb, f"file:{own}:Net", "num_classes=4", "input_shape=3,8,8")
    else:
        done = compress(verb, tiny_recipe, f"teacher.model=file:{own}:Net", "teacher.options={}")
    assert_one_line_error(done, words)


@pytest.mark.parametrize(("text", "words"), [
    ("raise GeneratorExit", "my_net.py, line 1: GeneratorExit"),
    ("class Stop(BaseException): pass\nraise Stop('now')", "my_net.py, line 2: Stop: now"),
    ("from torch import nn\ndef Net(num_classes): return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))",
     "it has lazy layers, whose sizes the first images decide"),
    ("from torch import nn\ndef Net(num_classes): return nn.Sequential(nn.LazyBatchNorm2d())", "it has lazy layers")])
def test_what_a_file_raises_or_leaves_open(text: str, words: str, tmp_path: Path) -> None:
    own = tmp_path / "my_net.py"
    own.write_text(text)
    with pytest.raises(UserError) as raised:
        make(f"file:{own}:Net", num_classes=4)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_class_without_a_constructor_gets_no_classes(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\n\nclass Plain(nn.Module):\n    pass\n")
    assert not [*make(f"file:{tmp_path / 'net.py'}:Plain", num_classes=4).parameters()]
    with pytest.raises(UserError, match="it takes no option 'width'"):
        make(f"file:{tmp_path / 'net.py'}:Plain", num_classes=4, width=3)


@pytest.mark.parametrize("name", ["file:net.py:Net", "onnx:net.onnx"])
def test_own_models_have_no_weights_to_fetch(name: str, tiny_recipe: Path, compress: Compress) -> None:
    done = compress("plan", tiny_recipe, f"teacher.model={name}", "teacher.options={}", "teacher.pretrained=true")
    assert_one_line_error(done, f"teacher.pretrained: true, but {name} is a file of one's own")
