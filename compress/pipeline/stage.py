"""Stages: what a stage is, what passes between stages, and what a stage may use while it runs."""

from __future__ import annotations

import importlib
import pkgutil
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import Field, RootModel
from torch import fx, nn

import compress.pipeline.stages
from architectures.architecture import Architecture
from architectures.int8 import int8_modules
from architectures.weights import open_model, read_weights
from architectures.zoo import make
from compress.packaging.formats.base import ONNX_FORMAT
from compress.settings import Config
from compress.training.data import Data, check_sizes, training_data
from compress.training.precision import usable
from compress.training.settings import TrainingSettings
from compress.training.trackers import Tracker
from loaders.augment import examples
from loaders.splits import Splits
from metadata.closest import closest
from metadata.errors import UserError
from metadata.files import read_json, write_atomically, write_json
from metadata.formats import write_weights
from metadata.records import DatasetCard, ModelReference
from metadata.schemas import Strict

ARCHITECTURE, WEIGHTS, REFERENCE = "architecture.json", "weights.pth", "model.json"
MODEL, ONNX_SUFFIX = "model", ".onnx"
ONNX = MODEL + ONNX_SUFFIX
ONNX_CARD = "onnx.json"


# ------------------------------------------------------------------------------------ what passes between stages


@dataclass(frozen=True)
class TeacherModel:
    """A trained model with the name that builds it; it need not be traceable."""

    module: nn.Module
    reference: ModelReference

    def save(self, folder: Path) -> None:
        write_json(folder / REFERENCE, self.reference.model_dump())
        write_weights(folder / WEIGHTS, _on_cpu(self.module))

    @classmethod
    def load(cls, folder: Path) -> Self:
        reference: ModelReference = read_json(folder / REFERENCE, ModelReference)
        module = make(reference.name, num_classes=reference.num_classes, **reference.options)
        module.load_state_dict(read_weights(folder / WEIGHTS))
        return cls(module.eval(), reference)


@dataclass(frozen=True)
class TorchModel:
    """A model that its architecture describes completely."""

    module: fx.GraphModule
    architecture: Architecture

    def save(self, folder: Path) -> None:
        write_json(folder / ARCHITECTURE, self.architecture.to_json())
        write_weights(folder / WEIGHTS, _on_cpu(self.module))

    @classmethod
    def load(cls, folder: Path) -> Self:
        architecture: Architecture = read_json(folder / ARCHITECTURE, Architecture)
        return cls(open_model(architecture, folder / WEIGHTS), architecture)


class OnnxCard(Strict):
    """`onnx.json`: what is known about an ONNX file beside its graph."""

    scheme: Literal["none", "static_int8"] = "none"
    layers: dict[str, str] = {}  # layer name -> "int8: ..." or "float32: reason"
    backend: Literal["onnxruntime", "openvino"] = "onnxruntime"  # the runtime that the ONNX file is measured on
    format: str = ONNX_FORMAT  # what is served; see `compress/packaging/formats/`
    suffixes: list[str] = []  # of the files of another format than ONNX; the runtime opens the first
    portability: dict[str, Any] | None = None  # see compress/quantization/portability.py


@dataclass(frozen=True, kw_only=True)
class OnnxModel:
    """An ONNX file, which runs on ONNX Runtime or OpenVINO and has no torch module; or that network in another format.

    Stages work on the ONNX file. What is measured, packaged and evaluated is the network in the format of the card.

    Args:
        content: the ONNX file's bytes.
        architecture: the float network that the file was exported from, BatchNorm folded, with its history.
        files: the files of another format by their suffixes; none where the format is ONNX.
    """

    content: bytes
    architecture: Architecture
    card: OnnxCard = field(default_factory=OnnxCard)
    files: dict[str, bytes] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        write_json(folder / ARCHITECTURE, self.architecture.to_json())
        write_json(folder / ONNX_CARD, self.card.model_dump())
        write_atomically(folder / ONNX, self.content)
        self.write_served(folder)

    def write_served(self, folder: Path) -> Path:
        """Write the files in the format that is served. Return the one that the runtime opens."""
        for suffix, content in (self.files or {ONNX_SUFFIX: self.content}).items():
            write_atomically(folder / f"{MODEL}{suffix}", content)
        return self.served_file(folder)

    def served_file(self, folder: Path) -> Path:
        """Return the path of the file that the runtime opens, in the folder that the model was saved in."""
        return folder / f"{MODEL}{self.card.suffixes[0] if self.files else ONNX_SUFFIX}"

    @property
    def backend(self) -> str | None:
        """The runtime that serves the model; None for the first one of its format."""
        return None if self.files else self.card.backend

    @classmethod
    def load(cls, folder: Path) -> Self:
        architecture: Architecture = read_json(folder / ARCHITECTURE, Architecture)
        card: OnnxCard = read_json(folder / ONNX_CARD, OnnxCard)
        files = {suffix: (folder / f"{MODEL}{suffix}").read_bytes() for suffix in card.suffixes}
        return cls(content=(folder / ONNX).read_bytes(), architecture=architecture, card=card, files=files)


@dataclass(frozen=True)
class Submission:
    """A packaged folder."""

    folder: Path

    def save(self, folder: Path) -> None:
        write_json(folder / "submission.json", {"folder": str(self.folder.relative_to(folder.parent))})

    @classmethod
    def load(cls, folder: Path) -> Self:
        content = read_json(folder / "submission.json", RootModel[dict[str, str]]).root
        return cls(folder.parent / content.get("folder", ""))


@dataclass(frozen=True)
class Evaluation:
    """A scored submission: the content of its results.json."""

    results: dict[str, Any]

    def save(self, folder: Path) -> None:
        write_json(folder / "results.json", self.results)

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(read_json(folder / "results.json", RootModel[dict[str, Any]]).root)


Artifact = TeacherModel | TorchModel | OnnxModel | Submission | Evaluation
SomeArtifact = TypeVar("SomeArtifact", bound=Artifact)
KINDS: dict[Any, str] = {type(None): "nothing", TeacherModel: "a teacher", TorchModel: "a student",
                         OnnxModel: "an ONNX model", Submission: "a submission", Evaluation: "an evaluation"}


def _on_cpu(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


# ------------------------------------------------------------------------------------------- what stages work with


@dataclass(kw_only=True)
class Context:
    """What a stage may use while it runs, and where it leaves notes."""

    splits: Splits
    device: torch.device
    seed: int
    folder: Path  # the stage's
    run_folder: Path
    tracker: Tracker
    outputs: list[Artifact]  # one for each earlier stage
    measurements: dict[str, Any]  # the latest ledger row, as numbers by name
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    extra_models: dict[str, tuple[TorchModel, float]] = field(default_factory=dict)  # by label, with seconds
    training_seconds: float = 0.0  # over all sittings

    def note(self, key: str, value: Any) -> None:
        """Write a note into stage.json."""
        self.notes[key] = value

    def warn(self, text: str) -> None:
        """Warn the user now and at the end of the run, and keep the warning in stage.json."""
        self.warnings.append(text)
        self.tracker.warn(text)

    def latest(self, *kinds: type[SomeArtifact]) -> SomeArtifact | None:
        """Return the latest output that is of one of the kinds, or None."""
        return next((output for output in reversed(self.outputs) if isinstance(output, kinds)), None)

    def examples(self, count: int) -> torch.Tensor:
        """Return training images chosen by the run's seed; see `loaders.augment.examples`."""
        return examples(self.splits, count, self.seed)

    def usable(self, train: TrainingSettings) -> TrainingSettings:
        """Return a stage's training settings, in float32 where this CPU cannot compute in the precision asked for."""
        return usable(train, self.device, self.warn)

    def data(self, train: TrainingSettings) -> Data:
        """Return the splits on the device, with the training's augmentation."""
        return training_data(self.splits.train, self.splits.validation, self.splits.card, train, seed=self.seed,
                             device=self.device)


class Stage(Config):
    """One step of a pipeline. A file in `compress/pipeline/stages/` holds one; the file's stem is its name in a recipe.

    A stage returns a new model and leaves its input unchanged. The stage transforms; the pipeline measures.
    """

    history: ClassVar[str | None] = None  # the entry that the stage adds to compression_steps
    opens_test: ClassVar[bool] = False  # whether the stage may open the test split

    def modules(self) -> list[str]:
        """Return the modules that the stage finds by name instead of importing them, such as that of a model family."""
        return []

    def reads(self) -> dict[str, Any]:
        """Return what the stage reads beside its settings and the files they name, such as baselines, as JSON values."""
        return {}

    def check(self, sketch: Sketch) -> None:
        """Raise UserError for what is sure to fail before anything runs; sketch the model that the stage will make."""

    def run(self, model: Any, context: Context) -> Any:
        """Return the transformed model. The annotations of the arguments say which stages may come before."""
        raise NotImplementedError


class CompressingStage(Stage):
    """A stage that must make the model smaller or faster: the pipeline refuses a result that is neither."""

    allow_slower: bool = Field(False, description="accept a result that is slower and not smaller")


@dataclass(kw_only=True)
class Sketch:
    """What a plan knows before anything trains: the data, and an untrained model of the shape that stages will make."""

    card: DatasetCard
    seed: int
    teachers: int = 0
    teacher: tuple[str, dict[str, Any]] | None = None  # name and options, once they were checked
    model: fx.GraphModule | None = None
    is_onnx: bool = False  # the model is an ONNX file at this point
    is_static_int8: bool = False
    format: str = ONNX_FORMAT  # that the model is served in, once it is an ONNX file
    lines: list[str] = field(default_factory=list)  # one for each stage: what it would do
    warnings: list[str] = field(default_factory=list)  # what the run will warn of

    def check_training(self, stage: str, train: TrainingSettings) -> None:
        """Raise UserError for training settings that the data cannot take."""
        try:
            check_sizes(train, self.card.input_shape)
        except UserError as error:
            raise UserError(f"{stage}.train.{error}") from error

    def refuse_int8(self, stage: str) -> None:
        """Raise UserError where the sketched model is int8 already."""
        if self.model is not None and int8_modules(self.model):
            raise UserError(f"stage {stage}: the model is int8 by then; put the stage before quantize_dynamic")


def stage_names() -> list[str]:
    """Return the names of the stages: the files of `compress/pipeline/stages/`."""
    return sorted(module.name for module in pkgutil.iter_modules(compress.pipeline.stages.__path__))


def stage_class(name: str) -> type[Stage]:
    """Return the stage in `compress/pipeline/stages/<name>.py`.

    Raises:
        UserError: there is no such stage (with the closest match).
    """
    if name not in stage_names():
        raise UserError(f"stage {name!r}: unknown{closest(name, stage_names())} (known: {', '.join(stage_names())})")
    module = importlib.import_module(f"compress.pipeline.stages.{name}")
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Stage)
               and value.__module__ == module.__name__]
    assert len(classes) == 1, f"{module.__name__} must define one stage"
    return classes[0]


def signature(stage: type[Stage]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the kinds of artifact that a stage accepts (type(None) for a first stage), and those that it may return."""
    hints = typing.get_type_hints(stage.run)
    takes, gives = (typing.get_args(hints[key]) or (hints[key],) for key in ("model", "return"))
    return takes, gives


def load_output(stage: type[Stage], folder: Path) -> Artifact:
    """Return what a stage left in its folder."""
    _, gives = signature(stage)
    kind = gives[0] if len(gives) == 1 else OnnxModel if (folder / ONNX_CARD).is_file() else TorchModel
    found: Artifact = kind.load(folder)
    return found
