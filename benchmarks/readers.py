"""Images/s of each format's reader, on the same images: opening the data set, and decoding images in random order.

    python -m benchmarks.readers --images DIR --output benchmarks/results/readers.json

DIR is an image folder with train/<class>/<image> and test/<class>/<image>. The formats are written beside each other into a
temporary folder, with the same files in them, and measured in turns by one thread. Seconds are those of the CPU, so that
other work on the machine counts little; what a disk or a network takes is not in them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.spread import spread
from loaders.arrays import FileImages
from loaders.catalog import load
from loaders.request import Request
from metadata.files import write_json
from metadata.machine import machine, versions
from tests.helpers.formats import FORMATS

STREAMED_GB = 1e-9  # no image stays decoded in memory


def measured(root: Path, name: str, decoded: int) -> tuple[float, float]:
    """Return the seconds that opening a data set takes, and the images/s of decoding some in random order, not resized."""
    started = time.process_time()
    splits = load(Request(name=name, root=root, memory_limit_gb=STREAMED_GB, workers=1,
                          preprocessing={"resize": None, "crop": None}))
    opened = time.process_time() - started
    images = splits.train.images
    assert isinstance(images, FileImages), "streamed"
    ids = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:decoded]
    started = time.process_time()
    for part in ids.split(32):
        images.batch(part)
    return opened, len(ids) / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--decoded", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    times: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        roots = {"image_folder": arguments.images}
        roots |= {name: write(arguments.images, Path(folder) / name) for name, write in FORMATS.items()
                  if name != "tiny_imagenet"}  # which is read as an image folder is
        for _ in range(arguments.rounds):
            for name, root in roots.items():
                times.setdefault(name, []).append(measured(root, name, arguments.decoded))
    found: dict[str, Any] = {}
    for name, rounds in times.items():
        ratios = [rate / base for (_, rate), (_, base) in zip(rounds, times["image_folder"], strict=True)]
        found[name] = {"open_seconds": spread([opened for opened, _ in rounds]),
                       "images_per_second": spread([rate for _, rate in rounds]),
                       "percent_of_folder": spread([100 * ratio for ratio in ratios])}
        console.print(f"{name:14} open {found[name]['open_seconds']['median']:.2f} s, "
                      f"{found[name]['images_per_second']['median']:,.0f} images/s, "
                      f"{found[name]['percent_of_folder']['median']:.0f} % of a folder's")
    if arguments.output:
        write_json(arguments.output, {"formats": found, "images": sum(1 for _ in arguments.images.glob("*/*/*")),
                                      "machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main()
