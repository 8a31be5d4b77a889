"""Images/s of the loader against torchvision's per-image transforms, and of the training loop against a plain loop.

    python -m benchmarks.training_speed --cifar10 DIR --mnist DIR --output benchmarks/results/training_speed.json

Each side of a comparison has its own process, so that its settings do not affect the other. The sides are interleaved, so
that a slow moment of the machine affects both. Ratios are ratios of medians.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from architectures.zoo import make
from benchmarks.spread import spread
from compress.training.data import Data
from compress.training.distillation import cross_entropy
from compress.training.loop import train
from compress.training.malloc import keep_freed_memory
from compress.training.settings import TrainingSettings
from compress.training.trackers import Tracker
from loaders.arrays import ArrayImages
from loaders.augment import Affine, Augmenter
from loaders.catalog import load
from loaders.images import normalize
from loaders.request import Request
from loaders.splits import Split, Splits
from metadata.errors import UserError
from metadata.files import write_json
from metadata.machine import machine, versions
from metadata.schemas import Preprocessing

BATCH = 128


class PerImage(Dataset[tuple[Tensor, int]]):
    """The behaviour of torchvision's CIFAR10 and MNIST classes: make and transform a PIL image at each access."""

    def __init__(self, split: Split, preprocessing: Preprocessing, augment: list[Any]) -> None:
        from torchvision import transforms
        pixels = split.images.batch(torch.arange(len(split)))
        self.arrays = (pixels[:, 0] if pixels.shape[1] == 1 else pixels.permute(0, 2, 3, 1)).contiguous().numpy()
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose([*augment, transforms.ToTensor(),
                                             transforms.Normalize(preprocessing.mean, preprocessing.std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def crop_and_flip() -> list[Any]:
    """Return torchvision's transforms for each image: crop with padding 4, flip."""
    from torchvision import transforms
    return [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]


Sides = dict[str, Callable[[], float]]  # name -> measurement in images/s; the last is the baseline


def interleaved(case: str, arguments: argparse.Namespace, rounds: int) -> dict[str, Any]:
    """Interleave the sides of a case, each in its own process; the first round is a warm-up and does not count."""
    command = [sys.executable, "-m", "benchmarks.training_speed", "--cifar10", str(arguments.cifar10), "--mnist",
               str(arguments.mnist), "--case", case, "--side"]

    def begun(index: int) -> subprocess.Popen[str]:
        return subprocess.Popen([*command, str(index)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def ask(side: subprocess.Popen[str], what: str) -> Any:
        assert side.stdin and side.stdout
        side.stdin.write(what + "\n")
        side.stdin.flush()
        return json.loads(side.stdout.readline())

    sides = [begun(0)]
    names = ask(sides[0], "names")
    sides += [begun(index) for index in range(1, len(names))]
    seen: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name, side in zip(names, sides, strict=True):
            speed = ask(side, "measure")
            if turn:
                seen[name].append(speed)
    for side in sides:
        side.communicate()
    medians = {name: statistics.median(values) for name, values in seen.items()}
    result: dict[str, Any] = {name: spread(values) for name, values in seen.items()}
    result["ratios"] = {name: round(medians[name] / medians[names[-1]], 2) for name in names[:-1]}
    return result


def serve(sides: Sides, index: int) -> None:
    """Serve one side: answer each line with the names of all sides, or with a measurement of this side."""
    measure = list(sides.values())[index]
    for line in sys.stdin:
        print(json.dumps(list(sides) if line.strip() == "names" else measure()), flush=True)


def data_sides(splits: Splits) -> Sides:
    """Augmented, normalized batches on one core: ours in one thread, theirs in two worker processes on this core."""
    split, card = splits.train.to(torch.device("cpu")), splits.card
    augmenter = Augmenter(names=["crop", "flip"], size=card.input_shape[1:], padding=4, seed=0, samples=len(split))
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    views = iter(range(10**9))

    def ours() -> float:
        view, start, order = next(views), time.perf_counter(), torch.randperm(len(split))
        for ids in order.split(BATCH):
            normalize(augmenter(split.images.batch(ids), ids, view), card.preprocessing).contiguous(
                memory_format=torch.channels_last)
        return len(split) / (time.perf_counter() - start)

    def theirs() -> float:
        loader = DataLoader(PerImage(split, card.preprocessing, crop_and_flip()), BATCH, shuffle=True, num_workers=2)
        batches = iter(loader)
        next(batches)  # the start of the workers does not count
        start, images = time.perf_counter(), 0
        for _, (batch, _) in zip(range(150), batches, strict=False):
            images += len(batch)
        del batches
        return images / (time.perf_counter() - start)

    return {"ours": ours, "DataLoader with 2 workers": theirs}


def block(channels: int, out: int, stride: int) -> nn.Module:
    """A basic block of He et al. 2016."""
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
                                      nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
            self.skip = nn.Identity() if stride == 1 and channels == out else nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.body(x) + self.skip(x))
    return Block()


def resnet20() -> nn.Module:
    """ResNet-20 for 32x32 images, 0.27 M parameters. Source: He et al. 2016, section 4.2."""
    stages = [block(a, b, s) for a, b, s in [(16, 16, 1)] * 3 + [(16, 32, 2), (32, 32, 1), (32, 32, 1), (32, 64, 2),
                                                                (64, 64, 1), (64, 64, 1)]]
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *stages,
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


BASE = TrainingSettings(epochs=1, weight_decay=0.0, warmup=0.0, checkpoint_seconds=1e9, monitor="train")


def step_sides(make_model: Callable[[], nn.Module], splits: Splits, batch: int, steps: int, names: list[str],
               per_image: list[Any], settings: TrainingSettings, affine: Affine | None = None) -> Sides:
    """Time whole training steps, loading included, on all cores: the engine's loop, and the usual loop of a tutorial."""
    settings = settings.model_copy(update={"batch_size": batch, "max_steps": steps, "compile": False})
    return {"engine": engine(make_model, splits, settings, names, affine),
            "engine, compiled": engine(make_model, splits, settings.model_copy(update={"compile": True}), names, affine),
            "plain loop": plain_loop(make_model, splits, batch, steps, per_image, settings)}


def engine(make_model: Callable[[], nn.Module], splits: Splits, settings: TrainingSettings, names: list[str],
           affine: Affine | None = None) -> Callable[[], float]:
    """Time the training loop over `settings.max_steps` steps; a network is compiled in the warm-up round."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    card, split = splits.card, splits.train.to(torch.device("cpu"))
    device = torch.device("cpu")
    empty = Split(ArrayImages(torch.zeros(0, *card.input_shape, dtype=torch.uint8)), torch.zeros(0, dtype=torch.int64))
    augmenter = Augmenter(names=names, size=card.input_shape[1:], padding=4, seed=0, samples=len(split),
                          affine=affine or Affine())
    data = Data(train=split, validation=empty, augmenter=augmenter, preprocessing=card.preprocessing)
    assert settings.max_steps
    model = make_model()
    images = settings.max_steps * settings.batch_size

    def measure() -> float:
        with tempfile.TemporaryDirectory() as folder:
            trained = train(model, data, cross_entropy(0.0), settings, label="speed", seed=0, device=device,
                            checkpoint=Path(folder) / "c.pth", tracker=Tracker(Console(file=io.StringIO())))
        return images / trained.seconds

    return measure


def plain_loop(make_model: Callable[[], nn.Module], splits: Splits, batch: int, steps: int, per_image: list[Any],
               settings: TrainingSettings) -> Callable[[], float]:
    """Time an eager model with a default DataLoader, a default optimizer, and `loss.item()` in every step."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    loader = DataLoader(PerImage(splits.train, splits.card.preprocessing, per_image), batch, shuffle=True)

    def measure() -> float:
        model = make_model().train()
        kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.SGD
        optimizer = kind(model.parameters(), lr=0.01)
        criterion = nn.CrossEntropyLoss()
        running, start = 0.0, time.perf_counter()
        for _, (images, labels) in zip(range(steps), loader, strict=False):
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            running += loss.item()
        return steps * batch / (time.perf_counter() - start)

    return measure


def stream_sides(root: Path) -> Sides:
    """Stream an image folder that does not fit into memory: ours, and a DataLoader over an ImageFolder."""
    from torchvision import datasets, transforms
    torch.set_num_threads(1)
    workers = len(os.sched_getaffinity(0))
    splits = load(Request(name="image_folder", root=root, preprocessing={"resize": 32, "crop": 32}, memory_limit_gb=1e-6,
                          workers=workers))
    split, card = splits.train, splits.card
    augmenter = Augmenter(names=["crop", "flip"], size=(32, 32), padding=4, seed=0, samples=len(split))
    count = 40 * BATCH

    def ours() -> float:
        from loaders.arrays import prefetched
        start, order = time.perf_counter(), torch.randperm(len(split))[:count]
        for ids, images in prefetched(split.images, order.split(BATCH)):
            normalize(augmenter(images, ids, 0), card.preprocessing)
        return count / (time.perf_counter() - start)

    folder = datasets.ImageFolder(root / "train", transforms.Compose([
        transforms.Resize(32), *crop_and_flip(), transforms.ToTensor(),
        transforms.Normalize(card.preprocessing.mean, card.preprocessing.std)]))

    def theirs() -> float:
        batches = iter(DataLoader(folder, BATCH, shuffle=True, num_workers=workers))
        next(batches)
        start, images = time.perf_counter(), 0
        for _, (batch, _) in zip(range(count // BATCH), batches, strict=False):
            images += len(batch)
        del batches
        return images / (time.perf_counter() - start)

    return {"ours, streamed": ours, f"DataLoader with {workers} workers": theirs}


def memory_by_epoch(splits: Splits) -> Iterator[float]:
    """Yield the peak memory of this process in MB after each epoch of a training."""
    import resource
    augmenter = Augmenter(names=["crop", "flip"], size=(32, 32), padding=4, seed=0, samples=len(splits.train))
    data = Data(train=splits.train, validation=splits.validation, augmenter=augmenter,
                preprocessing=splits.card.preprocessing)

    class Watching(Tracker):
        def epoch(self, label: str, **metrics: Any) -> None:
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    peaks: list[float] = []
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, 10))
    with tempfile.TemporaryDirectory() as folder:
        train(model, data, cross_entropy(0.0), BASE.model_copy(update={"epochs": 10, "batch_size": 500}), label="memory",
              seed=0, device=torch.device("cpu"), checkpoint=Path(folder) / "c.pth",
              tracker=Watching(Console(file=io.StringIO())))
    yield from peaks


def slim() -> nn.Module:
    """Return the student of the CIFAR-10 recipe."""
    return make("slim_resnet18", num_classes=10, width=16, stem="small")


def sides_of(case: str, arguments: argparse.Namespace) -> Sides:
    """Return the measurements of a case."""
    from torchvision import transforms

    if case == "stream_from_disk":
        return stream_sides(arguments.cifar10)
    splits = load(Request(name="mnist", root=arguments.mnist) if "mnist" in case else
                  Request(name="cifar10", root=arguments.cifar10))
    sgd = BASE
    if case == "data_one_core":
        return data_sides(splits)
    if case == "step_resnet20":
        return step_sides(resnet20, splits, BATCH, 40, ["crop", "flip"], crop_and_flip(), sgd)
    if case == "step_slim_resnet18":
        return step_sides(slim, splits, BATCH, 25, ["crop", "flip"], crop_and_flip(), sgd)
    rotation, published = [transforms.RandomRotation(7)], "mnist_model_final"
    adam = BASE.model_copy(update={"optimizer": "adam", "lr": 0.001})
    if case == "step_tiny_mnist":
        return step_sides(lambda: make(published, num_classes=10), splits, 32, 300, ["affine"], rotation, adam,
                          Affine(degrees=7.0, scale=0, shear=0, shift=0))
    assert case == "mnist_challenge", case  # our model with our settings, the published model with the published settings
    muon = BASE.model_copy(update={"optimizer": "muon", "lr": 0.02, "adamw_lr": 0.01, "batch_size": 64, "max_steps": 200,
                                   "ema": 0.998})
    return {"mnist_under_8k": engine(lambda: make("mnist_under_8k", num_classes=10), splits, muon, ["affine"]),
            "published": plain_loop(lambda: make(published, num_classes=10), splits, 32, 300, rotation, adam)}


CASES = ("data_one_core", "stream_from_disk", "step_resnet20", "step_slim_resnet18", "step_tiny_mnist", "mnist_challenge")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar10", type=Path, required=True, help="CIFAR-10 as an image folder")
    parser.add_argument("--mnist", type=Path, required=True, help="torchvision's MNIST files")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        if arguments.side == 0:
            keep_freed_memory()  # as in `compress train`
        serve(sides_of(arguments.case, arguments), arguments.side)
        return
    result: dict[str, Any] = {"schema": 1, "unit": "images/s", "machine": machine(), "versions": versions()}
    for case in CASES:
        result[case] = interleaved(case, arguments, arguments.rounds)
        print(case, json.dumps(result[case]), flush=True)
    cifar = load(Request(name="cifar10", root=arguments.cifar10))
    result["peak_memory_mb_by_epoch"] = [round(peak, 1) for peak in memory_by_epoch(cifar)]
    print("peak memory", result["peak_memory_mb_by_epoch"])
    if arguments.output:
        write_json(arguments.output, result)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
