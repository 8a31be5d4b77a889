"""Accuracy against minutes on CIFAR-10: run a training recipe with several seeds and record the curves.

    python -m benchmarks.cifar10_time --data_root DIR --config cifar10_fast --seeds 0,1,2 --output benchmarks/results/NAME

Write NAME.json and NAME.png; keep the seeds that NAME.json already has for the same settings. Each seed is one run of
`python -m compress train`, one after the other. The wall time includes the start of Python and the decoding of the images.
The curve shows the held-out images, if there are any. The test split is opened once a seed, at the end, and measured twice:
plainly, and with the mean of the logits of each image and its mirror image.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from architectures.architecture import Architecture
from architectures.weights import open_model
from compress.training.assessment import accuracy_of
from loaders.catalog import load
from loaders.request import Request
from metadata.files import read_json, write_json
from metadata.formats import read_csv, write_figure
from metadata.machine import machine, versions


class Mirrored(nn.Module):
    """(N, C, H, W) -> (N, classes): the mean of the logits of each image and its mirror image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images) + self.model(images.flip(3))
        return logits / 2


def run(config: str, seed: int, data_root: Path, folder: Path, extra: list[str]) -> dict[str, Any]:
    """Run one seed; return its curve, its test accuracy and its times."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "compress", "train", "--config", config, "--data_root", str(data_root), "--seed",
                    str(seed), "--log_dir", str(folder), *extra], check=True)
    wall = time.monotonic() - start
    summary = json.loads((folder / "summary.json").read_text())
    curve = [{"epoch": int(row["epoch"]), "seconds": float(row["seconds"]),
              "accuracy": round(float(row["validation_accuracy"]), 4)} for row in read_csv(folder / "metrics.csv")
             if row.get("validation_accuracy")]
    model = open_model(read_json(folder / "architecture.json", Architecture), folder / "weights.pth").eval()
    splits = load(Request(name="cifar10", root=data_root))
    mirrored = accuracy_of(Mirrored(model), splits.open_test(), splits.card.preprocessing)
    test = summary["test"]
    return {"seed": seed, "wall_seconds": round(wall, 1), "training_seconds": summary["seconds"],
            "images_per_second": summary["images_per_second"], "test_accuracy": test["accuracy"],
            "test_accuracy_mirrored": round(mirrored, 4), "test_loss": test["loss"], "parameters": summary["parameters"],
            "macs": summary["macs"], "curve": curve}


def draw(path: Path, title: str, runs: list[dict[str, Any]]) -> None:
    """Draw the curves of all seeds, and the final test accuracy of each."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for index, found in enumerate(runs):
        minutes = [point["seconds"] / 60 for point in found["curve"]]
        axis.plot(minutes, [100 * point["accuracy"] for point in found["curve"]], marker=".", color=f"C{index}", alpha=0.7,
                  label=f"seed {found['seed']}, held-out images")
        axis.scatter(found["wall_seconds"] / 60, 100 * found["test_accuracy"], marker="*", s=90, color=f"C{index}",
                     zorder=3, label=f"seed {found['seed']}, test, all included: {100 * found['test_accuracy']:.2f} %")
    axis.set(xlabel="minutes", ylabel="accuracy (%)", title=title, xlim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    write_figure(path, figure)


def main() -> None:
    """Run the seeds; write and draw the results after each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--config", default="cifar10_fast")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, required=True)
    arguments, extra = parser.parse_known_args()
    path = arguments.output.with_suffix(".json")
    before = json.loads(path.read_text()) if path.is_file() else {}
    same = (before.get("config"), before.get("changed")) == (arguments.config, extra)
    runs = before["runs"] if same else []
    for seed in map(int, arguments.seeds.split(",")):
        if seed in [found["seed"] for found in runs]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run(arguments.config, seed, arguments.data_root, Path(folder) / "log", extra))
        accuracies = [found["test_accuracy"] for found in runs]
        walls = [found["wall_seconds"] for found in runs]
        result = {"schema": 1, "config": arguments.config, "changed": extra, "n": len(runs),
                  "test_accuracy": {"mean": round(statistics.mean(accuracies), 5), "lowest": min(accuracies),
                                    "deviation": round(statistics.stdev(accuracies), 5) if len(runs) > 1 else None},
                  "wall_minutes": {"median": round(statistics.median(walls) / 60, 2), "longest": round(max(walls) / 60, 2)},
                  "runs": runs, "machine": machine(), "versions": versions()}
        write_json(path, result)
        cores = result["machine"]["cores"]
        draw(arguments.output.with_suffix(".png"), f"CIFAR-10, {arguments.config}, {cores} CPU cores", runs)
        print(json.dumps({key: result[key] for key in ("n", "test_accuracy", "wall_minutes")}), flush=True)


if __name__ == "__main__":
    main()
