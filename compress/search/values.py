"""What a sub-network loses before it trains: the importance of channels, corrected by the measured losses of sub-networks.

The importance says which channels of a group matter least. How much a group as a whole matters, and what a block is worth,
is measured: each group alone at half its width, each block dropped alone, and a few dozen random sub-networks, none of
them trained. A model that adds a term for each group and each block is fitted to their losses, on a scale on which they
add up best. Some random sub-networks are held out, and the model is checked by how well it ranks them.

Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", for the importance; Yu et al. 2019,
"Slimmable Neural Networks", section 3, for statistics of batch norm that are estimated again for each sub-network.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import spearmanr
from torch import Tensor, fx, nn

from architectures.architecture import Architecture
from compress.pruning.groups import channel_groups
from compress.pruning.importance import NEEDS_GRADIENTS, accumulate_gradients
from compress.pruning.labels import find_units
from compress.search.solve import loss_of
from compress.search.space import Choice, Group, Space
from compress.training.mixup import Batch, Loss
from metadata.files import read_json, write_json
from metadata.formats import write_tensors
from metadata.schemas import Strict

Array = NDArray[np.float64]
HELD_OUT = 3  # one random sub-network in so many is held out for the check
FEWEST = 9  # random sub-networks, however little time there is
LEVELS, JITTER, DROPPED = (0.35, 1.0), 0.3, 0.1  # of random sub-networks: share of the channels, spread, blocks that go
SCALES: dict[str, Callable[[Array], Array]] = {"loss": lambda loss: loss, "root": np.sqrt, "log": np.log1p}
TIES = (0.03, 0.3, 3.0)  # how strongly a fit is drawn to one weight for all groups
FLOOR = 0.05  # of that weight is every group's: a group that seems to matter not at all would be left with nothing
VALUES, SCORES = "values-{}.json", "values-{}.pth"


class ValueCheck(Strict):
    """How well a value model ranks random sub-networks that it was not fitted to.

    Args:
        rank_correlation: Spearman's, between predicted and measured losses.
        importance_alone: the same, with one weight for all groups.
        held_out: number of random sub-networks that were held out.
        fitted: number of sub-networks that the model was fitted to for the check; the model itself is fitted to all.
        loss: of the whole network, on the same images.
        complete: whether there was time for all sub-networks.
    """

    rank_correlation: float
    importance_alone: float
    held_out: int
    fitted: int
    loss: float
    complete: bool


class _Table(Strict):
    """The file of a value model; its scores are in another."""

    criterion: str
    scale: str
    terms: dict[str, dict[int, float]]
    blocks: dict[str, float]
    check: ValueCheck


@dataclass(frozen=True, kw_only=True)
class ValueModel:
    """What the channels and blocks of a network are worth.

    Args:
        criterion: that ranked the channels, a key of `compress.pruning.importance.CRITERIA`.
        terms: by group and width, what the loss rises by when the group keeps so many channels; on a scale of its own, on
            which the terms add up.
        blocks: the same for each block that is dropped.
        check: how good the model is.
        scale: of the sum, a key of `SCALES`.
        scores: (units,) importance by group, for `Space.network`.
    """

    criterion: str
    terms: Mapping[str, Mapping[int, float]]
    blocks: Mapping[str, float]
    check: ValueCheck
    scale: str
    scores: Mapping[str, Tensor] = field(repr=False)

    def loss(self, choice: Choice) -> float:
        """Return the predicted rise of the loss on the model's scale: comparable between sub-networks of the space."""
        return loss_of(self, choice)

    def save(self, folder: Path) -> None:
        """Write the model, the table last."""
        write_tensors(folder / SCORES.format(self.criterion), dict(self.scores))
        table = _Table(criterion=self.criterion, scale=self.scale, check=self.check, blocks=dict(self.blocks),
                       terms={name: dict(widths) for name, widths in self.terms.items()})
        write_json(folder / VALUES.format(self.criterion), table.model_dump())

    @classmethod
    def load(cls, folder: Path, criterion: str) -> ValueModel | None:
        """Return the model that a folder holds, or None."""
        if not (folder / VALUES.format(criterion)).is_file():
            return None
        table: _Table = read_json(folder / VALUES.format(criterion), _Table)
        scores = torch.load(folder / SCORES.format(criterion), weights_only=True)
        return cls(**{key: getattr(table, key) for key in _Table.model_fields}, scores=scores)


def value_model(space: Space, model: fx.GraphModule, batches: Sequence[Batch], loss: Loss, criterion: str, samples: int,
                rng: np.random.Generator, *, drop: bool = True, has_time: Callable[[], bool] = lambda: True,
                advance: Callable[[int, int], None] = lambda done, total: None) -> ValueModel:
    """Return the value model of a network.

    Args:
        space: its sub-networks.
        model: the trained network, which stays as it is.
        batches: of training images, on the device to compute on; the loss is their mean.
        loss: of the training to come, with the teacher where there is one.
        criterion: a key of `compress.pruning.importance.CRITERIA`.
        samples: number of random sub-networks.
        rng: draws them.
        drop: whether blocks may go.
        has_time: whether another sub-network may be measured; `FEWEST` are in any case.
        advance: shows how many sub-networks are measured.

    Raises:
        UserError: the criterion cannot score a group.
    """
    scores = importance(model, space.architecture, batches, loss, criterion)
    alone = [*_single_groups(space), *(_single_blocks(space) if drop else [])]
    drawn = [mild(space, rng, drop) for _ in range(max(samples, FEWEST))]
    measured: list[tuple[Choice, float]] = []
    before = measured_loss(copy.deepcopy(model), batches, loss)
    for choice in (*drawn[:FEWEST], *alone, *drawn[FEWEST:]):  # without random ones there is no check
        if len(measured) < FEWEST or has_time():
            value = measured_loss(space.network(choice, scores), batches, loss) - before
            measured.append((choice, max(value, 0.0) if math.isfinite(value) else math.inf))
            advance(len(measured), len(drawn) + len(alone))
    return _model_of(space, measured, {*drawn}, scores, criterion, before, len(measured) == len(drawn) + len(alone))


def _model_of(space: Space, measured: Sequence[tuple[Choice, float]], drawn: set[Choice], scores: dict[str, Tensor],
              criterion: str, before: float, complete: bool) -> ValueModel:
    """Fit the model to what was measured: (sub-network, rise of the loss) each; `drawn` are the random ones."""
    worst = max((value for _, value in measured if np.isfinite(value)), default=0.0)
    losses = np.array([min(value, worst) for _, value in measured])
    shares = {group.name: _removed_shares(group, scores[group.name]) for group in space.groups}
    features = np.array([_features(space, shares, choice) for choice, _ in measured])
    random = np.array([choice in drawn for choice, _ in measured])
    held_out = random & (np.cumsum(random) % HELD_OUT == 0)
    scale, tie = _best_scale(features[~held_out], losses[~held_out])
    weights = _fitted(features[~held_out], SCALES[scale](losses[~held_out]), tie)
    count = len(space.groups)
    check = ValueCheck(rank_correlation=rank_correlation(features[held_out] @ weights, losses[held_out]),
                       importance_alone=rank_correlation(features[held_out, :count].sum(1), losses[held_out]),
                       held_out=int(held_out.sum()), fitted=int((~held_out).sum()), loss=before, complete=complete)
    weights = _fitted(features, SCALES[scale](losses), tie)
    terms = {group.name: {width: float(weights[index] * share + weights[count + index] * _halvings(group, width))
                          for width, share in shares[group.name].items()} for index, group in enumerate(space.groups)}
    blocks = {block.name: float(weights[2 * count + index]) for index, block in enumerate(space.blocks)}
    return ValueModel(criterion=criterion, scale=scale, check=check, scores=scores, terms=terms, blocks=blocks)


# ------------------------------------------------------------------------------------------------------- measurements


def importance(model: fx.GraphModule, architecture: Architecture, batches: Sequence[Batch], loss: Loss,
               criterion: str) -> dict[str, Tensor]:
    """Return (units,) importance by group; criteria with gradients take those of the loss on the batches."""
    whole = copy.deepcopy(model).eval().to(memory_format=torch.contiguous_format)  # channels last may be unsafe
    for parameter in whole.parameters():
        parameter.requires_grad_(True)
    if criterion in NEEDS_GRADIENTS:
        whole.to(batches[0].images.device)
        accumulate_gradients(lambda network: (loss(network, batch)[0] for batch in batches))(whole)
    units = find_units(architecture, {name: tensor.cpu() for name, tensor in whole.state_dict().items()})
    return {group.name: group.scores for group in channel_groups(whole, architecture, units, criterion)}


def measured_loss(model: nn.Module, batches: Sequence[Batch], loss: Loss) -> float:
    """Return the mean loss on the batches, after batch norm's statistics were estimated again on them; no weight trains.

    Args:
        model: the network; its statistics change.
        batches: of equal size.
        loss: mean loss of a batch.
    """
    model.to(batches[0].images.device).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over the batches
            norm.train()
        for batch in batches:
            model(batch.images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
        return float(torch.stack([loss(model, batch)[0] for batch in batches]).mean())


def mild(space: Space, rng: np.random.Generator, drop: bool) -> Choice:
    """Return a random sub-network that has learned something still: all widths near one share of the channels.

    Networks whose widths have nothing in common mostly guess when they are not trained, and cannot be ranked.
    """
    level = rng.uniform(*LEVELS)
    widths = {}
    for group in space.groups:
        target = group.channels * min(level * np.exp(rng.normal(0, JITTER)), 1.0)
        widths[group.name] = nearest(group.options, target)
    gone = frozenset(block.name for block in space.blocks if rng.random() < DROPPED and drop)
    return space.normal(Choice(widths=widths, dropped=gone))


def nearest(options: Sequence[int], target: float) -> int:
    """Return the option that is nearest to a number."""
    return min(options, key=lambda option: abs(option - target))


def _single_groups(space: Space) -> list[Choice]:
    """Return for each group that has a choice the network in which this group alone is half as wide."""
    full = space.full()
    return [Choice(widths={**full.widths, group.name: nearest(group.options[:-1], group.channels / 2)})
            for group in space.groups if len(group.options) > 1]


def _single_blocks(space: Space) -> list[Choice]:
    """Return for each block the network that lacks it alone."""
    return [space.normal(Choice(widths=space.full().widths, dropped=frozenset({block.name}))) for block in space.blocks]


# ---------------------------------------------------------------------------------------------------------------- fit


def _removed_shares(group: Group, scores: Tensor) -> dict[int, float]:
    """Return by width which share of the group's importance goes, in [0, 1]."""
    size = group.channels // len(scores)  # channels of a unit
    ranked = scores.double().clamp(min=0).sort(descending=True).values
    total = max(float(ranked.sum()), 1e-30)
    return {width: float(ranked[width // size:].sum()) / total for width in group.options}


def _halvings(group: Group, width: int) -> float:
    """Return how often the width was halved."""
    return math.log2(group.channels / width)


def _features(space: Space, shares: Mapping[str, Mapping[int, float]], choice: Choice) -> list[float]:
    """Return what the model adds up: by group the share of importance that goes, by group the halvings, dropped blocks."""
    return [*(shares[group.name][choice.widths[group.name]] for group in space.groups),
            *(_halvings(group, choice.widths[group.name]) for group in space.groups),
            *(float(block.name in choice.dropped) for block in space.blocks)]


def _fitted(features: Array, target: Array, tie: float) -> Array:
    """Return positive weights, by least squares that draw each weight to the one that fits best for all."""
    together = features.sum(1)
    common = max(float(together @ target) / max(float(together @ together), 1e-30), 0.0)
    count = features.shape[1]
    rows = np.vstack([features, math.sqrt(tie) * np.eye(count)])
    least = np.full(count, FLOOR * common)
    above, _ = nnls(rows, np.concatenate([target, np.full(count, math.sqrt(tie) * common)]) - rows @ least)
    return np.asarray(above + least)


def _best_scale(features: Array, losses: Array) -> tuple[str, float]:
    """Return the scale and the tie whose predictions rank best what they were not fitted to (cross-validation)."""
    folds = np.arange(len(losses)) % 5

    def quality(scale: str, tie: float) -> float:
        predicted = np.zeros(len(losses))
        for fold in range(5):
            inside = folds != fold
            if inside.any() and not inside.all():
                predicted[~inside] = features[~inside] @ _fitted(features[inside], SCALES[scale](losses[inside]), tie)
        return rank_correlation(predicted, losses)
    return max(((scale, tie) for scale in SCALES for tie in TIES), key=lambda pair: quality(*pair))


def rank_correlation(predicted: Array, measured: Array) -> float:
    """Return Spearman's rank correlation; 0 where one of the two is the same everywhere."""
    if len(predicted) < 2 or np.ptp(predicted) == 0 or np.ptp(measured) == 0:
        return 0.0
    return float(spearmanr(predicted, measured).statistic)
