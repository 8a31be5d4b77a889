"""Distillation by features: what the layers of student and teacher give at the same height and width.

Of all layers whose outputs have one height and width, the last is compared: it has seen the most before the next reduction.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from architectures.architecture import Architecture
from architectures.build import check_shapes
from compress.training.data import seeded
from compress.training.mixup import Batch, Loss, of_both_labels
from compress.training.precision import autocast
from metadata.errors import UserError

Size = tuple[int, int]  # height and width


# ------------------------------------------------------------------------------------------------------- the methods


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance of two maps of where a network looks: squares summed over channels, of length 1.

    Source: Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", eq. 2, as the mean of the squares, weighted
    by 500 as in its experiments (beta / 2).

    Args:
        student: (N, C, H, W).
        teacher: (N, D, H, W).
    """
    ours, theirs = (F.normalize(features.square().sum(1).flatten(1), dim=1) for features in (student, teacher))
    return 500 * F.mse_loss(ours, theirs)


def projected(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared distance of the student's projected features from the teacher's, in units of the latter.

    Source: Romero et al. 2015, "FitNets", eq. 3, with all stages at once and features divided by the teacher's root mean
    square, so that one weight suits all teachers.

    Args:
        student, teacher: (N, D, H, W).
    """
    scale = teacher.square().mean().sqrt() + 1e-6
    return F.mse_loss(student / scale, teacher / scale)


@dataclass(frozen=True, kw_only=True)
class FeatureMethod:
    """A method of distillation by features; `projects` where the student's channels are mapped to the teacher's."""

    loss: Callable[[Tensor, Tensor], Tensor]
    projects: bool


FEATURE_ALPHA = 0.5  # weight of the features' part unless given
FEATURE_METHODS = {"attention": FeatureMethod(loss=attention, projects=False),
                   "features": FeatureMethod(loss=projected, projects=True)}


# ------------------------------------------------------------------------------------------------- where to look


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a teacher gives features: at a module's n-th call, counted from 0, with some channels."""

    module: str
    call: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A layer of the student and a place in the teacher of one height and width."""

    layer: str
    channels: int
    place: Place


def places_of(teacher: nn.Module, images: Tensor) -> dict[Size, Place]:
    """Return the last place of each height and width in a teacher, without those of one pixel."""
    found: dict[Size, Place] = {}

    def see(name: str, call: int, output: Tensor) -> None:
        found[output.shape[2], output.shape[3]] = Place(module=name, call=call, channels=output.shape[1])

    with torch.no_grad(), _watched(teacher, see):
        teacher(images)
    return found


@contextlib.contextmanager
def _watched(model: nn.Module, see: Callable[[str, int, Tensor], None]) -> Iterator[None]:
    """Show the output of each call of a module that gives images (N, C, H, W) of more than one pixel."""
    calls: collections.Counter[str] = collections.Counter()

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def seen(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] * output.shape[3] > 1:
                see(name, calls[name], output)
            calls[name] += 1
        return seen

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pairs_of(architecture: Architecture, teacher: nn.Module, images: Tensor) -> list[Pair]:
    """Return what of a student and a teacher is compared, from the largest height and width on.

    Args:
        architecture: of the student.
        teacher: (N, C, H, W) -> (N, classes), in evaluation.
        images: (N, C, H, W), on the teacher's device.

    Raises:
        UserError: no layers have the same height and width.
    """
    places = places_of(teacher, images)
    layers: dict[Size, tuple[str, int]] = {}
    for name, shape in check_shapes(architecture).items():
        if name != "input" and len(shape) == 3:
            layers[shape[1], shape[2]] = name, shape[0]
    sizes = sorted(layers.keys() & places.keys(), reverse=True)
    if not sizes:
        raise UserError(f"no layer of the student has the height and width of a layer of the teacher (student: "
                        f"{_listed(layers)}; teacher: {_listed(places)}); set method kd")
    return [Pair(layer=layers[size][0], channels=layers[size][1], place=places[size]) for size in sizes]


def _listed(sizes: Iterable[Size]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in sorted(sizes, reverse=True)) or "none"


class TeacherFeatures:
    """A teacher that gives features.

    Args:
        teacher: (N, C, H, W) -> (N, classes).
        pairs: of which the places count.
        dtype: type to compute in, None for float32.
    """

    def __init__(self, teacher: nn.Module, pairs: Sequence[Pair], dtype: torch.dtype | None) -> None:
        self.teacher, self.dtype = teacher.eval(), dtype
        self.places = [(pair.place.module, pair.place.call) for pair in pairs]

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Return the features of a batch, one tensor for each pair."""
        seen: dict[tuple[str, int], Tensor] = {}

        def see(name: str, call: int, output: Tensor) -> None:
            if (name, call) in self.places:
                seen[name, call] = output.float()

        with torch.no_grad(), autocast(self.dtype, images.device), _watched(self.teacher, see):
            self.teacher(images)
        return [seen[place] for place in self.places]


class WithFeatures(nn.Module):
    """A student that gives its features beside its logits while it trains; in evaluation it gives the logits alone.

    Its weights are the student's own, and those of the projections.

    Args:
        student: as `architectures.build.build` makes it.
        pairs: of which the layers count.
        projects: whether to map the channels of each layer to the teacher's, by a 1x1 convolution.
    """

    def __init__(self, student: fx.GraphModule, pairs: Sequence[Pair], projects: bool) -> None:
        super().__init__()
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        logits = graph.graph_copy(student.graph, copies)
        nodes = {node.meta["layer"]: copy for node, copy in copies.items() if "layer" in node.meta}
        graph.output((logits, [nodes[pair.layer] for pair in pairs]))
        self.network = fx.GraphModule(student, graph)
        self.projections = nn.ModuleList(
            nn.Conv2d(pair.channels, pair.place.channels, 1, bias=False) if projects else nn.Identity() for pair in pairs)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        logits, features = self.network(images)
        if not self.training:
            return logits  # type: ignore[no-any-return]
        return logits, [project(each) for project, each in zip(self.projections, features, strict=True)]


def learner_by_features(name: str, student: fx.GraphModule, architecture: Architecture, teacher: nn.Module, *, alpha: float,
                        label_smoothing: float, seed: int, device: torch.device, dtype: torch.dtype | None = None
                        ) -> tuple[WithFeatures, Loss, list[Pair]]:
    """Return a student with its features, the loss function that compares them with a teacher's, and what is compared.

    Args:
        name: of the method, in `FEATURE_METHODS`.
        student: of the architecture.
        architecture: of the student.
        teacher: (N, C, H, W) -> (N, classes), on the device.
        alpha, label_smoothing: see `distill_features`.
        seed: of the projections' first weights.
        device: of the teacher.
        dtype: type to run the teacher in, None for float32.

    Raises:
        UserError: no layers have the same height and width.
    """
    method = FEATURE_METHODS[name]
    pairs = pairs_of(architecture, teacher.eval(), torch.zeros(1, *architecture.input_shape, device=device))
    with seeded(seed, "projections"):
        learner = WithFeatures(student, pairs, method.projects)
    return learner, distill_features(TeacherFeatures(teacher, pairs, dtype), method, alpha, label_smoothing), pairs


def distill_features(teacher: TeacherFeatures, method: FeatureMethod, alpha: float, label_smoothing: float) -> Loss:
    """Return the loss function of a `WithFeatures`: alpha of the mean over its pairs, the rest of the labels'."""
    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, features = model(batch.images)
        parts = [method.loss(ours.float(), theirs) for ours, theirs in zip(features, teacher(batch.images), strict=True)]
        hard = of_both_labels(batch, lambda labels: F.cross_entropy(logits, labels, label_smoothing=label_smoothing))
        return alpha * torch.stack(parts).mean() + (1 - alpha) * hard, logits
    return loss
