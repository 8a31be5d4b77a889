"""What `python -m compress train` can be told: every key with its default, read from YAML and from flags."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from compress.settings import Augmentation, Config, RECIPES, load_yaml, read_mapping, settings_error
from metadata.closest import closest
from metadata.errors import UserError, first_line

TRAINING_RECIPES = RECIPES / "training"

# Names that scripts of this kind use for the same things.
SAME = {"steplr": "step", "reducelronplateau": "plateau", "onecycle": "one_cycle", "onecyclelr": "one_cycle",
        "cosineannealinglr": "cosine", "none": "constant"}


def _known_name(value: Any) -> Any:
    """A name in lower case, in this project's words."""
    return SAME.get(value.lower(), value.lower()) if isinstance(value, str) else value


def _by_epoch(value: Any) -> Any:
    """`0:128,10:256` as a mapping from epoch to number."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*:\s*\d+\s*(,\s*\d+\s*:\s*\d+\s*)*", value):
        value = [tuple(part.split(":")) for part in value.replace(" ", "").split(",")]
        if len({int(epoch) for epoch, _ in value}) < len(value):
            raise ValueError("an epoch stands there twice")
        return dict(value)
    return value


def _by_comma(value: Any) -> Any:
    """`crop,flip` as a list."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Positive = Annotated[int, Field(ge=1)]
Epoch = Annotated[int, Field(ge=0)]
Folder = Annotated[Path, AfterValidator(Path.expanduser)]
ByEpoch = Annotated[dict[Epoch, Positive], BeforeValidator(_by_epoch)]


class TrainingConfig(Config):
    """One training, resolved: enough to repeat it."""

    dataset: str = Field("cifar10", description="see loaders/; `image_folder` for any folder of images")
    data_root: Folder | None = Field(None, description="where its files are: an image folder or torchvision's files")
    download: bool = Field(False, description="let torchvision fetch a missing set")
    num_classes: int | None = Field(None, ge=1, description="refuse data with another number of classes")
    image_size: int | None = Field(None, ge=1, le=4096, description="side in pixels that images are brought to")
    num_workers: int = Field(2, ge=1, le=256, description="threads or processes that decode images")
    val_fraction: float = Field(0.1, ge=0, lt=1, description="share of train held out, class by class; 0: none")
    memory_limit_gb: float = Field(4.0, gt=0, description="splits that decode to more stream from disk")
    skip_unreadable: bool = Field(False, description="leave damaged images out, and say how many")
    augment: Annotated[list[Augmentation] | None, BeforeValidator(_by_comma)] = Field(
        None, description="in this order, crop,flip; the default is that (no flip for digits)")
    padding: int = Field(4, ge=0, le=256, description="pixels, of the random crop")
    affine_degrees: float = Field(10.0, ge=0, le=180, description="affine augmentation: rotation to either side")
    affine_scale: float = Field(0.1, ge=0, lt=1, description="affine augmentation: share of the size")
    affine_shear: float = Field(0.1, ge=0, description="affine augmentation: share of the height")
    affine_shift: float = Field(2.0, ge=0, description="affine augmentation: pixels")
    mixup: float = Field(0.0, ge=0, description="alpha of the Beta distribution; 0: none")
    model_name: str = Field("resnet18", description="the project's own, torchvision's or timm's")
    model_options: dict[str, Any] = Field({}, description="the model's own, such as {width: 32}")
    stem: Literal["auto", "imagenet", "small"] = Field(
        "auto", description="of ResNets; small: 3x3 of stride 1, no max-pool; auto: small up to 64 pixels from scratch")
    pretrained: bool = Field(False, description="start from the zoo's weights (a download unless they are cached)")
    num_epochs: int = Field(10, ge=1, le=100_000, description="passes over the training split")
    batch_size: int = Field(128, ge=2, description="images a step, of all processes together")
    bs_schedule: ByEpoch = Field({}, description="epoch (from 0) to images a step from then on, 0:128,10:256")
    accumulate: int = Field(1, ge=1, description="parts in which a step's batch is worked")
    optimizer: Annotated[Literal["sgd", "adam", "adamw", "muon", "sam"], BeforeValidator(_known_name)] = Field(
        "sgd", description="sgd, adam, adamw, muon, sam; SGD has Nesterov momentum")
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD and Muon only")
    weight_decay: float = Field(5e-4, ge=0, description="not on norms and biases")
    adamw_lr: float = Field(0.002, gt=0, description="Muon only: peak rate of what is left to AdamW")
    head_lr: float = Field(0.0, ge=0, description="Muon only: peak rate of the last matrix; 0: adamw_lr")
    muon_scale: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw", description="Muon only: how a matrix's shape scales its step")
    sam_base: Literal["sgd", "adam", "adamw", "muon"] = Field("sgd", description="SAM only: the optimizer that steps")
    sam_rho: float = Field(0.05, gt=0, description="SAM only: length of the ascent")
    scheduler: Annotated[Literal["cosine", "linear", "step", "plateau", "one_cycle", "constant"],
                         BeforeValidator(_known_name)] = Field(
        "cosine", description="cosine, linear, step, plateau, one_cycle, constant")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with a rising rate (one_cycle: 0 is 0.3)")
    anneal: float = Field(1.0, gt=0, le=1, description="share of the training at which the schedule has ended")
    lr_floor: float = Field(0.0, ge=0, lt=1, description="factor on the peak rate that the schedule ends at")
    step_size: int = Field(0, ge=0, description="step: epochs between drops; 0: at a half and at three quarters")
    gamma: float = Field(0.1, gt=0, le=1, description="step: factor of a drop, with step_size")
    patience: int = Field(5, ge=0, description="plateau: epochs without a lower loss before a drop")
    factor: float = Field(0.1, gt=0, lt=1, description="plateau: factor of a drop")
    early_patience: int = Field(0, ge=0, description="stop after so many epochs without a lower loss; 0: never")
    keep: Literal["best", "last"] = Field("best", description="the weights that are kept; best: lowest watched loss")
    monitor: Literal["validation", "train"] = Field("validation", description="the loss that is watched")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the cross-entropy")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the weight average that is measured and kept; 0: none")
    clip: float = Field(0.0, ge=0, description="largest gradient norm; 0: no limit")
    size_schedule: ByEpoch = Field({}, description="epoch (from 0) to side in pixels from then on, 0:24,4:32")
    use_amp: bool = Field(False, description="mixed precision, where the device has it")
    amp_dtype: Literal["auto", "float16", "bfloat16"] = Field("auto", description="auto: bfloat16 where there is it")
    compile: bool | None = Field(None, description="let torch compile the network; where it is long and faster, tried")
    channels_last: bool | None = Field(None, description="memory format of images and kernels; by the network")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0: all that the process may use")
    seed: int = Field(0, ge=0, lt=2**32, description="of the split, the weights, the order and the augmentation")
    log_dir: Folder = Field(Path("runs/train"), description="the folder that is written")
    checkpoint_seconds: float = Field(20.0, ge=0, description="time between checkpoints")
    use_tensorboard: bool = Field(False, description="log to TensorBoard too")
    use_wandb: bool = Field(False, description="log to Weights & Biases too; offline unless you are logged in")
    wandb_project: str = Field("compress", pattern=r"^[^/\\#?%:]{1,128}$", description="Weights & Biases: the project")

    @model_validator(mode="after")
    def _chains(self) -> TrainingConfig:
        if self.val_fraction == 0 and self.monitor == "validation":
            if self.scheduler == "plateau" or self.early_patience or "monitor" in self.model_fields_set:
                raise ValueError("val_fraction 0 leaves no validation loss to watch; hold images out, or set monitor train")
            return self.model_copy(update={"monitor": "train", "keep": "last" if "keep" not in self.model_fields_set
                                           else self.keep})
        return self

    WHERE: ClassVar = frozenset({"log_dir", "threads", "device", "num_workers", "checkpoint_seconds", "use_tensorboard",
                                 "use_wandb", "wandb_project", "download", "data_root", "memory_limit_gb"})


def parse_flags(arguments: Sequence[str]) -> dict[str, Any]:
    """`--key value`, `--key=value` and a bare `--key` (true) as a mapping; values are YAML.

    Raises:
        UserError: something that is not a flag, an unknown one (with the closest match), or not a YAML value.
    """
    known = ["config", *TrainingConfig.model_fields]
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        key, equals, text = flag.removeprefix("--").partition("=")
        if not flag.startswith("--"):
            raise UserError(f"{flag!r}: expected a flag such as --batch_size 64")
        if key not in known:
            raise UserError(f"--{key}: unknown{closest(key, known)} (`python -m compress train --help` lists the keys)")
        switch = key != "config" and TrainingConfig.model_fields[key].annotation in (bool, bool | None)
        if not equals:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif not switch:
                raise UserError(f"--{key}: expected a value after it")
            else:
                text = "true"
        try:
            found[key] = load_yaml(text) if _is_yaml(key) else text
        except yaml.YAMLError as error:
            raise UserError(f"--{key} {text!r}: not a YAML value: {first_line(error)}") from error
    return found


def _is_yaml(key: str) -> bool:
    """Whether a flag's value is read as YAML; names and paths are taken as they are, whatever characters are in them."""
    if key == "config":
        return False
    kind = TrainingConfig.model_fields[key].annotation
    return kind not in (str, Path) and get_origin(kind) is not Literal and not any(
        get_origin(part) is Annotated and get_args(part)[0] is Path for part in (kind, *get_args(kind)))


def resolve_training(arguments: Sequence[str]) -> TrainingConfig:
    """The recipe that the flags name, with what the flags change.

    Raises:
        UserError: an unknown recipe, flag or key (with the closest match), or a value of the wrong type.
    """
    flags = parse_flags(arguments)
    name = flags.pop("config", None)
    label, content = read_mapping(name, TRAINING_RECIPES, "--config") if name else ("train", {})
    return validated({"log_dir": f"runs/{label}", **content, **flags}, f"--config {name}" if name else "train")


def validated(content: dict[str, Any], where: str) -> TrainingConfig:
    """Settings as a configuration; `where` they came from stands in the error."""
    try:
        return TrainingConfig.model_validate(content)
    except ValidationError as error:
        raise settings_error(where, error, TrainingConfig.model_fields) from error


def help_lines() -> Iterable[str]:
    """One line a key, for --help."""
    for key, info in TrainingConfig.model_fields.items():
        default = info.get_default(call_default_factory=True)
        yield f"  --{key} = {default if default is not None else '(none)'}  {info.description}"
