"""Quantization-aware training: its grids are those of the real int8 model, its gradients pass, and it learns."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from rich.console import Console
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from architectures.build import build
from architectures.describe import describe
from architectures.folding import fold_batch_norm
from compress.packaging.export import export
from compress.pipeline.stage import Context, TorchModel
from compress.pipeline.stages.finetune import Finetune
from compress.quantization.aware import FakeQuantizedActivation, FakeQuantizedLayer, prepare_aware, restored
from compress.quantization.dynamic import quantize_graph, quantize_weight
from compress.quantization.int8_table import sqnr_db
from compress.quantization.static import Calibration, StaticSettings, quantize_static as static_file
from compress.training.assessment import accuracy_of
from compress.training.data import Data
from compress.training.distillation import cross_entropy
from compress.training.loop import train
from compress.training.memory_format import unsafe_channels_last
from compress.training.settings import TrainingSettings
from compress.training.trackers import Tracker
from loaders.augment import Augmenter
from loaders.catalog import load
from loaders.images import normalize
from loaders.request import Request
from metadata.errors import UserError
from tests.helpers.commands import Compress, assert_one_line_error

SHAPE = (3, 16, 16)


class Network(nn.Module):
    """What static int8 treats each in its own way: depthwise, ReLU6, a residual sum, a pool, BatchNorm1d, Linear."""

    def __init__(self, norms: bool = True) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, kernel: int, groups: int = 1) -> list[nn.Module]:
            layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=not norms)
            return [layer, nn.BatchNorm2d(outputs)] if norms else [layer]
        self.stem = nn.Sequential(*block(3, 16, 3), nn.ReLU())
        self.depthwise = nn.Sequential(*block(16, 16, 3, groups=16), nn.ReLU6())
        self.pointwise = nn.Sequential(*block(16, 16, 1))
        self.wide = nn.Sequential(nn.MaxPool2d(2), *block(16, 24, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(24, 20), *([nn.BatchNorm1d(20)] if norms else []), nn.ReLU())
        self.fc = nn.Linear(20, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        return self.fc(self.hidden(self.wide(torch.relu(x + self.pointwise(self.depthwise(x))))))


def graph_of(model: nn.Module, shape: tuple[int, int, int] = SHAPE) -> fx.GraphModule:
    graph = build(describe(model.eval(), shape))
    graph.load_state_dict(model.state_dict())
    return graph.eval()


def network(kind: str = "norms") -> fx.GraphModule:
    """With batch norms that are not the identity; "off": a third of the channels are switched off."""
    torch.manual_seed(0)
    model = Network(norms=kind != "plain")
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            if kind == "off":
                module.weight.data[::3] = 0
    return graph_of(model)


def some(batches: int = 4, seed: int = 1) -> list[Tensor]:
    return list(torch.randn(batches, 32, *SHAPE, generator=torch.Generator().manual_seed(seed)))


def parts(prepared: nn.Module) -> tuple[list[FakeQuantizedLayer], list[FakeQuantizedActivation]]:
    modules = list(prepared.modules())
    return ([module for module in modules if isinstance(module, FakeQuantizedLayer)],
            [module for module in modules if isinstance(module, FakeQuantizedActivation)])


class Weights(TorchFunctionMode):
    """Collects the weights that convolutions and products are computed with, in the order of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv2d, F.linear):
            self.seen.append(args[1].detach())
        return func(*args, **(kwargs or {}))


def assert_computes_with_the_weights_of(prepared: fx.GraphModule, model: fx.GraphModule) -> None:
    """The prepared network's weights in eval mode are the int8 ones of the folded network."""
    folded = fold_batch_norm(model)
    names = [str(node.target) for node in folded.graph.nodes if node.op == "call_module"]
    layers = [layer for name in names if isinstance(layer := folded.get_submodule(name), (nn.Conv2d, nn.Linear))]
    with torch.no_grad(), Weights() as weights:
        prepared(some()[0])
    for got, layer in zip(weights.seen, layers, strict=True):
        levels, scale = quantize_weight(layer.weight.detach(), "")
        wide = scale.view(-1, *[1] * (got.dim() - 1))
        off = (got - levels * wide).abs() / wide  # one multiplies by 1 / scale, the other divides: a tie may go either way
        assert float(off.max()) < 1.001 and float((off > 1e-3).float().mean()) < 1e-3


# ----------------------------------------------------------------------------------------------- as the real int8 model


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches, as ONNX Runtime's calibration takes them."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"input": batch.numpy()}


@pytest.mark.parametrize("kind", ["norms", "off", "plain"])
def test_eval_mode_is_onnx_runtimes_static_int8(kind: str, tmp_path: Path) -> None:
    model, batches, images = network(kind), some(), some(1, seed=2)[0]
    before, code = copy.deepcopy(model.state_dict()), model.code
    prepared = prepare_aware(model, batches)
    assert model.code == code and not model.training and not prepared.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_computes_with_the_weights_of(prepared, model)
    exported, _ = export(model, describe(model, SHAPE))
    onnx.save(exported, tmp_path / "float.onnx")
    quantize_static(tmp_path / "float.onnx", tmp_path / "int8.onnx", Reader(batches), quant_format=QuantFormat.QDQ,
                    per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    constants = {tensor.name: numpy_helper.to_array(tensor)
                 for tensor in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    grids = {(float(f"{float(constants[name]):.5g}"), int(constants[name.replace("_scale", "_zero_point")]))
             for name in constants if name.endswith("_scale") and not constants[name].ndim}
    steps = [(float(activation.high - activation.low) / 255, activation) for activation in parts(prepared)[1]]
    assert grids == {(float(f"{step:.5g}"), round(float(-activation.low) / step)) for step, activation in steps}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact sums without VNNI too
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx", options, ["CPUExecutionProvider"])
    expected = torch.from_numpy(session.run(None, {"input": images.numpy()})[0])
    with torch.no_grad():
        got, exact = prepared(images), model(images)
    assert float((got - expected).abs().max()) < 4.1 * steps[-1][0]  # logits are on a grid; a value on an edge moves some
    assert float(((got - expected).abs() < 0.01 * steps[-1][0]).float().mean()) > 0.75
    assert sqnr_db(expected, got) > 40 and sqnr_db(exact, got) > 35


def test_seven_bits_are_those_of_reduced_range() -> None:
    model = network("plain")
    exported, _ = export(model, describe(model, SHAPE))
    file = static_file(Calibration(exported, some()[0].numpy()), StaticSettings(reduced=True, correct=False)).model
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    stored = [constants[node.input[0]] * constants[node.input[1]].reshape(-1, *[1] * (constants[node.input[0]].ndim - 1))
              for node in file.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]
    with torch.no_grad(), Weights() as weights:
        prepare_aware(model, some(), weight_bits=7)(some()[0])
    matched = [min(float(np.abs(got.numpy() - levels).max()) / float(np.abs(levels).max()) for levels in stored
                   if levels.shape == tuple(got.shape)) for got in weights.seen[-len(stored):]]
    assert len(matched) == len(stored) > 2 and max(matched) < 1e-5


def test_what_cannot_be_prepared_gets_one_line() -> None:
    with pytest.raises(UserError, match=r"^quantization-aware training: the model is int8 already[^\n]*$"):
        prepare_aware(quantize_graph(network())[0], some())
    with pytest.raises(UserError, match=r"^quantization-aware training: the model has no Conv2d or Linear[^\n]*$"):
        prepare_aware(graph_of(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())), some())
    with pytest.raises(UserError, match=r"^quantization-aware training: there are no images[^\n]*$"):
        prepare_aware(network(), [])


# ------------------------------------------------------------------------------------------------------------- training


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """By the names of the original network."""
    model.zero_grad()
    F.cross_entropy(model(images), torch.arange(len(images)) % 10).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantizedLayer):
            norm = {} if module.norm is None else module.norm.named_parameters()
            found |= {f"{name}.{key}": parameter.grad for key, parameter in module.layer.named_parameters()}
            found |= {f"{module.norm_name}.{key}": parameter.grad for key, parameter in dict(norm).items()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("kind", ["norms", "off", "plain"])
@pytest.mark.parametrize("live", [True, False], ids=["live", "frozen"])
def test_gradients_are_those_of_the_float_network(kind: str, live: bool) -> None:
    model, images = network(kind), some(1)[0]
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1.0
    model.train()(images)  # remembered statistics are the batch's: a channel that is off has no others
    prepared = prepare_aware(model, [images], freeze_after=live).train()
    exact_one = copy.deepcopy(prepared)
    for part in itertools.chain(*parts(exact_one)):
        part.calibrating = True  # nothing is rounded, and all else is as in training
    expected, exact, got = (gradients(one, images) for one in (model.train(live), exact_one, prepared))
    assert expected.keys() <= exact.keys() == got.keys() and len(expected) == (12 if kind == "plain" else 18)
    for name, gradient in expected.items():
        if float(gradient.norm()) > 1e-4:  # not a bias that batch norm takes away
            assert sqnr_db(gradient, exact[name]) > (30 if kind == "off" else 80), name
            assert float(F.cosine_similarity(gradient.flatten(), got[name].flatten(), 0)) > 0.75, name


def test_gradients_pass_inside_the_range_and_not_outside() -> None:
    activation = FakeQuantizedActivation(0)
    activation.low.fill_(-1)
    activation.high.fill_(2)
    values = torch.tensor([-5.0, -1.1, -0.9, 0.0, 1.9, 2.1, 9.0], requires_grad=True)
    rounded = activation(values)
    rounded.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert torch.allclose(rounded, values.clamp(-1, 2), atol=3 / 255) and rounded[3] == 0


def test_ranges_and_statistics_follow_the_batches_and_then_freeze() -> None:
    model, batches = network(), some(6)
    prepared = prepare_aware(model, batches[:1], freeze_after=3).train()
    model.train()

    def statistics() -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in prepared.named_buffers() if not name.endswith("seen")}

    seen = [statistics()]
    for images in batches:
        with torch.no_grad():
            prepared(images)
            if len(seen) <= 3:
                model(images)
        seen.append(statistics())
    for step, (before, after) in enumerate(itertools.pairwise(seen)):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert bool(moved) == (step < 3)
    assert {name.rpartition(".")[2] for name in seen[0] if not torch.equal(seen[0][name], seen[3][name])} == {
        "low", "high", "running_mean", "running_var", "num_batches_tracked"}
    for layer in parts(prepared)[0]:
        if layer.norm is not None:
            norm = model.get_submodule(layer.norm_name)
            assert layer.norm.num_batches_tracked == norm.num_batches_tracked == 3
            assert sqnr_db(norm.running_mean, layer.norm.running_mean) > 30  # type: ignore[arg-type]
            assert sqnr_db(norm.running_var, layer.norm.running_var) > 30  # type: ignore[arg-type]
    first = parts(prepared)[1][0]  # of the input: the mean over three batches
    assert torch.allclose(first.low, torch.stack([batch.min() for batch in batches[:3]]).mean(), rtol=1e-5)


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_channel_that_shows_nothing_keeps_its_statistics(per_channel: bool) -> None:
    """Its weights are all rounded to 0: gamma is 0, or with one scale for all the others' weights are much larger."""
    model = network()
    norm = model.get_submodule("stem.1")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
    with torch.no_grad():
        norm.weight[:4] = 0 if per_channel else 1e-3
    prepared = prepare_aware(model, some(1), freeze_after=100, weight_bits=4, per_channel=per_channel).train()
    for images in some(20):
        gradient = gradients(prepared, images)["stem.1.weight"]
        assert bool(gradient.isfinite().all())
    kept = prepared.get_buffer("stem.0.norm.running_var") == norm.running_var
    assert kept[:4].all() and not kept[4:].any()


@pytest.mark.parametrize("kind", ["norms", "plain"])
def test_restored_is_the_original_architecture_with_the_weights_that_were_trained(kind: str) -> None:
    model = network(kind)
    prepared = prepare_aware(model, some(), freeze_after=2)
    optimizer = torch.optim.SGD(prepared.train().parameters(), 0.02)
    for images in some():
        gradients(prepared, images)
        optimizer.step()
    result = restored(prepared.eval(), model)
    assert describe(result, SHAPE, "Same") == describe(model, SHAPE, "Same") and not result.training
    changed = {name for name, tensor in result.state_dict().items() if not torch.equal(tensor, model.state_dict()[name])}
    assert changed == set(model.state_dict())
    assert_computes_with_the_weights_of(prepared, result)
    again = prepare_aware(result, some())
    for mine, trained in zip(parts(again)[1], parts(prepared)[1], strict=True):
        mine.load_state_dict(trained.state_dict())
    with torch.no_grad():  # the ranges are all that is left behind
        assert torch.equal(again(some()[0]), prepared(some()[0]))


def student(width: int = 8) -> fx.GraphModule:
    """A narrow depthwise network for 8x8 grey digits, which 4-bit weights with one scale a layer hurt."""
    def block(inputs: int, outputs: int, kernel: int, groups: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs),
                nn.ReLU()]
    return graph_of(nn.Sequential(
        *block(1, width, 3), *block(width, width, 3, width), *block(width, 2 * width, 1), nn.MaxPool2d(2),
        *block(2 * width, 2 * width, 3, 2 * width), *block(2 * width, 2 * width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(2 * width, 10)), (1, 8, 8))


def unbalanced(model: fx.GraphModule) -> fx.GraphModule:
    """The same function with channels of very different ranges, which one scale a layer cannot serve with 4 bits.

    A ReLU passes a positive factor on, so a batch norm's channels are multiplied by what the next layer divides by.
    """
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for norm, layer, ends in (("1", "3", (-1, 1)), ("7", "10", (1, -1))):
            factor = torch.logspace(*ends, len(changed.get_parameter(f"{norm}.weight")), base=2.5)
            changed.get_parameter(f"{norm}.weight").mul_(factor)
            changed.get_parameter(f"{norm}.bias").mul_(factor)
            changed.get_parameter(f"{layer}.weight").div_(factor.view(-1, 1, 1, 1))
    return changed


def test_training_recovers_what_four_bits_lose(tmp_path: Path) -> None:
    """Seeds 0 to 7 lose 0.24 or more, and recover 0.68 of that or more."""
    splits = load(Request(name="digits", channels=1))
    preprocessing, test = splits.card.preprocessing, splits.open_test()
    augmenter = Augmenter(names=[], size=(8, 8), padding=0, seed=0, samples=len(splits.train))
    data = Data(train=splits.train, validation=splits.validation, augmenter=augmenter, preprocessing=preprocessing)

    def fit(model: nn.Module, name: str, lr: float) -> float:
        settings = TrainingSettings(epochs=10, batch_size=64, lr=lr, compile=False)
        train(model, data, cross_entropy(0), settings, label=name, seed=0, device=torch.device("cpu"),
              checkpoint=tmp_path / f"{name}.pth", tracker=Tracker(Console(file=io.StringIO())))
        return accuracy_of(model, test, preprocessing)
    torch.manual_seed(0)
    model = student()
    exact = fit(model, "float", 0.1)
    model = unbalanced(model)
    assert exact > 0.93 and abs(accuracy_of(model, test, preprocessing) - exact) < 0.006
    images = normalize(splits.train.images.batch(torch.arange(512)), preprocessing)
    passes = 10 * (len(splits.train) // 64)
    prepared = prepare_aware(model, [images], freeze_after=passes // 2, weight_bits=4, per_channel=False)
    lost = exact - accuracy_of(prepared, test, preprocessing)
    assert lost > 0.15
    assert exact - fit(prepared, "rounded", 0.002) < 0.6 * lost


@pytest.mark.skipif("AVX512" in torch.backends.cpu.get_cpu_capability(), reason="no layer is unsafe with AVX512")
def test_a_wrapped_layer_that_is_unsafe_channels_last_is_found() -> None:
    """The backward pass of a narrow 1x1 convolution with a stride corrupts memory, wrapped or not."""
    model = graph_of(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                                   nn.Conv2d(4, 8, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)))
    device = torch.device("cpu")
    assert "layer 3:" in unsafe_channels_last(model, device)
    assert "layer 3.layer:" in unsafe_channels_last(prepare_aware(model, some(1)), device)


# ------------------------------------------------------------------------------------------------------ stage finetune


class KilledError(Exception):
    """The process ends here."""


class Stopping(Tracker):
    """Ends the training when the row of an epoch is due: the last checkpoint is of the step before it."""

    def epoch(self, label: str, **row: Any) -> None:
        if row["epoch"] == 3:
            raise KilledError
        super().epoch(label, **row)


def finetuned(folder: Path, model: fx.GraphModule, stage: Finetune, tracker: type[Tracker] = Tracker,
              ) -> tuple[dict[str, Tensor], Context]:
    folder.mkdir(exist_ok=True)
    context = Context(splits=load(Request(name="digits", channels=1)), device=torch.device("cpu"), seed=0,
                      folder=folder, run_folder=folder, tracker=tracker(Console(file=io.StringIO()), folder),
                      outputs=[], measurements={})
    result = stage.run(TorchModel(model, describe(model, (1, 8, 8))), context)
    assert result.architecture.compression_steps == ["finetuning"] and describe(model, (1, 8, 8)).layers == \
        result.architecture.layers
    return result.module.state_dict(), context


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_finetuning_is_repeatable_and_resumes_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = student(4)
    before = copy.deepcopy(model.state_dict())
    settings = TrainingSettings(epochs=4, batch_size=192, lr=0.05, augment=["crop"], padding=1, checkpoint_seconds=0,
                                ema=0.9, optimizer=optimizer)  # type: ignore[arg-type]
    stage = Finetune(quantization_aware=True, freeze_after=0.5, train=settings)
    first, context = finetuned(tmp_path / "first", model, stage)
    again, _ = finetuned(tmp_path / "again", model, stage)
    with pytest.raises(KilledError):
        finetuned(tmp_path / "killed", model, stage, Stopping)
    state = torch.load(tmp_path / "killed" / "checkpoint.pth", weights_only=True)
    steps = len(context.splits.train) // 192
    passes = 2 if optimizer == "sam" else 1
    assert state["step"] == 3 * steps - 1 and state["model"]["activation_ranges.input_1.seen"] == passes * state["step"]
    resumed, _ = finetuned(tmp_path / "killed", model, stage)
    for other in (again, resumed):
        assert all(torch.equal(tensor, other[name]) for name, tensor in first.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert first["1.num_batches_tracked"] == 2 * steps  # it counts no passes after freezing, nor SAM's second ones
    note = context.notes["simulated_int8"]
    assert note["accuracy"] > note["accuracy_post_training"]


def test_settings_that_would_do_nothing_are_refused(compress: Compress) -> None:
    for key in ("weight_bits=7", "freeze_after=0.1"):
        name = key.partition("=")[0]
        assert_one_line_error(compress("plan", "slim_resnet18_digits", f"finetune.{key}"),
                              f"finetune.{name}: the setting has no effect without quantization_aware: true")


def test_bfloat16_is_refused_at_plan_time(compress: Compress) -> None:
    aware = ["plan", "slim_resnet18_digits", "finetune.quantization_aware=true"]
    assert_one_line_error(compress(*aware, "finetune.train.precision=bfloat16"), "finetune.train.precision", "bfloat16")
    done = compress(*aware)
    assert done.returncode == 0 and "quantization-aware" in done.stdout
