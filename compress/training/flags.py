"""What `python -m compress train` takes: the settings of one whole training, read from YAML and from flags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from compress.settings import RECIPES, read_argument, read_as, read_mapping, settings_error
from compress.training.data_settings import DataSettings
from compress.training.settings import TrainingSettings
from loaders.catalog import set_name
from loaders.request import Request
from metadata.closest import closest
from metadata.errors import UserError

TRAINING_RECIPES = RECIPES / "training"


class TrainingRun(DataSettings, TrainingSettings):
    """One training, resolved: the data, the model, the machine, and how to train."""

    dataset: str = Field("cifar10", description="a set of loaders/; image_folder recognizes the format of any images")
    data_root: Path | None = Field(None, description="where the set is: a folder, a CSV, tars, torchvision's files")
    num_workers: int = Field(2, ge=1, le=256, description="threads or processes that decode images")
    validation_fraction: float = Field(0.1, ge=0, lt=1, validation_alias="val_fraction", description="share of the "
                                       "training images held out, class by class; 0: none")
    model_name: str = Field("resnet18", description="a model of the project, of torchvision or of timm")
    model_options: dict[str, Any] = Field({}, description="options of the model, such as {width: 32}")
    stem: Literal["auto", "imagenet", "small"] = Field(
        "auto", description="first layers of a ResNet; small: 3x3 of stride 1 without max-pool; auto: small for images "
        "of up to 64 pixels, trained from scratch")
    pretrained: bool = Field(False, description="start from the zoo's weights, which are downloaded unless they are cached")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is a CUDA device")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0: all that the process may use")
    seed: int = Field(0, ge=0, lt=2**32, description="of the split, the weights, the order and the augmentation")
    log_dir: Path = Field(Path("runs/train"), description="folder that is written")
    use_tensorboard: bool = Field(False, description="log to TensorBoard too")
    use_wandb: bool = Field(False, description="log to Weights & Biases too; offline unless you are logged in")
    wandb_project: str = Field("compress", pattern=r"^[^/\\#?%:]{1,128}$", description="project of Weights & Biases")

    WHERE: ClassVar = DataSettings.WHERE | TrainingSettings.WHERE | {
        "log_dir", "threads", "device", "num_workers", "use_tensorboard", "use_wandb", "wandb_project", "data_root"}

    @property
    def training(self) -> TrainingSettings:
        """How to train, without the rest of the run."""
        return TrainingSettings(**{key: getattr(self, key) for key in TrainingSettings.model_fields})

    def request(self, **others: Any) -> Request:
        """Return the settings of the data as the loaders take them; `others` are such as `hashes`."""
        return super().request(name=set_name(self.dataset), root=self.data_root, seed=self.seed, workers=self.num_workers,
                               validation_fraction=self.validation_fraction, **others)

    @model_validator(mode="after")
    def _check_what_is_monitored(self) -> TrainingRun:
        """Monitor the training loss where no images are held out."""
        if self.epochs == 0:
            raise ValueError("num_epochs: expected 1 or more, got 0")
        if self.validation_fraction == 0 and self.monitor == "validation":
            if self.schedule == "plateau" or self.early_patience or "monitor" in self.model_fields_set:
                raise ValueError("val_fraction 0 leaves no validation loss to watch; hold images out, or set monitor train")
            return self.model_copy(update={"monitor": "train", "keep": self.keep if "keep" in self.model_fields_set
                                           else "last"})
        return self


def parse_flags(arguments: Sequence[str]) -> dict[str, Any]:
    """Return `--key value`, `--key=value` and a bare `--key` (true) as a mapping; see `read_as` for the values.

    Raises:
        UserError: an argument is not a flag, or an unknown one (with the closest match), or its value is not YAML.
    """
    kinds = {"config": str, **TrainingRun.kinds()}
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        key, equals, text = flag.removeprefix("--").partition("=")
        if not flag.startswith("--"):
            raise UserError(f"{flag!r}: expected a flag such as --batch_size 64")
        if key not in kinds:
            raise UserError(f"--{key}: unknown{closest(key, kinds)} (`python -m compress train --help` lists the keys)")
        if not equals:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif kinds[key] not in (bool, bool | None):
                raise UserError(f"--{key}: expected a value after it")
            else:
                text = "true"
        found[key] = read_argument(kinds[key], text, f"--{key} {text!r}")
    return found


def resolve_training(arguments: Sequence[str], values: Mapping[str, Any] = MappingProxyType({})) -> TrainingRun:
    """Return the recipe that the flags name, with the changes of the other flags, and then those of `values`.

    Raises:
        UserError: an unknown recipe, flag or key (with the closest match), or a value of the wrong type.
    """
    flags = parse_flags(arguments)
    name = flags.pop("config", None)
    label, content = read_mapping(name, TRAINING_RECIPES, "--config") if name else ("train", {})
    content = TrainingRun.merged({"log_dir": f"runs/{label}", **content}, flags)
    return validated(TrainingRun.merged(content, dict(values)), f"--config {name}" if name else "train")


def validated(content: dict[str, Any], where: str) -> TrainingRun:
    """Return a mapping as a training's settings; `where` the mapping came from begins an error.

    Raises:
        UserError: an unknown key (with the closest match), or a value of the wrong type.
    """
    try:
        return TrainingRun.model_validate(read_as(TrainingRun, content))
    except ValidationError as error:
        raise settings_error(where, error, TrainingRun.names()) from error


def help_lines() -> Iterable[str]:
    """Return a line for each key, and for each other name of a key, for --help."""
    own = [key for key in TrainingRun.model_fields if key not in DataSettings.model_fields | TrainingSettings.model_fields]
    for key in (*own, *DataSettings.model_fields, *TrainingSettings.model_fields):
        info = TrainingRun.model_fields[key]
        default = info.get_default(call_default_factory=True)
        other = f" (also --{info.validation_alias})" if info.validation_alias else ""
        yield f"  --{key} = {default if default is not None else '(none)'}{other}  {info.description}"
    for key, description in TrainingRun.AMP.items():
        yield f"  --{key}  {description}"
