"""What a serialised model of the 2.5M-parameter task holds: every hiding place counts, nothing hostile runs or hangs."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.evaluation import inventory, trainee
from compress.evaluation.pareto_task import model_counts
from tests.helpers.task import finish

LIMIT = 2_500_000
OWN = 384 * 128 + 128


@pytest.fixture
def solve(tmp_path: Path) -> Iterator[Any]:
    """Returns the model that the last step of a solution leaves, and the module of the solution's file."""
    import cloudpickle
    modules: list[types.ModuleType] = []

    def run(last_step: str) -> tuple[torch.nn.Module, types.ModuleType]:
        path = tmp_path / "solution.py"
        path.write_text(finish(last_step))
        modules.append(trainee.solution_module(path))
        return modules[-1].Solution().finish(torch.nn.Linear(384, 128)), modules[-1]
    yield run
    for module in modules:
        if module.__name__ in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.unregister_pickle_by_value(module)
    sys.modules.pop("solution", None)


def serialised_counts(model: torch.nn.Module, module: types.ModuleType, limit: int = LIMIT) -> dict[str, Any]:
    """The counts of a model, serialised here and restored here."""
    content = trainee.serialised(model, module)
    held = inventory.take_inventory(content)
    sys.modules.pop("solution")
    _, stated = trainee.restore_model(content, inventory.cut, 0)
    return model_counts(held, stated["trainable"], limit, 1000)


HIDDEN = {
    "buffer": "head.register_buffer('table', torch.randn(300, 300))\nreturn head",
    "frozen": "head.more = torch.nn.Parameter(torch.zeros(10**5), requires_grad=False)\nreturn head",
    "list": "head.more = [torch.zeros(10**5)]\nreturn head",
    "list of parameters": "head.more = [torch.nn.Parameter(torch.zeros(10**5))]\nreturn head",
    "list of modules": "head.more = [torch.nn.Linear(1000, 100)]\nreturn head",
    "array": "import numpy\nhead.more = {'a': (numpy.zeros(10**5, 'float32'),)}\nreturn head",
    "closure": "table = torch.zeros(10**5)\nhead.rule = lambda x: x + table[0]\nreturn head",
    "global": "global TABLE\nTABLE = torch.zeros(10**5)\ndef f(x):\n    return x + TABLE[0]\nhead.rule = f\nreturn head",
    "bytes": "head.more = bytes(10**6)\nreturn head",
    "numbers": "import random\nhead.more = [random.random() for _ in range(10**5)]\nreturn head",
    "name of a statistic": "head.register_buffer('running_var', torch.zeros(10**5))\nreturn head",
    "statistics of a real norm": "head.norm = torch.nn.BatchNorm1d(10**6, affine=False)\nreturn head",
    "inner function": "global TABLE\nTABLE = torch.zeros(10**5)\nhead.rule = lambda x: [TABLE for _ in x]\nreturn head",
    "default": "def f(x, table=torch.zeros(10**5)):\n    return table\nhead.rule = f\nreturn head",
    "class": "class Head(torch.nn.Linear):\n    table = torch.zeros(10**5)\nhead.__class__ = Head\nreturn head",
    "docstring": "def f(x):\n    return x\nf.__doc__ = ''.join(chr(i % 60000 + 300) for i in range(250_000))\n"
                 "head.rule = f\nreturn head",
    "constants of code": "code = 'def f(x):\\n    return ' + repr(bytes(range(256)) * 2000)\nspace = {}\n"
                         "exec(code, space)\nhead.rule = space['f']\nreturn head",
    "names of modules": "import hashlib\nfor i in range(2000):\n"
                        "    head.add_module(hashlib.sha512(b'%d' % i).hexdigest() * 2, torch.nn.Identity())\nreturn head",
    "hooks": "table = torch.zeros(10**5)\nhead.register_forward_hook(lambda *a: table[0])\nreturn head",
    "storage behind a parameter": "head.more = torch.nn.Parameter(torch.zeros(10**5)[:1])\nreturn head",
    "attribute of a parameter": "head.weight.table = torch.zeros(10**5)\nreturn head",
    "quantized": "head.register_buffer('more', torch.quantize_per_tensor(torch.zeros(400_000), 1.0, 0, torch.qint8))\n"
                 "return head",
    "state of a pickle": "class Head(torch.nn.Linear):\n    def __getstate__(self):\n"
                         "        return self.__dict__ | {'table': torch.zeros(10**5)}\nhead.__class__ = Head\nreturn head",
}


@pytest.mark.parametrize("where", HIDDEN)
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation", "ignore:TypedStorage is deprecated")
def test_every_hiding_place_is_counted(where: str, solve: Any) -> None:
    counts = serialised_counts(*solve(HIDDEN[where]))
    assert counts["parameters_trainable"] - OWN in (0, 1)
    assert counts["hidden_numbers"] >= 70_000 and counts["hidden_capacity"], counts
    assert counts["parameters_all"] >= OWN + 70_000


HONEST = {
    "plain": ("return head", OWN),
    "shared": ("head.again = head.weight\nhead.inner = torch.nn.Linear(384, 128)\nhead.inner.weight = head.weight\n"
               "return head", OWN + 128),
    "batch norm": ("return torch.nn.Sequential(head, torch.nn.BatchNorm1d(128))", OWN + 256),
    "class made in solve": ("class Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
                            "        self.head, self.rule = head, lambda x: 2 * x\n"
                            "    def forward(self, x):\n        return self.rule(self.head(x))\nreturn Net()", OWN),
    "parametrized": ("return torch.nn.utils.parametrizations.weight_norm(head)", OWN + 128),
    "orthogonal": ("inner = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(128, 128))\n"
                   "return torch.nn.Sequential(head, inner)", OWN + 128 * 128 + 128),
    "spectral": ("return torch.nn.utils.spectral_norm(head)", OWN),
    "graph": ("return torch.fx.symbolic_trace(head)", OWN),
    "half": ("return torch.nn.Sequential(head, torch.nn.Linear(128, 128).half())", OWN + 128 * 129),
    "double": ("return head.double()", OWN),
    "complex": ("head.more = torch.nn.Parameter(torch.zeros(100, 100, dtype=torch.complex64))\nreturn head", OWN + 10_000),
    "own pickle": ("class Head(torch.nn.Linear):\n    def __reduce__(self):\n        return rebuilt, (self.__dict__,)\n"
                   "def rebuilt(state):\n    made = Head.__new__(Head)\n    made.__dict__.update(state)\n    return made\n"
                   "head.__class__ = Head\nreturn head", OWN),
    "numbers made at load": ("class Late(torch.nn.Linear):\n    def __reduce__(self):\n"
                             "        return torch.nn.Linear, (384, 1000)\nhead.__class__ = Late\nreturn head", 385_000),
    "expanded": ("head.more = torch.nn.Parameter(torch.zeros(1).expand(3_000_000))\nreturn head", OWN + 3_000_000),
}


@pytest.mark.parametrize("what", HONEST)
@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated")
def test_parameters_are_counted_by_the_public_rule(what: str, solve: Any) -> None:
    """What numel() says, each parameter once; what is no hidden number raises no flag."""
    last_step, expected = HONEST[what]
    model, module = solve(last_step)
    counts = serialised_counts(model.eval(), module)
    assert counts["parameters_trainable"] == expected
    assert not counts["hidden_capacity"], counts
    assert counts["hidden_numbers"] <= (128**2 if what == "orthogonal" else 1000)  # torch keeps a buffer for its base


@pytest.mark.parametrize("what", [name for name in HONEST if name not in ("half", "double", "numbers made at load")])
@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated")
def test_a_restored_model_answers_as_before(what: str, solve: Any) -> None:
    model, module = solve(HONEST[what][0])
    rows = torch.randn(5, 384, generator=torch.Generator().manual_seed(1))
    content = trainee.serialised(model, module)
    expected = model.eval()(rows)
    sys.modules.pop("solution")
    restored, _ = trainee.restore_model(content, inventory.cut, 0)
    assert torch.equal(restored(rows), expected)


def test_the_second_half_of_float64_needs_a_place_below_the_limit(solve: Any) -> None:
    counts = serialised_counts(*solve("return head.double()"), limit=60_000)
    assert counts["parameters_trainable"] == OWN and counts["hidden_numbers"] == 0 and counts["hidden_capacity"]


UNSERIALISABLE = {
    "script": "return torch.jit.script(head)",
    "lock": "import threading\nhead.lock = threading.Lock()\nreturn head",
    "generator": "head.rows = (x for x in range(3))\nreturn head",
    "deep": "for _ in range(100_000):\n    head.more = [getattr(head, 'more', None)]\nreturn head",
}


@pytest.mark.parametrize("what", UNSERIALISABLE)
@pytest.mark.filterwarnings("ignore:.*jit.script.* is deprecated")
def test_what_cannot_be_serialised_is_told_in_one_line(what: str, solve: Any) -> None:
    model, module = solve(UNSERIALISABLE[what])
    with pytest.raises(RuntimeError, match=r"cannot be serialised.*return a plain nn\.Module") as raised:
        trainee.serialised(model, module)
    assert "\n" not in str(raised.value)


# ----------------------------------------------------------------------------------------------------- hostile bytes


def packed(stream: bytes, *storages: bytes) -> bytes:
    """A serialised model, as inventory.py describes."""
    header = struct.pack(f"<{2 + len(storages)}Q", len(stream), len(storages), *map(len, storages))
    return header + stream + b"".join(storages)


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *given: Any) -> None:
        self.call = function, given

    def __reduce__(self) -> Any:
        return self.call


HOSTILE = {
    "no header": b"123", "cut short": struct.pack("<QQ", 10**6, 0), "many storages": struct.pack("<QQ", 0, 2**60),
    "sizes beyond the bytes": packed(b"N.", b"1234")[:-2], "empty": packed(b""), "no stop": packed(b"N"),
    "no such storage": packed(b"\x80\x04(\x8c\x07storageNK\x05tQ."), "a wrong storage": packed(b"\x80\x04NQ."),
    "a negative storage": packed(b"\x80\x04(\x8c\x07storageNJ\xff\xff\xff\xfftQ."),
    "mark missing": packed(b"t."), "stack empty": packed(b"0."), "state of nothing": packed(b"NNb."),
    "huge text": packed(b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f."),
    "huge frame": packed(b"\x80\x04\x95" + b"\xff" * 8 + b"."), "items of nothing": packed(b"N(NNu."),
    "protocol of the future": packed(b"\x80\x63N."), "unknown opcode": packed(b"\xff."),
    "buffers": packed(b"\x80\x05\x97."), "not memoized": packed(b"h\x07."),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_damaged_bytes_are_refused(what: str) -> None:
    with pytest.raises((ValueError, pickle.UnpicklingError, EOFError, KeyError, IndexError, OverflowError, MemoryError,
                        struct.error)):
        inventory.take_inventory(HOSTILE[what])


HARMLESS = {
    "a call": lambda path: pickle.dumps(Calls(Path.touch, path)),
    "an old call": lambda path: b"cos\nsystem\n(V touch " + str(path).encode() + b"\ntR.",
    "an old instance": lambda path: b"(V" + b"touch " + str(path).encode() + b"\nios\nsystem\n.",
    "an extension": lambda path: b"\x80\x02\x82\x01.",
    "a far place in the memo": lambda path: b"\x80\x04Nr\xff\xff\xff\xff.",
    "a key that takes for ever to hash": lambda path: b"\x80\x04})\x940" + b"".join(  # twice the same tuple, and so on
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x940" for i in range(90)) + b"h\x5aK\x01s.",
    "a deep list": lambda path: b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "a list that holds itself": lambda path: b"\x80\x04]\x94h\x00a.",
    "a class that is no class": lambda path: b"\x80\x04NN\x81.",
}


@pytest.mark.parametrize("what", HARMLESS)
def test_hostile_pickles_run_nothing_and_end(what: str, tmp_path: Path) -> None:
    facts = inventory.take_inventory(packed(HARMLESS[what](tmp_path / "touched"), b"12345678"))
    assert facts["trainable"] == facts["statistics_bytes"] == 0 and facts["storage_bytes"] == 8
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_cannot_count_itself_out_of_the_flag() -> None:
    """Bytes without a parameter, or with parameters that claim one storage many times."""
    tensor = (b"ctorch._utils\n_rebuild_parameter\n(ctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nVfloat32\nI0\ntQI0\n"
              b"(I1000000\nt(I1\ntI00\nNtRI01\nNtR")
    stream = b"cx\nModel\n)\x81}V_parameters\n}" + b"".join(b"Vp%d\n" % i + tensor + b"s" for i in range(5)) + b"sb."
    facts = inventory.take_inventory(packed(stream, bytes(8_000_000)))
    assert facts["trainable"] == 5_000_000 and facts["trainable_bytes"] == 8_000_000
    counts = model_counts(inventory.take_inventory(packed(b"N.", bytes(8_000_000))), 0, LIMIT, 0)
    assert counts["hidden_numbers"] == 2_000_000 and counts["hidden_capacity"]
    most = model_counts(inventory.take_inventory(packed(b"N.", bytes(16_000_000))), LIMIT, LIMIT, 0)
    assert most["parameters_trainable"] == LIMIT and most["hidden_capacity"]  # a model that states too much gains nothing


def test_the_unpickler_in_python_reads_what_the_one_in_c_reads() -> None:
    """Values that are no calls come out alike."""
    for protocol in range(6):
        value = [1, -(2**70), 2.5, "é", b"x", bytearray(b"y"), (1, (2,)), [[]], None, True]
        assert inventory.Reading(pickle.dumps(value, protocol), 0).load()[0] == 1
        assert repr(pickle.Unpickler(io.BytesIO(pickle.dumps(value, protocol))).load()) == repr(value)
