"""Quantization-aware training: its gradients pass, it learns, and a killed training resumes."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, fx, nn

from architectures.describe import describe
from compress.pipeline.stage import Context, TorchModel
from compress.pipeline.stages.finetune import Finetune
from compress.quantization.aware import FakeQuantizedActivation, FakeQuantizedLayer, prepare_aware, restored
from compress.quantization.int8_table import sqnr_db
from compress.quantization.weights import WEIGHT_FORMS, WeightForm
from compress.training.assessment import accuracy_of
from compress.training.data import Data
from compress.training.distillation import cross_entropy
from compress.training.loop import train
from compress.training.settings import TrainingSettings
from compress.training.trackers import Tracker
from loaders.augment import Augmenter
from loaders.catalog import load
from loaders.images import normalize
from loaders.request import Request
from tests.helpers.commands import Compress, assert_one_line_error
from tests.helpers.fake_quantized import assert_computes_with_the_weights_of, four_bits, network, parts, SHAPE, some
from tests.helpers.graphs import graph_of


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
    prepared = prepare_aware(model, [images], freeze_after=live, weights="8-bit").train()
    exact_one = copy.deepcopy(prepared)
    for part in itertools.chain(*parts(exact_one)):
        part.calibrating = True  # nothing is rounded, and all else is as in training
    expected, exact, got = (gradients(one, images) for one in (model.train(live), exact_one, prepared))
    assert expected.keys() <= exact.keys() == got.keys() and len(expected) == (12 if kind == "plain" else 18)
    for name, gradient in expected.items():
        if float(gradient.norm()) > 1e-4:  # not a bias that batch norm takes away
            assert sqnr_db(gradient, exact[name]) > (30 if kind == "off" else 80), name
            assert float(F.cosine_similarity(gradient.flatten(), got[name].flatten(), 0)) > 0.75, name


@pytest.mark.parametrize("form", WEIGHT_FORMS)
def test_gradients_pass_the_rounding_of_weights_unchanged(form: WeightForm) -> None:
    layer = parts(prepare_aware(network("plain"), some(1), weights=form))[0][0]
    weight = layer.layer.weight
    rounded, gradient = layer.rounded(weight), torch.randn_like(weight)
    rounded.backward(gradient)
    assert weight.grad is not None and torch.equal(weight.grad, gradient) and not torch.equal(rounded, weight)


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
    prepared = prepare_aware(model, some(1), freeze_after=100, weights=four_bits(per_channel)).train()
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
    images = normalize(splits.train.images.batch(torch.arange(512)), preprocessing)
    balanced, model = model, unbalanced(model)
    with torch.no_grad():
        assert exact > 0.93 and torch.allclose(model(images), balanced(images), rtol=1e-3, atol=1e-3)
    passes = 10 * (len(splits.train) // 64)
    prepared = prepare_aware(model, [images], freeze_after=passes // 2, weights=four_bits(per_channel=False))
    lost = exact - accuracy_of(prepared, test, preprocessing)
    assert lost > 0.15
    assert exact - fit(prepared, "rounded", 0.002) < 0.6 * lost


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


@pytest.mark.slow
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
    assert note["accuracy"] > note["accuracy_post_training"] and not context.warnings


def test_a_finetuning_that_harms_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = student(4)
    learned, _ = finetuned(tmp_path / "learned", model, Finetune(train=TrainingSettings(
        epochs=5, batch_size=64, lr=0.05, augment=[])))
    model.load_state_dict(learned)
    _, context = finetuned(tmp_path / "harmed", model, Finetune(quantization_aware=True, train=TrainingSettings(
        epochs=1, batch_size=192, lr=50.0, schedule="constant", augment=[])))
    note = context.notes["simulated_int8"]
    assert note["accuracy"] < note["accuracy_post_training"] - 0.005
    assert context.warnings and "quantization-aware training lost" in context.warnings[0]


def test_settings_that_would_do_nothing_are_refused(compress: Compress) -> None:
    for key in ("weights=7-bit", "freeze_after=0.1"):
        name = key.partition("=")[0]
        assert_one_line_error(compress("plan", "slim_resnet18_digits", f"finetune.{key}"),
                              f"finetune.{name}: the setting has no effect without quantization_aware: true")


def test_bfloat16_is_refused_at_plan_time(compress: Compress) -> None:
    aware = ["plan", "slim_resnet18_digits", "finetune.quantization_aware=true"]
    assert_one_line_error(compress(*aware, "finetune.train.precision=bfloat16"), "finetune.train.precision", "bfloat16")
    done = compress(*aware)
    assert done.returncode == 0 and "quantization-aware" in done.stdout
