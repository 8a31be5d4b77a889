"""Plans of scaling studies: a point is the configuration of one experiment, a plan is a YAML file for many points.

A plan has common keys and a list of sweeps. The kinds of sweeps are width, depth, data, joint and constant_compute.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError

from compress.settings import Config, RECIPES, read_as, read_mapping, settings_error
from compress.training.settings import TrainingSettings
from metadata.closest import closest
from metadata.errors import UserError

PLANS = RECIPES / "scaling"


# How every point is trained. Without `augment`, the data set's card decides whether images are mirrored. The test split
# takes the place of the validation split: it is measured, and nothing is chosen by it.
TRAINING = TrainingSettings(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, schedule="cosine", warmup=0.0,
                            padding=4, drop_last=False, monitor="train", keep="last", precision="float32", compile=False)

# The part of a point's id that is the same for all. A change makes every finished point another point.
IDENTITY = TRAINING.model_dump(include={"optimizer", "lr", "momentum", "weight_decay", "schedule", "padding"}) | {
    "augment": ["crop", "flip"]}

WIDEST, DEEPEST = 2**16, 2**10  # larger networks make no sense for small images, and exhaust the memory


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a whole number, got true or false")
    return value


Positive = Annotated[int, BeforeValidator(_no_boolean), Field(ge=1)]
Width = Annotated[int, BeforeValidator(_no_boolean), Field(ge=1, le=WIDEST)]
Depth = Annotated[int, BeforeValidator(_no_boolean), Field(ge=1, le=DEEPEST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Device = Literal["auto", "cpu", "cuda"]


class Point(Config):
    """The configuration of one experiment: everything that decides its result."""

    seed: Seed = Field(0, description="seed of the subset, the initial weights, the order and the augmentation")
    batch_size: int = Field(256, ge=2, description="images a step; the last batch of an epoch may be smaller")
    num_epochs: Positive = Field(100, description="passes over the subset")
    test_freq: Positive = Field(5, description="epochs between measurements of the test split; the last is always measured")
    width: Width = Field(32, description="channels of the first stage")
    depth: Depth = Field(2, description="convolution blocks a stage")
    dataset_size: int = Field(50_000, ge=2, description="training images, a subset drawn class by class")
    dataset: str = Field("cifar10", description="name of a data set; see loaders/")

    @property
    def training(self) -> TrainingSettings:
        """How the point is trained."""
        return TRAINING.model_copy(update={"epochs": self.num_epochs, "batch_size": self.batch_size,
                                           "measure_every": self.test_freq})

    @property
    def id(self) -> str:
        """A readable name that is unique to the configuration."""
        content = json.dumps([self.model_dump(mode="json"), IDENTITY], sort_keys=True)
        return f"{self.shape}-s{self.seed}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"

    @property
    def shape(self) -> str:
        """The sizes without the seed, for display."""
        return f"w{self.width}-d{self.depth}-D{self.dataset_size}-e{self.num_epochs}"


def make_point(where: str, **settings: Any) -> Point:
    """Return a point with validated settings; `where` is the start of the error message.

    Raises:
        UserError: a size that is not positive, or of the wrong type.
    """
    try:
        return Point.model_validate(settings)
    except ValidationError as error:
        raise settings_error(where, error, Point.model_fields) from error


def _by_size(value: Any) -> Any:
    """Convert a number, or a mapping from dataset_size to a number, to a mapping."""
    numbers = {1: value} if not isinstance(value, dict) else value
    if not numbers or not all(isinstance(number, int) and not isinstance(number, bool) and number >= 1
                              for pair in numbers.items() for number in pair):
        raise ValueError("expected a positive whole number, or one for each dataset_size from which on it holds, such as "
                         "{1000: 100, 50000: 20}")
    return numbers


BySize = Annotated[dict[int, int], BeforeValidator(_by_size)]
Sizes = Annotated[list[Positive], Field(min_length=1)]
Widths = Annotated[list[Width], Field(min_length=1)]
Depths = Annotated[list[Depth], Field(min_length=1)]
CountParameters = Callable[[int, int], int]  # (width, depth) -> N


class _Sweep(Config):
    """The keys that all kinds of sweeps share; None takes the value of the plan."""

    seeds: Annotated[list[Seed], Field(min_length=1)] | None = Field(None, description="each point is run with each seed")
    batch_size: Positive | None = Field(None, description="images a step")
    test_freq: BySize | None = Field(None, description="epochs between measurements of the test split")

    def shapes(self) -> Iterator[tuple[int, int, int]]:
        """Yield (width, depth, dataset_size) of the points."""
        raise NotImplementedError

    def epochs(self, plan: SweepPlan, width: int, depth: int, size: int, parameters: CountParameters) -> int:
        """Return the number of passes over the subset."""
        raise NotImplementedError


class _WithEpochs(_Sweep):
    num_epochs: BySize | None = Field(None, description="passes over the subset")

    def epochs(self, plan: SweepPlan, width: int, depth: int, size: int, parameters: CountParameters) -> int:
        return _ruled(self.num_epochs or plan.num_epochs, size, "num_epochs")


class WidthSweep(_WithEpochs):
    """Networks of several widths."""

    kind: Literal["width"]
    widths: Widths
    depth: Depth = 2
    dataset_size: Positive

    def shapes(self) -> Iterator[tuple[int, int, int]]:
        return ((width, self.depth, self.dataset_size) for width in self.widths)


class DepthSweep(_WithEpochs):
    """Networks of several depths."""

    kind: Literal["depth"]
    depths: Depths
    width: Width
    dataset_size: Positive

    def shapes(self) -> Iterator[tuple[int, int, int]]:
        return ((self.width, depth, self.dataset_size) for depth in self.depths)


class DataSweep(_WithEpochs):
    """One network on subsets of several sizes."""

    kind: Literal["data"]
    dataset_sizes: Sizes
    width: Width
    depth: Depth = 2

    def shapes(self) -> Iterator[tuple[int, int, int]]:
        return ((self.width, self.depth, size) for size in self.dataset_sizes)


class _Grid(_Sweep):
    widths: Widths
    depths: Depths = [2]
    dataset_sizes: Sizes

    def shapes(self) -> Iterator[tuple[int, int, int]]:
        return ((width, depth, size) for width in self.widths for depth in self.depths for size in self.dataset_sizes)


class JointSweep(_Grid, _WithEpochs):
    """Every network on every subset: a grid over N and D."""

    kind: Literal["joint"]


class ComputeSweep(_Grid):
    """Every network on every subset, with the number of epochs that gives a constant N * D * epochs."""

    kind: Literal["constant_compute"]
    compute: float = Field(gt=0, description="N * D * epochs")
    tolerance: float = Field(0.05, gt=0, lt=1, description="relative deviation from `compute` that a point may have")

    def epochs(self, plan: SweepPlan, width: int, depth: int, size: int, parameters: CountParameters) -> int:
        one = parameters(width, depth) * size
        epochs = max(1, round(self.compute / one))
        if abs(epochs * one / self.compute - 1) > self.tolerance:
            raise UserError(f"constant_compute: no whole number of epochs brings width {width}, depth {depth} (N "
                            f"{parameters(width, depth):,}) on {size:,} images within {self.tolerance:.0%} of "
                            f"{self.compute:.3g}: {epochs} epochs are {epochs * one:.3g}, "
                            f"{self.compute / one:.3g} would do; change compute, the sizes or tolerance")
        return epochs


AnySweep = Annotated[WidthSweep | DepthSweep | DataSweep | JointSweep | ComputeSweep, Field(discriminator="kind")]
SWEEP_KINDS: dict[str, type[_Sweep]] = {"width": WidthSweep, "depth": DepthSweep, "data": DataSweep, "joint": JointSweep,
                                        "constant_compute": ComputeSweep}


class SweepPlan(Config):
    """A study: common keys, and sweeps that may have their own seeds, batch_size, num_epochs and test_freq."""

    dataset: str = Field("cifar10", description="name of a data set; see loaders/")
    data_root: Path | None = Field(None, description="folder of its files: an image folder or torchvision's files")
    download: bool = Field(False, description="let torchvision download a missing data set")
    base_dir: Path = Field(Path("."), description="results are written to results/ below this folder")
    device: Device = Field("auto", description="auto: CUDA if available")
    checkpoint_seconds: float = Field(20.0, ge=0, description="seconds between the checkpoints of a point")
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field([0], description="each point is run with each seed")
    batch_size: int = Field(256, ge=2, description="images a step")
    num_epochs: BySize = Field({1: 100}, description="a number, or a number for each dataset_size from which on it holds")
    test_freq: BySize = Field({1: 5}, description="epochs between measurements, given like num_epochs")
    sweeps: list[AnySweep] = Field(min_length=1, description="one or more")

    def points(self, parameters: CountParameters) -> list[Point]:
        """Return all points, each once.

        Args:
            parameters: (width, depth) -> N.

        Raises:
            UserError: a rule has no number for a size, or no whole number of epochs meets a constant compute.
        """
        found: dict[str, Point] = {}
        for sweep in self.sweeps:
            for width, depth, size in sweep.shapes():
                epochs = sweep.epochs(self, width, depth, size, parameters)
                test_freq = _ruled(sweep.test_freq or self.test_freq, size, "test_freq")
                for seed in sweep.seeds or self.seeds:
                    point = make_point("plan", seed=seed, batch_size=sweep.batch_size or self.batch_size, num_epochs=epochs,
                                       test_freq=test_freq, width=width, depth=depth, dataset_size=size,
                                       dataset=self.dataset)
                    found[point.id] = point
        return list(found.values())

    def changed(self, **settings: Any) -> Self:
        """Return a copy with the settings that are not None."""
        return self.model_copy(update={key: value for key, value in settings.items() if value is not None})


def _ruled(rule: dict[int, int], size: int, key: str) -> int:
    """Return the number for a size: that of the largest dataset_size in the rule up to this size."""
    number = rule.get(max((start for start in rule if start <= size), default=0))
    if number is None:
        raise UserError(f"plan: {key} says nothing for dataset_size {size}, only from {min(rule)} on")
    return number


def read_plan(name: str) -> SweepPlan:
    """Read a packaged plan by its name, or a YAML file.

    Raises:
        UserError: an unknown plan, bad YAML, an unknown key (with the closest match), or a value out of range.
    """
    content = read_as(SweepPlan, read_mapping(name, PLANS, "plan")[1])
    if "kind" in content:  # a single sweep may have its keys among the common keys
        own = {key: content.pop(key) for key in list(content) if key not in SweepPlan.model_fields}
        others = content.get("sweeps") or []
        if not isinstance(others, list):
            raise UserError(f"plan {name}: sweeps: expected a list of sweeps, got {others!r}")
        content["sweeps"] = [own, *others]
    try:
        return SweepPlan.model_validate(content)
    except ValidationError as error:
        first, known = error.errors()[0], f"(known: {', '.join(SWEEP_KINDS)})"
        if first["type"] == "union_tag_not_found":
            raise UserError(f"plan {name}: {_place(first['loc'])}: kind is missing {known}") from error
        if first["type"] == "union_tag_invalid":
            kind = first["ctx"]["tag"]
            raise UserError(f"plan {name}: {_place(first['loc'])}: unknown kind {kind!r}{closest(kind, SWEEP_KINDS)} "
                            f"{known}") from error
        kind = next((found["loc"][2] for found in error.errors() if len(found["loc"]) > 3), None)  # sweeps.0.KIND.key
        raise settings_error(f"plan {name}", error, SWEEP_KINDS.get(str(kind), SweepPlan).model_fields) from error


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location)
