"""How to train: every setting with its default. YAML, flags, stages, studies and the training loop read these alone."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from compress.settings import Config
from metadata.errors import UserError

Augmentation = Literal["crop", "flip", "alternating_flip", "cutout", "affine"]
Precision = Literal["auto", "float32", "bfloat16", "float16", "mixed"]

# Names that other training scripts use for the same schedules.
SCHEDULE_NAMES = {"steplr": "step", "reducelronplateau": "plateau", "onecycle": "one_cycle", "onecyclelr": "one_cycle",
                  "cosineannealinglr": "cosine", "none": "constant"}


def _known_name(value: Any) -> Any:
    """Return a name in lower case, and a schedule's other name as this project's."""
    return SCHEDULE_NAMES.get(value.lower(), value.lower()) if isinstance(value, str) else value


def _by_epoch(value: Any) -> Any:
    """Return `0:128,10:256` as a mapping from epoch to number; to YAML, `{0:128, 10:256}` holds two keys without values."""
    if isinstance(value, dict) and value and all(entry is None for entry in value.values()):
        value = ",".join(map(str, value))
    if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*:\s*\d+\s*(,\s*\d+\s*:\s*\d+\s*)*", value):
        value = [tuple(part.split(":")) for part in value.replace(" ", "").split(",")]
        if len({int(epoch) for epoch, _ in value}) < len(value):
            raise ValueError("an epoch is given twice")
        return dict(value)
    return value


def _by_comma(value: Any) -> Any:
    """Return `crop,flip` as a list, and an empty text as an empty one."""
    return [part.strip() for part in value.split(",") if value.strip()] if isinstance(value, str) else value


ByEpoch = Annotated[dict[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]], BeforeValidator(_by_epoch)]


class TrainingSettings(Config):
    """How to train a model; a `validation_alias` is the name that other training scripts give the same setting."""

    model_config = ConfigDict(populate_by_name=True)

    epochs: int = Field(10, ge=0, le=100_000, validation_alias="num_epochs", description="passes over the training split")
    max_steps: int | None = Field(None, ge=1, description="stop after this number of steps, for trials")
    batch_size: int = Field(128, ge=2, description="images per step, over all processes")
    batch_size_schedule: ByEpoch = Field({}, validation_alias="bs_schedule", description="batch size from an epoch on, "
                                         "counted from 0, such as 0:128,10:256")
    drop_last: bool = Field(True, description="leave out the last batch of an epoch if it is smaller than the others")
    accumulate: int = Field(1, ge=1, description="parts in which the gradient of a batch is accumulated")

    optimizer: Annotated[Literal["sgd", "adam", "adamw", "muon", "sam"], BeforeValidator(_known_name)] = Field(
        "sgd", description="sgd (with Nesterov momentum), adam, adamw, muon or sam")
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD and Muon only")
    weight_decay: float = Field(5e-4, ge=0, description="of kernels and matrices, not of norms and biases")
    clip: float = Field(0.0, ge=0, description="largest gradient norm; 0: no limit")
    adamw_lr: float = Field(0.002, gt=0, description="Muon only: peak learning rate of the parameters that AdamW updates")
    head_lr: float = Field(0.0, ge=0, description="Muon only: peak learning rate of the last layer; 0: adamw_lr")
    muon_scale: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw", description="Muon only: scale of a step by the matrix's shape; match_rms_adamw: "
        "0.2 sqrt(max(out, in)), original: sqrt(max(1, out / in))")
    sam_base: Literal["sgd", "adam", "adamw", "muon"] = Field("sgd", description="SAM only: optimizer that makes the step")
    sam_rho: float = Field(0.05, gt=0, description="SAM only: length of the ascent")

    schedule: Annotated[Literal["cosine", "linear", "step", "plateau", "one_cycle", "constant"],
                        BeforeValidator(_known_name)] = Field(
        "cosine", validation_alias="scheduler", description="cosine, linear, step, plateau, one_cycle or constant")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises; one_cycle: "
                          "0 means 0.3")
    anneal: float = Field(1.0, gt=0, le=1, description="share of the training after which the schedule stays at its end")
    lr_floor: float = Field(0.0, ge=0, lt=1, description="share of the peak learning rate at which the schedule ends")
    step_size: int = Field(0, ge=0, description="step only: epochs between drops; 0: a tenth after one half and again "
                           "after three quarters")
    gamma: float = Field(0.1, gt=0, le=1, description="step only: factor of a drop, with step_size")
    patience: int = Field(5, ge=0, description="plateau only: epochs without a lower loss before a drop")
    factor: float = Field(0.1, gt=0, lt=1, description="plateau only: factor of a drop")

    augment: Annotated[list[Augmentation] | None, BeforeValidator(_by_comma)] = Field(
        None, description="in this order, such as crop,flip; none given: crop and flip, or crop alone where the data "
        "set's card says that images must not be mirrored")
    padding: int = Field(4, ge=0, le=256, description="pixels around the image for the random crop")
    affine_degrees: float = Field(10.0, ge=0, le=180, description="affine only: largest rotation to either side")
    affine_scale: float = Field(0.1, ge=0, lt=1, description="affine only: largest change of size, as a share")
    affine_shear: float = Field(0.1, ge=0, description="affine only: largest shear, as a share of the height")
    affine_shift: float = Field(2.0, ge=0, description="affine only: largest shift in pixels")
    mixup: float = Field(0.0, ge=0, description="alpha of the Beta distribution; 0: no mixup")
    cutmix: float = Field(0.0, ge=0, description="the same for CutMix, which pastes a box of another image; with both, "
                          "each batch has one of the two")
    views: int = Field(0, ge=0, description="different augmentations of an image before they repeat; 0: a new one in "
                       "every epoch")
    size_schedule: ByEpoch = Field({}, description="pixels to which the shorter side of images is shrunk from an epoch on, "
                                   "counted from 0, such as 0:24,4:32")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the cross-entropy")

    ema: float = Field(0.0, ge=0, lt=1, description="decay of the weight average that is measured and kept; 0: none")
    monitor: Literal["validation", "train"] = Field("validation", description="loss that decides on plateau, early "
                                                    "stopping and the best epoch")
    keep: Literal["best", "last"] | None = Field(None, description="weights that are kept: of the epoch with the lowest "
                                                 "monitored loss, or the last; none given: best with early stopping, else "
                                                 "last")
    early_patience: int = Field(0, ge=0, description="stop after this number of epochs without a lower loss; 0: never")
    measure_every: int = Field(1, ge=1, description="epochs between measurements of the validation split; the last epoch "
                               "is always measured; more than 1 needs monitor train")

    precision: Precision = Field("auto", description="auto: bfloat16 on CUDA, else float32; mixed: the 16-bit type that "
                                 "the device has, else float32; weights are float32 always")
    compile: bool | None = Field(None, description="compile the network with torch.compile; none given: try it in long "
                                 "trainings on a CPU and keep what is faster")
    cuda_graph: bool = Field(False, description="CUDA only: capture each step in a CUDA graph, which saves the time of "
                             "launching small networks' kernels")
    channels_last: bool | None = Field(None, description="channels-last memory format; none given: where the network "
                                       "gains by it")
    checkpoint_seconds: float = Field(20.0, ge=0, description="time between checkpoints")

    WHERE: ClassVar = frozenset({"checkpoint_seconds", "cuda_graph"})

    # `use_amp` and `amp_dtype` together are the setting `precision`.
    AMP: ClassVar = {"use_amp": "mixed precision; the same as precision mixed",
                     "amp_dtype": "with use_amp: auto, float16 or bfloat16"}

    @model_validator(mode="before")
    @classmethod
    def _read_other_names(cls, content: Any) -> Any:
        """Refuse a setting under two of its names, and read `use_amp` and `amp_dtype` as `precision`."""
        if not isinstance(content, dict):
            return content
        for name, key in cls.aliases().items():
            if name in content and key in content:
                raise ValueError(f"{name} and {key} are the same setting; give one of them")
        content = dict(content)
        dtype = content.pop("amp_dtype", "auto")  # without use_amp it changes nothing
        if dtype not in ("auto", "float16", "bfloat16"):
            raise ValueError(f"amp_dtype: expected auto, float16 or bfloat16, got {dtype!r}")
        if "use_amp" not in content:
            return content
        use_amp = content.pop("use_amp")
        if use_amp not in (True, False):  # 1 and 0, too
            raise ValueError(f"use_amp: expected true or false, got {use_amp!r}")
        return {**content, "precision": "float32" if not use_amp else "mixed" if dtype == "auto" else dtype}

    @model_validator(mode="after")
    def _check_measurements(self) -> TrainingSettings:
        if self.measure_every > 1 and self.monitor == "validation":
            raise ValueError("measure_every above 1 leaves epochs without a validation loss to watch; set monitor train")
        return self

    @classmethod
    def aliases(cls) -> dict[str, str]:
        """Return the key of each other name, `use_amp` included."""
        named = {info.validation_alias: key for key, info in cls.model_fields.items()
                 if isinstance(info.validation_alias, str)}
        return {**named, "use_amp": "precision"}

    @classmethod
    def kinds(cls) -> dict[str, Any]:
        """Return the type of each setting, by each of its names."""
        return {**super().kinds(), "use_amp": bool, "amp_dtype": str}

    @classmethod
    def names(cls) -> list[str]:
        """Return every name of a setting that is accepted."""
        return [*cls.model_fields, *cls.aliases(), "amp_dtype"]

    @classmethod
    def merged(cls, content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        """Return a mapping of settings with changes, whichever of its names a setting has in either."""
        other = cls.aliases()
        changed = {other.get(key, key) for key in changes}
        if "precision" in changes:
            changed.add("amp_dtype")
        return {key: value for key, value in content.items() if other.get(key, key) not in changed} | changes

    @property
    def keeps_best(self) -> bool:
        """Whether the weights of the best epoch are kept."""
        return self.keep == "best" or (self.keep is None and self.early_patience > 0)

    def steps(self, epoch: int, samples: int) -> tuple[int, int]:
        """Return (images per step, steps) of an epoch over a number of samples."""
        batch_size = min(at_epoch(self.batch_size_schedule, epoch, self.batch_size), samples)
        left_over = not self.drop_last and samples % batch_size >= 2 * self.accumulate
        return batch_size, samples // batch_size + left_over

    def total_steps(self, samples: int) -> int:
        """Return the steps of the whole training, `max_steps` at most."""
        total = sum(self.steps(epoch, samples)[1] for epoch in range(self.epochs))
        return min(total, self.max_steps or total)

    def measures(self, epoch: int) -> bool:
        """Return whether the validation split is measured after an epoch, counted from 1."""
        return epoch % self.measure_every == 0 or epoch == self.epochs

    def measurements(self) -> int:
        """Return how many times the validation split is measured in the whole training."""
        return sum(self.measures(epoch) for epoch in range(1, self.epochs + 1))

    def check_batches(self, label: str, samples: int, processes: int) -> None:
        """Refuse batches that the processes cannot share equally, or with less than two images for one of them.

        Raises:
            UserError: there is such a batch.
        """
        if not self.drop_last and processes > 1:
            raise UserError(f"{label}: the last partial batch of an epoch cannot be shared by {processes} processes; train "
                            "with one, or set drop_last true")
        for size in {min(size, samples) for size in (self.batch_size, *self.batch_size_schedule.values())}:
            if (smallest := size // (self.accumulate * processes)) < 2:
                raise UserError(f"{label}: training needs batches of two or more images, got {smallest} ({samples} images "
                                f"in all, batch_size {size}, accumulate {self.accumulate}, {processes} processes)")
            if size % processes:
                raise UserError(f"{label}: a batch of {size} images cannot be shared equally by {processes} processes; "
                                "choose a batch_size that can")


def at_epoch(changes: dict[int, int], epoch: int, default: int) -> int:
    """Return the value that holds in an epoch: the latest change up to that epoch, or the default."""
    return changes[max(past)] if (past := [start for start in changes if start <= epoch]) else default
