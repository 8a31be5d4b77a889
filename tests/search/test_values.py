"""The value model: it ranks sub-networks that it has not seen, and knows which group and which block matters."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress.search.bench import RememberedTargets, fixed_batches
from compress.search.space import Choice
from compress.search.values import (FEWEST, ValueModel, importance, measured_loss, mild, nearest, rank_correlation,
                                    value_model)
from compress.training.distillation import METHODS, cross_entropy, distill
from compress.training.mixup import Batch
from tests.helpers.trainings import small_data
from tests.search.networks import network, space


def batches() -> list[Batch]:
    """Two batches of noise."""
    data = small_data(64)
    images = torch.rand(2, 32, *space("slim").architecture.input_shape, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(64).split(32)
    return [Batch(images=some, labels=data.train.labels[part], ids=part, view=0)
            for some, part in zip(images, ids, strict=True)]


def found(**changes: object) -> ValueModel:
    return value_model(space("slim"), network("slim")[0], batches(), cross_entropy(0.0), "l2", 12,
                       np.random.default_rng(0), **changes)  # type: ignore[arg-type]


def test_terms_are_there_for_every_width_and_block_and_fall_with_the_width(tmp_path: Path) -> None:
    model, own = found(), space("slim")
    assert {name: tuple(terms) for name, terms in model.terms.items()} == own.options
    assert set(model.blocks) == {block.name for block in own.blocks}
    for group in own.groups:
        assert model.terms[group.name][group.channels] == 0
        assert all(first >= second for first, second in itertools.pairwise(model.terms[group.name].values()))
    assert model.loss(own.full()) == 0 < model.loss(own.smallest(drop=True))
    model.save(tmp_path)
    again = ValueModel.load(tmp_path, "l2")
    assert again is not None and (again.terms, again.blocks, again.check) == (model.terms, model.blocks, model.check)
    assert all(torch.equal(again.scores[name], scores) for name, scores in model.scores.items())
    assert ValueModel.load(tmp_path, "taylor") is None
    own.network(Choice(widths=dict(own.smallest(drop=False).widths)), model.scores)


def test_it_ranks_losses_that_add_up() -> None:
    """A loss that is a sum of what each group and block is worth comes back, whatever the network."""
    own = space("slim")
    worth = {group.name: number + 1.0 for number, group in enumerate(own.groups)}
    scores = {name: each.sort().values for name, each in
              importance(network("slim")[0], own.architecture, batches(), cross_entropy(0.0), "l2").items()}

    def loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        widths = dict(model.named_modules())
        lost = sum(worth[group.name] * np.log2(group.channels / layer.weight.shape[0]) if (
            layer := widths.get(group.name)) is not None else 5.0 for group in own.groups)
        value = torch.tensor(float(lost)) + 0.0 * model(batch.images).sum()
        return value, value

    model = value_model(own, network("slim")[0], batches(), loss, "l2", 15, np.random.default_rng(1), drop=False)
    assert scores.keys() == model.scores.keys()
    assert model.check.complete and model.check.held_out == 5
    assert model.check.rank_correlation > 0.9
    halves = {group.name: model.terms[group.name][nearest(group.options[:-1], group.channels / 2)] for group in own.groups}
    assert rank_correlation(np.array([halves[name] for name in worth]), np.array([*worth.values()])) > 0.8


def test_little_time_leaves_a_model_of_few_sub_networks() -> None:
    model = found(has_time=lambda: False)
    assert (model.check.complete, model.check.held_out + model.check.fitted) == (False, FEWEST)


def test_statistics_of_batch_norm_are_those_of_the_batches_and_momentum_stays() -> None:
    model, some = copy.deepcopy(network("slim")[0]), batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    value = measured_loss(model, some, cross_entropy(0.0))
    assert value == measured_loss(model, some, cross_entropy(0.0))
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {norm.momentum for norm in norms.values()} == {0.1} and not model.training
    first = next(iter(norms))
    assert not torch.equal(before[f"{first}.running_mean"], norms[first].running_mean)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items() if name.endswith("weight"))


@pytest.mark.parametrize("drop", [False, True])
def test_random_sub_networks_are_mild_and_of_the_space(drop: bool) -> None:
    own, rng = space("slim"), np.random.default_rng(0)
    drawn = [mild(own, rng, drop) for _ in range(12)]
    for choice in drawn:
        own.check(choice)
    assert any(choice.dropped for choice in drawn) == drop
    assert len({*drawn}) > 8


def test_the_teacher_is_asked_once_about_batches_that_return() -> None:
    asked: list[Batch] = []

    def targets(batch: Batch) -> torch.Tensor:
        asked.append(batch)
        return torch.zeros(len(batch.ids), 5)

    some: Sequence[Batch] = batches()
    loss = distill(RememberedTargets(targets, some), METHODS["kd"], 0.0)
    values = [loss(network("slim")[0], batch)[0].item() for batch in [*some, *some]]
    assert values[:2] == values[2:] and len(asked) == len(some)


def test_fixed_batches_are_of_equal_size_and_the_same_each_time() -> None:
    data = small_data(60)
    one, other = (fixed_batches(data, torch.device("cpu"), 50, 16) for _ in range(2))
    assert [len(batch.ids) for batch in one] == [16, 16, 16]
    assert all(torch.equal(first.images, second.images) for first, second in zip(one, other, strict=True))
