"""How many operators a training step launches on an accelerator, counted without one.

    python -m benchmarks.operators --configs cifar10_fast,cifar10_wide,cifar10,cifar100 --label after \
        --output benchmarks/results/operators.json

The training loop itself runs two short epochs on a device that only pretends: PyTorch's fake tensors have shapes, types and
a device, and no content, so the code goes the way of every device but a CPU. A dispatch mode sees each operator that
reaches the device, below autograd, once. The counts are of one step in the middle of the second epoch; what an epoch does
once is beside them. On CUDA a step may have a few operators less: the pretended device has no layouts of cuDNN's, and
autograd copies gradients of kernels. A step in a CUDA graph (`cuda_graph`) is one launch after five copies and fills.

- operators: calls that compute on the device. Views, allocations and metadata do not count; a foreach or fused operator
  over many tensors counts once, as do convolutions and batch norms.
- copies: from the host to the device. synchronizations: the host waits for a number of the device.

Parts of a step: forward (the loss function), backward (with SAM's ascent and the sums of loss and accuracy), optimizer, and
data (everything else). The loss is not looked at every half second, as a training does to show its progress.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from architectures.zoo import make
from compress.training.cuda import Step
from compress.training.data import training_data
from compress.training.distillation import cross_entropy
from compress.training.flags import TrainingRun, resolve_training
from compress.training.loop import train
from compress.training.mixup import Batch, Loss
from compress.training.trackers import Tracker
from compress.training.updates import Updater
from loaders.arrays import ArrayImages
from loaders.splits import Split
from metadata.files import write_json
from metadata.machine import machine, versions
from metadata.records import DatasetCard
from metadata.schemas import Preprocessing

STEPS = 4  # of an epoch
KINDS = ("operators", "copies", "synchronizations")
Seen = dict[str, Counter[str]]
PARTS = ("data", "forward", "backward", "optimizer")
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh", "detach", "set_",
               "resize_", "_resize_output_", "_unsafe_view")


class Pretending(FakeTensorMode):
    """Tensors without content, also where `torch.tensor` makes one on the device."""

    avoid_device_init = True


class Counting(TorchDispatchMode):
    """Count what reaches the device, by part of the step."""

    def __init__(self, device: torch.device, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.mode, self.part = device.type, mode, "data"
        self.seen: Seen = {part: Counter() for part in PARTS}
        self.steps: list[Seen] = []  # what was seen before each step
        self.epochs: list[Seen] = []  # what was seen up to the end of each epoch

    def faked(self, value: Tensor) -> Tensor:
        return value if isinstance(value, FakeTensor) else self.mode.from_tensor(value)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A real tensor, such as torch.tensor makes, would be moved to the device in earnest.
        args, kwargs = tree_map_only(Tensor, self.faked, (args, kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        here = any(value.device.type == self.device for value in given)
        if name in ("_local_scalar_dense", "equal", "is_nonzero"):
            self.seen[self.part]["synchronizations"] += here
            return 0.5 if name == "_local_scalar_dense" else True
        result = None if name.startswith("_fused_") and name.endswith("_") else function(*args, **kwargs)
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        if not here and not any(value.device.type == self.device for value in made):
            return result  # the host's own work
        from_host = any(value.device.type == "cpu" for value in given)
        if from_host and (name == "_to_copy" or (name == "copy_" and given[0].device.type == self.device)):
            self.seen[self.part]["copies"] += 1
        elif function.namespace == "aten" and not _views(function) and name not in ALLOCATIONS:
            self.seen[self.part]["operators"] += 1
            self.seen[self.part][name] += 1
        return result


def _views(function: Any) -> bool:
    """Return whether an operator only gives another view of its input."""
    aliases = [value.alias_info for value in function._schema.returns if value.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


class Stopwatchless(Tracker):
    """A tracker that prints nothing and calls a function at the end of each epoch."""

    after: Callable[[], None]

    def epoch(self, label: str, **metrics: Any) -> None:
        self.after()


def steps_of(config: TrainingRun, classes: int, side: int, captured: bool = False) -> dict[str, Any]:
    """Run two epochs on the pretended device; return the counts of a step, and of an epoch beyond its steps.

    Args:
        config: how to train.
        classes: of the network.
        side: of the images in pixels.
        captured: give each step its learning rate and view as tensors, as a step that a CUDA graph captures gets them.
    """
    device, samples = torch.device("pretended"), STEPS * config.batch_size
    options = {"stem": "small"} if "resnet" in config.model_name else {}
    model = make(config.model_name, num_classes=classes, **{**options, **config.model_options})
    settings = config.training.model_copy(update={"epochs": 2, "compile": False, "checkpoint_seconds": 1e9,
                                                  "monitor": "train", "keep": "last", "cuda_graph": False})
    card = DatasetCard(name="cifar10", class_names=[f"{index:03d}" for index in range(classes)],
                       input_shape=(3, side, side), preprocessing=Preprocessing(resize=side, crop=side),
                       counts={"train": samples, "validation": 0}, fingerprint="0" * 16)
    fake = Pretending(allow_non_fake_inputs=True)
    counting = Counting(device, fake)
    loss = _marked(cross_entropy(settings.label_smoothing), counting)

    def next_epoch() -> None:
        counting.epochs.append(copy.deepcopy(counting.seen))

    tracker = Stopwatchless(Console(file=io.StringIO()))
    tracker.after = next_epoch
    hooks = [register_optimizer_step_pre_hook(lambda *_: setattr(counting, "part", "optimizer")),
             register_optimizer_step_post_hook(lambda *_: setattr(counting, "part", "data"))]
    with tempfile.TemporaryDirectory() as folder, fake, counting, \
            mock.patch("compress.training.loop.PROGRESS_SECONDS", 1e9), \
            mock.patch("compress.training.checkpoints.write_tensors"), \
            mock.patch("compress.training.loop.step_of", _with_tensors) if captured else nullcontext():
        _pretend(model, device, settings.channels_last)
        train_split = Split(ArrayImages(torch.empty(samples, 3, side, side, dtype=torch.uint8)),
                            torch.empty(samples, dtype=torch.int64))
        empty = Split(ArrayImages(torch.empty(0, 3, side, side, dtype=torch.uint8)), torch.empty(0, dtype=torch.int64))
        data = training_data(train_split, empty, card, settings, seed=0, device=device)
        train(model, data, loss, settings, label="count", seed=0, device=device, checkpoint=Path(folder) / "c.pth",
              tracker=tracker)
    for hook in hooks:
        hook.remove()
    step = _difference(counting.steps[STEPS + 2], counting.steps[STEPS + 1])
    epoch = _difference(counting.epochs[1], counting.epochs[0])
    total = {kind: sum(step[part][kind] for part in PARTS) for kind in KINDS}
    once = {kind: sum(epoch[part][kind] for part in PARTS) - STEPS * total[kind] for kind in KINDS}
    parts = {part: {kind: step[part][kind] for kind in KINDS} for part in PARTS}
    return {**parts, "step": total, "once_an_epoch": once,
            "names": {part: {name: count for name, count in step[part].most_common() if count and name not in KINDS}
                      for part in PARTS}}


def _difference(later: Seen, earlier: Seen) -> Seen:
    return {part: Counter({name: count - earlier[part][name] for name, count in later[part].items()}) for part in PARTS}


def _with_tensors(updater: Updater, warn: Callable[[str], None]) -> Step:
    """Return the updater's step, with its numbers in tensors on the device."""
    def step(batch: Batch, lr: float) -> tuple[Tensor, Tensor]:
        view = torch.zeros(1, dtype=torch.int64, device=updater.device)
        return updater.step(replace(batch, view=view), torch.full((), lr, device=updater.device))
    return step


def _marked(loss: Loss, counting: Counting) -> Loss:
    """Return the loss function; it marks the forward part of a step."""
    def marked(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        if counting.part != "backward":  # else the second pass of SAM
            counting.steps.append(copy.deepcopy(counting.seen))
        counting.part = "forward"
        result = loss(network, batch)
        counting.part = "backward"
        return result
    return marked


def _pretend(model: nn.Module, device: torch.device, channels_last: bool | None) -> None:
    """Put a model on the pretended device, channels last; `to` would do so, but torch cannot swap fake parameters."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                layout = torch.channels_last if parameter.dim() == 4 and channels_last is not False else \
                    torch.contiguous_format
                module._parameters[name] = nn.Parameter(parameter.detach().to(device).contiguous(memory_format=layout),
                                                        parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    model.to = lambda *args, **kwargs: model  # type: ignore[method-assign]


def main() -> None:
    """Count, print a table, and write the counts under a label, beside those of other labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default="cifar10_fast,cifar10_wide,cifar10,cifar100", help="recipes of `train`")
    parser.add_argument("--label", default="after", help="name of these counts in the file")
    parser.add_argument("--captured", action="store_true", help="learning rate and view as tensors, as in CUDA graphs; "
                        "other flags are those of `train`")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments, changes = parser.parse_known_args()
    _setup_privateuseone_for_python_backend("pretended")
    # One operator on a GPU; without this, the pretended device takes the way of devices that have no such kernel.
    torch.library.impl("aten::silu_backward", "PrivateUse1", lambda gradient, value: torch.empty_like(value))
    counts = {}
    for name in arguments.configs.split(","):
        config = resolve_training(["--config", name, *changes])
        counts[name] = steps_of(config, 100 if config.dataset == "cifar100" else 10, 32, arguments.captured)
        if not arguments.json:
            print(name, *(f"{part}: {' / '.join(str(value) for value in counts[name][part].values())}"
                          for part in (*PARTS, "step", "once_an_epoch")), sep="\n  ", flush=True)
    if arguments.json:
        print(json.dumps(counts))
    if arguments.output:
        before = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {"schema": 1}
        write_json(arguments.output, {**before, arguments.label: {"counts": counts,
                                                                  "machine": machine(), "versions": versions()}})


if __name__ == "__main__":
    main()
