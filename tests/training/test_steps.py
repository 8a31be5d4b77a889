"""What makes steps cheap on a GPU, tested without one: batches made together, Muon in batches, who gets a CUDA graph."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from compress.training.cuda import fast_kernels, step_of, why_not_captured
from compress.training.data import CHUNK_BYTES
from compress.training.distillation import cross_entropy
from compress.training.distributed import Team
from compress.training.mixup import Batch, cut, parts
from compress.training.muon import COEFFICIENTS, Muon, batches, orthogonalized, suits_muon
from compress.training.optimizers import make_optimizer
from compress.training.targets import CachedTargets
from compress.training.updates import Updater
from tests.helpers.commands import PROJECT
from tests.helpers.trainings import settings, small_data, WithDropout

SHAPES = [(32, 24, 3, 3), (32, 8, 3, 3), (64, 32, 3, 3), (32, 32, 3, 3), (300, 64), (64, 8, 1, 1), (16, 1, 3, 3)]


def muons(adjust_lr_fn: str) -> tuple[list[nn.Parameter], Any, list[nn.Parameter], Muon]:
    """Return the same parameters twice, under timm's Muon and under the project's."""
    from timm.optim import Muon as Reference

    generator = torch.Generator().manual_seed(0)
    theirs = [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in [*SHAPES, (40,)]]
    mine = copy.deepcopy(theirs)
    reference = Reference([{"params": theirs[:-2], "weight_decay": 0.05},
                           {"params": theirs[-2:], "weight_decay": 0.1, "use_fallback": True, "nesterov": False}], lr=0.1,
                          momentum=0.8, nesterov=True, adjust_lr_fn=adjust_lr_fn, fallback_lr_scale=0.3)
    ours = Muon([{"params": mine[:-2], "weight_decay": 0.05},
                 {"params": mine[-2:], "weight_decay": 0.1, "use_fallback": True}],
                lr=0.1, momentum=0.8, adjust_lr_fn=adjust_lr_fn, fallback_lr_scale=0.3)
    return theirs, reference, mine, ours


def step(parameters: list[nn.Parameter], optimizer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
def test_muon_is_timms_and_continues_its_checkpoint(adjust_lr_fn: str) -> None:
    theirs, reference, mine, ours = muons(adjust_lr_fn)
    before = [parameter.detach().clone() for parameter in theirs]
    for seed in range(3):
        step(theirs, reference, seed)
        step(mine, ours, seed)
    restored = copy.deepcopy(ours)
    continued = [parameter for group in restored.param_groups for parameter in group["params"]]
    restored.load_state_dict(copy.deepcopy(reference.state_dict()))
    with torch.no_grad():
        for parameter, value in zip(continued, theirs, strict=True):
            parameter.copy_(value)
    step(theirs, reference, 3)
    step(mine, ours, 3)
    step(continued, restored, 3)
    for start, expected, *found in zip(before, theirs, mine, continued, strict=True):
        moved = float((expected.detach() - start).norm())
        limit = 0.1 if suits_muon(expected.shape) else 1e-5  # timm turns in bfloat16, also where that is slow
        for parameter in found:
            assert float((parameter - expected).detach().norm()) < limit * moved, expected.shape


def test_matrices_turn_as_timms_do() -> None:
    from timm.optim.muon import resolve_ns_coefficients, zeropower_via_newtonschulz

    coefficients = resolve_ns_coefficients("quintic", {"quintic": COEFFICIENTS})
    matrices = torch.randn(3, 24, 70, generator=torch.Generator().manual_seed(2))
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        theirs = zeropower_via_newtonschulz(matrices, 5, coefficients, dtype=dtype)
        assert torch.allclose(orthogonalized(matrices.to(dtype)).float(), theirs.float(), atol=limit)


def test_a_learning_rate_in_a_tensor_is_the_learning_rate() -> None:
    ends = []
    for lr in (0.1, torch.tensor(0.1)):
        *_, mine, ours = muons("original")
        for group in ours.param_groups:
            group["lr"] = lr
        step(mine, ours, 0)
        ends.append(mine)
    for one, other in zip(*ends, strict=True):
        assert torch.allclose(one, other, atol=1e-7)


def test_padded_matrices_turn_as_they_do_alone() -> None:
    torch.manual_seed(0)
    wide, narrow = torch.randn(1, 8, 40), torch.randn(1, 8, 20)
    together = orthogonalized(torch.cat([wide, nn.functional.pad(narrow, (0, 20))]))
    assert torch.allclose(together[0], orthogonalized(wide)[0], atol=1e-5)
    assert torch.allclose(together[1, :, :20], orthogonalized(narrow)[0], atol=1e-5) and not together[1, :, 20:].any()
    singular = torch.linalg.svdvals(together)
    assert float(singular.min()) > 0.7 and float(singular.max()) < 1.3


def test_matrices_of_one_shape_are_one_batch_and_where_launches_cost_those_of_one_side() -> None:
    shapes = [(32, 24, 3, 3), (32, 32, 3, 3), (300, 64), (32, 24, 3, 3), (64, 8, 1, 1), (64, 300)]
    assert batches(shapes, padded=False) == [[0, 3], [1], [2, 5], [4]]
    assert batches(shapes, padded=True) == [[0, 1, 3], [2, 5], [4]]
    assert [suits_muon(shape) for shape in ((8, 3, 3, 3), (16, 1, 3, 3), (1, 9), (3, 40), (4, 600), (40,), (10, 64))] == [
        True, False, False, False, False, False, True]


def test_batches_made_together_are_those_made_alone() -> None:
    data = small_data(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    ids = list(order.split(16))
    how = {"view": 3, "size": 6, "device": torch.device("cpu"), "memory_format": torch.channels_last}
    alone = list(data.batches(ids, **how))
    together = cut(data.batch(order, data.train.images.batch(order), **how), [len(part) for part in ids])
    assert [len(batch.ids) for batch in alone] == [16, 16, 16, 12]
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.images, other.images) and other.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one.labels, other.labels) and torch.equal(one.ids, other.ids) and one.view == other.view == 3


def test_parts_differ_by_one_image_at_most() -> None:
    ids = torch.arange(11)
    batch = Batch(images=torch.zeros(11, 1, 1, 1), labels=ids, ids=ids, view=0, other_labels=ids.flip(0))
    assert [part.ids.tolist() for part in parts(batch, 3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [part.other_labels.tolist() for part in parts(batch, 3)][2] == [2, 1, 0]  # type: ignore[union-attr]


def updater(device: str, scaled: bool = False, team: Team = Team(), **changes: Any) -> Updater:  # noqa: B008
    model, chosen = WithDropout(), settings(cuda_graph=True, **changes)
    return Updater(model=model, network=model, loss=cross_entropy(0.0), settings=chosen, team=team,
                   optimizer=make_optimizer(chosen, model, torch.zeros(1, 3, 8, 8)),
                   scaler=torch.amp.GradScaler("cpu", enabled=scaled), dtype=None, device=torch.device(device))


def test_steps_are_captured_on_cuda_alone_and_never_where_the_host_decides() -> None:
    assert why_not_captured(updater("cuda")) == "" and "cpu" in why_not_captured(updater("cpu"))
    assert "float16" in why_not_captured(updater("cuda", scaled=True))
    assert "mixtures" in why_not_captured(updater("cuda", mixup=0.2))
    assert "processes" in why_not_captured(updater("cuda", team=Team(size=2)))
    assert "compiled" in why_not_captured(replace(updater("cuda"), network=nn.Sequential(WithDropout())))
    said: list[str] = []
    plain = updater("cpu")
    assert step_of(plain, said.append) == plain.step and said == ["cuda_graph is left out: the device is cpu"]
    silent = replace(plain, settings=settings())
    assert step_of(silent, said.append) == silent.step and len(said) == 1


def test_kernels_are_chosen_for_speed_on_cuda_alone_and_only_while_training() -> None:
    def chosen() -> tuple[bool, str]:
        return torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()

    before = chosen()
    with fast_kernels(torch.device("cpu")):
        assert chosen() == before
    with fast_kernels(torch.device("cuda")):
        assert chosen() == (True, "high")
    assert chosen() == before


def test_cached_targets_take_the_view_from_a_tensor_too() -> None:
    targets = CachedTargets(torch.arange(24.0).view(3, 4, 2).half())
    ids = torch.tensor([3, 1])
    batch = Batch(images=torch.zeros(2, 1, 1, 1), labels=ids, ids=ids, view=2)
    assert torch.equal(targets(batch), targets(replace(batch, view=torch.tensor([2]))))


def counted(*flags: str) -> dict[str, Any]:
    """Return the counts of a step on a device without content, in a process of its own, which such a device needs."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.operators", "--json", *flags], cwd=PROJECT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout).values()
    return dict(found["step"])


@pytest.mark.slow
@pytest.mark.parametrize(("config", "most"), [("cifar10_fast", 180), ("cifar10", 190)])
def test_a_step_copies_nothing_to_the_device_and_waits_for_nothing(config: str, most: int) -> None:
    step = counted("--configs", config)
    assert step["copies"] == step["synchronizations"] == 0 and 100 < step["operators"] <= most
    assert CHUNK_BYTES >= 4 * 3 * 32 * 32 * 500


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--optimizer", "sgd"], ["--optimizer", "adam"], ["--optimizer", "adamw"],
                                   ["--optimizer", "muon", "--accumulate", "2"],
                                   ["--optimizer", "sam", "--sam_base", "muon", "--clip", "1.0", "--ema", "0.9"]], ids=str)
def test_a_step_that_a_cuda_graph_would_capture_reads_nothing_back(flags: list[str]) -> None:
    step = counted("--captured", "--configs", "digits", "--batch_size", "32", *flags)
    assert step["copies"] == step["synchronizations"] == 0 and step["operators"] > 100
