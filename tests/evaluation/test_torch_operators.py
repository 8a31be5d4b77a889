"""What a `.pt2` file may call: functional operators of a table, with results that are bounded before torch makes them."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compress.evaluation.runtimes import open_file
from compress.evaluation.torch_operators import call_operator, CALL_ERRORS, IN_PLACE_TARGETS, TORCH_OPERATORS
from compress.evaluation.torch_programs import check_batch, program_costs, read_torch_program
from metadata.errors import VerificationError
from metadata.schemas import Preprocessing

SHAPE = (3, 8, 8)
STORED = {"s": np.zeros(3, np.float32), "v": np.ones(3, np.float32)}


def given(kind: str, value: Any, name: str = "a", place: int = 1) -> dict[str, Any]:
    return {"name": name, "arg": {kind: value}, "kind": place}


def tensor(name: str) -> dict[str, Any]:
    return given("as_tensor", {"name": name})


def call(target: str, *args: dict[str, Any], to: str = "q") -> dict[str, Any]:
    outputs = [{"as_sym_int": {"as_name": each[1:]}} if each[0] == "#" else {"as_tensor": {"name": each}}
               for each in to.split()]
    return {"target": f"torch.ops.aten.{target}", "inputs": list(args), "outputs": outputs}


MEAN = call("mean.dim", tensor("x"), given("as_ints", [2, 3]), to="y")


def write(path: Path, calls: list[dict[str, Any]], output: str = "y") -> Path:
    """Write a program of an image `x` and the buffers of `STORED`."""
    inputs = [{"user_input": {"arg": {"as_tensor": {"name": "x"}}}},
              *({"buffer": {"arg": {"name": name}, "buffer_name": name}} for name in STORED)]
    signature = {"input_specs": inputs, "output_specs": [{"user_output": {"arg": {"as_tensor": {"name": output}}}}]}
    config = {name: {"path_name": name, "use_pickle": False, "tensor_meta": {
        "dtype": 7, "sizes": [{"as_int": len(values)}], "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}}}
        for name, values in STORED.items()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/models/model.json", json.dumps(
            {"graph_module": {"graph": {"nodes": calls}, "signature": signature}}))
        archive.writestr("net/data/weights/model_weights_config.json", json.dumps({"config": config}))
        for name, values in STORED.items():
            archive.writestr(f"net/data/weights/{name}", values.tobytes())
    return path


def norm(name: str, training: bool) -> dict[str, Any]:
    nothing = given("as_none", True)
    return call(name, tensor("x"), nothing, nothing, tensor("s"), tensor("v"), given("as_bool", training),
                given("as_float", 0.1), given("as_float", 1e-5), given("as_bool", False))


def made_wide(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """A view of 2**26 elements that takes no memory, and what makes as many tensors of it."""
    return [call("mean.dim", tensor("x"), given("as_ints", [1, 2, 3]), to="m"),
            call("expand.default", tensor("m"), given("as_ints", [2**26]), to="e"), parts, MEAN]


HOSTILE: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    **{f"add.{name}": ([call(f"add.{name}", given("as_string", "__init__")), MEAN], "y", "is not one of those")
       for name in ("__getattribute__", "__setattr__", "__getattr__", "__class__", "out", "int", "str", "Tensor.__call__")},
    "an output argument": ([call("add.Tensor", tensor("s"), tensor("v"), given("as_tensor", {"name": "s"}, "out", 2)),
                            MEAN], "y", "does not take the arguments"),
    "in place on a stored tensor": ([call("add_.Tensor", tensor("s"), tensor("v")), MEAN], "y", "others may read"),
    "in place on the image": ([call("relu_.default", tensor("x")), MEAN], "y", "others may read"),
    "in place on what is read again": ([MEAN, call("relu_.default", tensor("y"))], "y", "others may read"),
    "in place on a view": ([call("view.default", tensor("x"), given("as_ints", [1, 3, 64]), to="w"),
                            call("relu_.default", tensor("w")), MEAN], "y", "others may read"),
    "batch norm in training": ([norm("batch_norm.default", True), MEAN], "y", "a program in training"),
    "legit batch norm": ([norm("_native_batch_norm_legit.default", True), MEAN], "y", "is not one of those"),
    "dropout": ([call("dropout.default", tensor("x"), given("as_float", 0.5), given("as_bool", True)), MEAN], "y",
                "a program in training"),
    "attention with dropout": ([call("scaled_dot_product_attention.default", tensor("x"), tensor("x"), tensor("x"),
                                     given("as_none", True), given("as_float", 0.5)), MEAN], "y", "a program in training"),
    "random numbers": ([call("rand_like.default", tensor("x")), MEAN], "y", "is not one of those"),
    "unbind": (made_wide(call("unbind.int", tensor("e"))), "y", "67,108,864 parts, the file names 1"),
    "chunk": (made_wide(call("chunk.default", tensor("e"), given("as_int", 2**26))), "y", "67,108,864 parts"),
    "split": (made_wide(call("split.Tensor", tensor("e"), given("as_int", 1))), "y", "67,108,864 parts"),
    "split by nothing": (made_wide(call("split.Tensor", tensor("e"), given("as_int", 0))), "y", "gives 0 parts"),
    "expand": ([call("expand.default", tensor("x"), given("as_ints", [2**21, 3, 8, 8])), MEAN], "y", "over the limits"),
    "full": ([call("full.default", given("as_ints", [2**40]), given("as_float", 1.0)), MEAN], "y", "makes over"),
    "arange": ([call("arange.start_step", given("as_int", 0), given("as_int", 2**60)), MEAN], "y", "makes over"),
    "arange without a step": ([call("arange.start_step", given("as_int", 0), given("as_int", 9), given("as_int", 0)), MEAN],
                              "y", "division by zero"),
    "an output that is a number": ([call("sym_size.int", tensor("x"), given("as_int", 1), to="#n")], "n",
                                   r"expected logits \(N, classes\), got int"),
    "an output that is a picture": ([call("relu.default", tensor("x"))], "q",
                                    r"expected logits \(N, classes\), got \[1, 3"),
    "infinite": ([call("view.default", tensor("x"), given("as_sym_ints", [{"as_int": float("inf")}])), MEAN], "y",
                 "a whole number of 64 bits, got 'inf'"),
    "a number of 400 digits": ([call("view.default", tensor("x"), given("as_ints", [10**400])), MEAN], "y",
                               "a whole number of 64 bits"),
    "a float of 400 digits": ([call("full.default", given("as_ints", [1]), given("as_float", 10**400)), MEAN], "y",
                              "a whole number of 64 bits"),
    "NaN": ([call("full.default", given("as_ints", [1]), given("as_float", float("nan"))), MEAN], "y", "expected a number"),
    "a long text": ([call("gelu.default", tensor("x"), given("as_string", "x" * 99, "approximate", 2)), MEAN], "y",
                    "expected a short text"),
    "a result twice": ([MEAN, MEAN], "y", "the same name"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    calls, output, said = HOSTILE[name]
    path = write(tmp_path / "net.pt2", calls, output)
    with pytest.raises(VerificationError, match=said) as refused:
        program_costs(path, read_torch_program(path), SHAPE)
    assert "\n" not in str(refused.value)


def test_every_operator_of_the_table_is_functional() -> None:
    for space, name, overload in TORCH_OPERATORS:
        with pytest.raises(CALL_ERRORS):  # looks all of them up, which checks them
            call_operator((space, name, overload), [], {}, 99, "cpu")
        operator = getattr(getattr(getattr(torch.ops, space), name), overload)
        assert isinstance(operator, torch._ops.OpOverload) and not operator._schema.is_mutable
        assert "generator" not in {each.name for each in operator._schema.arguments}
    assert set(IN_PLACE_TARGETS.values()) <= set(TORCH_OPERATORS)


def test_a_batch_may_not_take_more_than_its_images(tmp_path: Path) -> None:
    """Sizes taken from the batch may stand in a shape more than once: N images would then take N times N."""
    size = {"as_name": "n"}
    path = write(tmp_path / "net.pt2", [
        call("sym_size.int", tensor("x"), given("as_int", 0), to="#n"),
        call("expand.default", tensor("s"), given("as_sym_ints", [size, size, size, {"as_int": 3}])), MEAN])
    program = read_torch_program(path)
    program_costs(path, program, SHAPE)
    with pytest.raises(ValueError, match="64 images give"):
        check_batch(program, SHAPE, 64)
    runtime = open_file(path, SHAPE, Preprocessing())
    assert runtime(np.zeros((1, *SHAPE), np.float32)).shape == (1, 3)
    with pytest.raises(runtime.errors, match="64 images give"):
        runtime(np.zeros((64, *SHAPE), np.float32))


def test_an_index_out_of_range_is_an_error_of_the_runtime(tmp_path: Path) -> None:
    """Shapes alone do not show it."""
    runtime = open_file(write(tmp_path / "net.pt2", [
        call("mean.dim", tensor("x"), given("as_ints", [2, 3]), to="m"),
        call("_to_copy.default", tensor("v"), given("as_scalar_type", 5, "dtype", 2), to="i"),
        call("mul.Scalar", tensor("i"), given("as_int", 9), to="far"),
        call("index_select.default", tensor("m"), given("as_int", 1), tensor("far"), to="y")]), SHAPE, Preprocessing())
    with pytest.raises(runtime.errors, match=r"out of .*(bounds|range)"):
        runtime(np.zeros((1, *SHAPE), np.float32))


def test_a_changed_tensor_ends_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator of the table changes one. Were there one, the program's next answer would be another."""
    runtime = open_file(write(tmp_path / "net.pt2", [call("add.Tensor", tensor("s"), tensor("v")), MEAN]), SHAPE,
                        Preprocessing())
    monkeypatch.setattr("compress.evaluation.torch_programs.call_operator",
                        lambda operator, args, *more: [args[0].add_(1) if operator[1] == "add" else args[0].mean((2, 3))])
    with pytest.raises(runtime.errors, match="the program changes its tensor 's'"):
        runtime(np.zeros((1, *SHAPE), np.float32))


class Attentive(nn.Module):
    """A network like a vision transformer, with a class token and one layer of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.zeros(1, 1, 16))
        self.norm, self.whole = nn.LayerNorm(16), nn.Linear(16, 48)
        self.more, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(images.shape[0], -1, -1), patches], 1)
        query, key, value = self.whole(self.norm(tokens)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        found = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        answer: torch.Tensor = self.head(nn.functional.gelu(self.more(found) + tokens)[:, 0])
        return answer


@pytest.mark.parametrize(("name", "decomposed"), [
    ("mobilenet_v3_small", False), pytest.param("mobilenet_v3_small", True, marks=pytest.mark.slow), ("vit-like", False)])
def test_programs_of_other_tools_answer_as_their_modules(name: str, decomposed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if name == "vit-like":
        module: nn.Module = Attentive().eval()
    else:
        module = pytest.importorskip("torchvision").models.mobilenet_v3_small(num_classes=5).eval()
    images = torch.rand(3, 3, 32, 32)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("n")},))
    buffer = io.BytesIO()
    torch.export.save(program.run_decompositions() if decomposed else program, buffer)
    (tmp_path / "net.pt2").write_bytes(buffer.getvalue())
    runtime = open_file(tmp_path / "net.pt2", (3, 32, 32), Preprocessing())
    with torch.inference_mode():
        expected = module(images)
    got = torch.from_numpy(runtime(images.numpy()))
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.equal(torch.from_numpy(runtime(images.numpy())), got)
